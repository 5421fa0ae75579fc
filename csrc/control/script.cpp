#include "control/script.h"

#include <algorithm>

namespace hvd_backup {

void ChannelScript::add_decision(Step step, int scope, ScriptedDecision decision) {
  for (const int rank : decision.contributors) visits_[{rank, scope}][step].contributes = true;
  decisions_[{step, scope}] = std::move(decision);
  end_ = std::max(end_, step + 1);
}

void ChannelScript::add_drop(Step step, int scope, int rank) { ++visits_[{rank, scope}][step].drops; }

const ScriptedDecision* ChannelScript::find(Step step, int scope) const {
  const auto found = decisions_.find({step, scope});
  return found == decisions_.end() ? nullptr : &found->second;
}

std::optional<Step> ChannelScript::round_end(int round) const {
  if (static_cast<std::size_t>(round) >= round_ends_.size()) return std::nullopt;
  return round_ends_[static_cast<std::size_t>(round)];
}

bool ChannelScript::takes(Step step, int scope, int rank) {
  const auto steps = visits_.find({rank, scope});
  if (steps == visits_.end()) return false;
  const auto visit = steps->second.find(step);
  if (visit == steps->second.end()) return false;
  const bool in_vain = visit->second.drops > 0;
  if (in_vain) --visit->second.drops;
  const bool contributes = !in_vain && visit->second.contributes;
  if (contributes || (visit->second.drops == 0 && !visit->second.contributes)) steps->second.erase(visit);
  return contributes;
}

std::optional<Step> ChannelScript::next_step_of(int rank, Step from) const {
  const auto steps = visits_.find({rank, 0});
  if (steps == visits_.end()) return std::nullopt;
  const auto next = steps->second.lower_bound(from);
  if (next == steps->second.end()) return std::nullopt;
  return next->first;
}

}  // namespace hvd_backup
