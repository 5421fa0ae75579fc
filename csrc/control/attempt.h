// One attempt at an update, as the coordinator sees it (design, rule 4): which contributors have the whole result,
// whether it is kept for late ranks, and whom the others wait for in vain. Pure.
//
// A contributor is suspected only on evidence. When an attempt takes longer than the ones before let expect (see
// TransferTime), those that have not ended it are asked how far they are, which an engine answers at once, whatever its
// training thread does. Who does not answer has stopped. When all answer, it is who has not handed over its gradient;
// or else whose data most of the others miss: its link is slow.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "base/clock.h"
#include "control/messages.h"

namespace hvd_backup {

// How long attempts take, from their decision until all contributors have the result. The time after which something is
// wrong is that of TCP (RFC 6298, section 2), with another floor: mean + 4 mean deviations, and at first a second.
class TransferTime {
 public:
  static constexpr TimeUs least_patience_us = 20'000;  // scheduling noise on a crowded machine
  static constexpr TimeUs first_patience_us = 1'000'000;

  void measured(TimeUs took_us);
  TimeUs patience_us() const;

 private:
  TimeUs mean_us_ = -1;
  TimeUs deviation_us_ = 0;
};

struct Suspicion {
  Ranks ranks;                       // empty: none
  std::string reason;                // in words, of them
  std::optional<TimeUs> look_again;  // time alone may change it then
  bool stopped = false;              // they do not answer; otherwise they are slow
};

class Attempt {
 public:
  static constexpr TimeUs answer_us = 15'000;  // a process that runs at all answers a Probe within it

  Attempt() = default;
  Attempt(const Ranks& contributors, TimeUs now, TimeUs patience_us);

  // Returns whether that is news.
  bool done(int rank, bool kept, TimeUs now);
  void kept(int rank) { kept_.insert(rank); }
  void answered(int rank, const Progress& progress, TimeUs now);
  void lost(int rank) { lost_.insert(rank); }  // its process has died
  // Whoever has the result keeps all of it, because some contributors stay without.
  void keep_whole();
  const Ranks& whole_keepers() const { return whole_keepers_; }  // these; empty: nobody does

  TimeUs began() const { return began_; }
  TimeUs overdue_at() const { return began_ + patience_us_; }
  bool has(int rank) const { return done_.contains(rank); }
  const std::map<int, TimeUs>& done() const { return done_; }  // by rank, since when
  bool complete() const { return done_.size() == contributors_.size(); }
  bool kept_by_all() const;  // who is lost aside
  bool kept() const;         // every shard, by someone
  // All others have the result: at least `holders`, and with them every shard of it is kept.
  bool complete_without(const Ranks& suspects, int holders) const;

  // Whom to send a Probe now; they count as asked.
  Ranks ask(TimeUs now);
  Suspicion suspicion(TimeUs now) const;

 private:
  struct Question {
    TimeUs at = 0;
    std::optional<TimeUs> answered_at;
    Progress answer;
  };

  bool each_shard_has_keeper(const std::function<bool(int rank)>& keeps) const;
  Suspicion suspected(Ranks ranks, const std::string& why, TimeUs now) const;

  Ranks contributors_;
  TimeUs began_ = 0;
  TimeUs patience_us_ = 0;
  std::map<int, TimeUs> done_;
  std::set<int> kept_;
  std::set<int> lost_;
  Ranks whole_keepers_;
  std::map<int, Question> asked_;
};

}  // namespace hvd_backup
