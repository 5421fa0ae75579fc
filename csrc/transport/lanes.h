// Matches what arrives with what is wanted: a lane is (peer, tag), and in each lane the n-th arrival belongs to the
// n-th request, whichever comes first.
#pragma once

#include <cstddef>
#include <deque>
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

  // Requests that nothing has arrived for.
  std::size_t request_count() const { return request_count_; }

 private:
  struct Lane {
    std::deque<Arrival> arrivals;  // at most one of the two has anything in it
    std::deque<Request> requests;
  };

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
