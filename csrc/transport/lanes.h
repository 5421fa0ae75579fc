// Matches what arrives with what is wanted: a lane is (peer, tag), and in each lane the n-th arrival belongs to the
// n-th request, whichever comes first. The part that transports without MPI have in common.
#pragma once

#include <cstddef>
#include <deque>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "transport/transport.h"

namespace hvd_backup {

template <class Arrival, class Request>
class Lanes {
 public:
  using Match = std::pair<Arrival, Request>;

  std::optional<Match> arrived(int peer, Tag tag, Arrival arrival) {
    Lane& lane = lanes_[{peer, tag}];
    lane.arrivals.push_back(std::move(arrival));
    return match(peer, tag, lane);
  }

  std::optional<Match> requested(int peer, Tag tag, Request request) {
    Lane& lane = lanes_[{peer, tag}];
    lane.requests.push_back(std::move(request));
    ++request_count_;
    return match(peer, tag, lane);
  }

  // Puts a request back to the front of its lane: what had arrived for it has turned out to be void.
  std::optional<Match> requested_again(int peer, Tag tag, Request request) {
    Lane& lane = lanes_[{peer, tag}];
    lane.requests.push_front(std::move(request));
    ++request_count_;
    return match(peer, tag, lane);
  }

  // Forgets what is wanted with this tag, from any peer, and what has arrived: dropped(peer, arrival) for each of
  // those. Whoever takes in what arrives asks is_cancelled() first from now on: a peer that had stopped may send it
  // much later.
  template <class Dropped>
  void cancel(Tag tag, Dropped dropped) {
    cancelled_.insert(tag);
    for (auto entry = lanes_.begin(); entry != lanes_.end();) {
      Lane& lane = entry->second;
      if (entry->first.second != tag) {
        ++entry;
        continue;
      }
      request_count_ -= lane.requests.size();
      for (const Arrival& arrival : lane.arrivals) dropped(entry->first.first, arrival);
      entry = lanes_.erase(entry);
    }
  }
  // Forgets what is wanted from this peer, and what has arrived from it.
  void forget(int peer) {
    const auto first = lanes_.lower_bound({peer, std::numeric_limits<Tag>::min()});
    auto last = first;
    for (; last != lanes_.end() && last->first.first == peer; ++last) request_count_ -= last->second.requests.size();
    lanes_.erase(first, last);
  }
  bool is_cancelled(Tag tag) const { return cancelled_.contains(tag); }

  // Requests that nothing has arrived for.
  std::size_t request_count() const { return request_count_; }

 private:
  struct Lane {
    std::deque<Arrival> arrivals;  // at most one of the two has anything in it
    std::deque<Request> requests;
  };

  std::optional<Match> match(int peer, Tag tag, Lane& lane) {
    if (lane.arrivals.empty() || lane.requests.empty()) return std::nullopt;
    Match match{std::move(lane.arrivals.front()), std::move(lane.requests.front())};
    lane.arrivals.pop_front();
    lane.requests.pop_front();
    --request_count_;
    if (lane.arrivals.empty() && lane.requests.empty()) lanes_.erase({peer, tag});
    return match;
  }

  std::map<std::pair<int, Tag>, Lane> lanes_;
  std::set<Tag> cancelled_;  // few: a tag for each attempt that was given up
  std::size_t request_count_ = 0;
};

}  // namespace hvd_backup
