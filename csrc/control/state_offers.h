// Whose state a rank beyond the journal can take over (design, rule 6): who was asked for a copy, who has offered one,
// and who is taking it. Pure bookkeeping; whom to ask, and when, is in channel_resync.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "control/messages.h"

namespace hvd_backup {

// A copy of a rank's state, which it keeps until it is told that nobody needs it.
struct StateOffer {
  int server = 0;
  Step step = 0;
  std::int64_t bytes = 0;
  std::set<int> takers;
};

class StateOffers {
 public:
  static constexpr int most_of_a_server = 2;  // copies that one rank keeps

  // --- servers ---

  void asked(int server, TimeUs now) { asked_[server] = now; }
  bool is_asked(int server) const { return asked_.contains(server); }
  const std::map<int, TimeUs>& asked() const { return asked_; }  // and have not answered, by rank, since when
  int held_by(int server) const;

  void died(int server);  // with all that it has offered
  // Returns how long the server has taken; -1: it was not asked.
  TimeUs offered(int server, Step step, std::int64_t bytes, TimeUs now);

  // The oldest of a server's, if it holds so many that it must not be asked for another one; it is forgotten.
  std::optional<StateOffer> take_oldest(int server);
  // Those that nobody takes, and which are older than `from`, or not wanted at all; they are forgotten.
  std::vector<StateOffer> take_unneeded(Step from, bool wanted);

  // --- takers ---

  // The newest state of at least `from` updates that another rank has offered, and that `taker` was not given yet.
  const StateOffer* find(int taker, Step from) const;
  void give(int taker, Step had, const StateOffer& offer);
  void lost(int taker, int server, Step step);  // if that was given to it
  bool wants_another(int taker) const;
  bool has_given(int server, int taker) const;  // which it is taking, or which is lost
  bool is_taking(int taker) const;
  Step had_by(int taker) const { return takers_.at(taker).had; }

  // The taker goes on with `have` updates. Returns whose state it has taken over; -1: nobody's.
  int taken(int taker, Step have);

 private:
  struct Taker {
    Step had = 0;
    std::set<std::pair<int, Step>> given;  // server, step
    bool wants_another = false;
  };

  std::map<int, TimeUs> asked_;
  std::vector<StateOffer> offers_;
  std::map<int, Taker> takers_;
};

}  // namespace hvd_backup
