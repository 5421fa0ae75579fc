// The decisions of a recorded run, to be made once more: who contributes to what, with which weights and
// hyperparameters, which ranks compute which steps in vain, and where rounds end. A ChannelBook that has a
// ChannelScript decides by it, and not by who comes first: then a run with stragglers is repeated bit for bit,
// without them.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "control/messages.h"

namespace hvd_backup {

struct ScriptedDecision {
  Ranks contributors;
  std::vector<double> weights;  // one for each
  std::string metadata;
  int required = 1;  // N
};

class ChannelScript {
 public:
  explicit ChannelScript(std::string description) : description_(std::move(description)) {}

  // What was recorded; drops and decisions of a step in the order in which its ranks arrived there.
  void add_decision(Step step, int scope, ScriptedDecision decision);
  void add_drop(Step step, int scope, int rank);
  void add_round_end(Step end) { round_ends_.push_back(end); }

  const std::string& description() const { return description_; }  // that of the recorded run
  const ScriptedDecision* find(Step step, int scope) const;
  Step end() const { return end_; }  // the first step of which nothing is known
  std::optional<Step> round_end(int round) const;

  // A rank has arrived: whether its gradient is to be used.
  bool takes(Step step, int scope, int rank);
  // The first step from `from` on that a rank is to compute, as a contributor or in vain.
  std::optional<Step> next_step_of(int rank, Step from) const;

 private:
  struct Visit {  // of a rank to a step
    int drops = 0;
    bool contributes = false;
  };

  std::string description_;
  std::map<std::pair<Step, int>, ScriptedDecision> decisions_;   // by step and scope
  std::map<std::pair<int, int>, std::map<Step, Visit>> visits_;  // by rank and scope: those still to come
  std::vector<Step> round_ends_;
  Step end_ = 0;
};

using Script = std::map<std::string, ChannelScript>;  // by the channel's name

}  // namespace hvd_backup
