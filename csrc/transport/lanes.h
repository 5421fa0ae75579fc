// Matches what arrives with what is wanted: a lane is (peer, tag), and in each lane the n-th arrival belongs to the
// n-th request, whichever comes first. The part that transports without MPI have in common.
#pragma once

#include <cstddef>
#include <deque>
#include <iterator>
#include <map>
#include <optional>
#include <utility>

namespace hvd_backup {

template <class Arrival, class Request>
class Lanes {
 public:
  using Match = std::pair<Arrival, Request>;

  std::optional<Match> arrived(int peer, int tag, Arrival arrival) {
    Lane& lane = lanes_[{peer, tag}];
    lane.arrivals.push_back(std::move(arrival));
    return match(peer, tag, lane);
  }

  std::optional<Match> requested(int peer, int tag, Request request) {
    Lane& lane = lanes_[{peer, tag}];
    lane.requests.push_back(std::move(request));
    ++request_count_;
    return match(peer, tag, lane);
  }

  // Puts a request back to the front of its lane: what had arrived for it has turned out to be void.
  std::optional<Match> requested_again(int peer, int tag, Request request) {
    Lane& lane = lanes_[{peer, tag}];
    lane.requests.push_front(std::move(request));
    ++request_count_;
    return match(peer, tag, lane);
  }

  // Forgets what is wanted with this tag, from any peer.
  void forget_requests(int tag) {
    for_tag(tag, [this](int, Lane& lane) {
      request_count_ -= lane.requests.size();
      lane.requests.clear();
    });
  }

  // Forgets what has arrived with this tag and is not wanted, and calls dropped(peer, arrival) for each.
  template <class Dropped>
  void forget_arrivals(int tag, Dropped dropped) {
    for_tag(tag, [&](int peer, Lane& lane) {
      for (const Arrival& arrival : lane.arrivals) dropped(peer, arrival);
      lane.arrivals.clear();
    });
  }

  // Requests that nothing has arrived for.
  std::size_t request_count() const { return request_count_; }

 private:
  struct Lane {
    std::deque<Arrival> arrivals;  // at most one of the two has anything in it
    std::deque<Request> requests;
  };

  template <class Do>
  void for_tag(int tag, Do action) {
    for (auto entry = lanes_.begin(); entry != lanes_.end();) {
      Lane& lane = entry->second;
      if (entry->first.second == tag) action(entry->first.first, lane);
      entry = lane.requests.empty() && lane.arrivals.empty() ? lanes_.erase(entry) : std::next(entry);
    }
  }

  std::optional<Match> match(int peer, int tag, Lane& lane) {
    if (lane.arrivals.empty() || lane.requests.empty()) return std::nullopt;
    Match match{std::move(lane.arrivals.front()), std::move(lane.requests.front())};
    lane.arrivals.pop_front();
    lane.requests.pop_front();
    --request_count_;
    if (lane.arrivals.empty() && lane.requests.empty()) lanes_.erase({peer, tag});
    return match;
  }

  std::map<std::pair<int, int>, Lane> lanes_;
  std::size_t request_count_ = 0;
};

}  // namespace hvd_backup
