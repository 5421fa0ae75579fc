#include "control/state_offers.h"

namespace hvd_backup {

int StateOffers::held_by(int server) const {
  return static_cast<int>(std::count_if(offers_.begin(), offers_.end(),
                                        [server](const StateOffer& offer) { return offer.server == server; }));
}

void StateOffers::died(int server) {
  asked_.erase(server);
  std::erase_if(offers_, [&](const StateOffer& offer) {
    if (offer.server != server) return false;
    for (const int taker : offer.takers) lost(taker, server, offer.step);
    return true;
  });
}

TimeUs StateOffers::offered(int server, Step step, std::int64_t bytes, TimeUs now) {
  const auto question = asked_.find(server);
  const TimeUs took = question == asked_.end() ? -1 : now - question->second;
  asked_.erase(server);
  const bool is_known = std::any_of(offers_.begin(), offers_.end(), [&](const StateOffer& offer) {
    return offer.server == server && offer.step == step;
  });
  if (!is_known) offers_.push_back({server, step, bytes, {}});
  return took;
}

std::optional<StateOffer> StateOffers::take_oldest(int server) {
  if (held_by(server) < most_of_a_server) return std::nullopt;
  const auto oldest = std::find_if(offers_.begin(), offers_.end(),
                                   [server](const StateOffer& offer) { return offer.server == server; });
  StateOffer taken = std::move(*oldest);
  offers_.erase(oldest);
  return taken;
}

std::vector<StateOffer> StateOffers::take_unneeded(Step from, bool wanted) {
  const auto begin = std::stable_partition(offers_.begin(), offers_.end(), [&](const StateOffer& offer) {
    return !offer.takers.empty() || (wanted && offer.step >= from);
  });
  std::vector<StateOffer> unneeded(begin, offers_.end());
  offers_.erase(begin, offers_.end());
  return unneeded;
}

const StateOffer* StateOffers::find(int taker, Step from) const {
  const auto known = takers_.find(taker);
  const StateOffer* best = nullptr;
  for (const StateOffer& offer : offers_) {
    if (offer.server == taker || offer.step < from) continue;
    if (known != takers_.end() && known->second.given.contains({offer.server, offer.step})) continue;
    if (best == nullptr || offer.step > best->step) best = &offer;
  }
  return best;
}

void StateOffers::give(int taker, Step had, const StateOffer& offer) {
  Taker& state = takers_[taker];
  state.had = had;
  state.given.insert({offer.server, offer.step});
  state.wants_another = false;
  for (StateOffer& each : offers_) {
    if (each.server == offer.server && each.step == offer.step) each.takers.insert(taker);
  }
}

void StateOffers::lost(int taker, int server, Step step) {
  const auto known = takers_.find(taker);
  if (known != takers_.end() && known->second.given.contains({server, step})) known->second.wants_another = true;
}

bool StateOffers::wants_another(int taker) const {
  const auto known = takers_.find(taker);
  return known != takers_.end() && known->second.wants_another;
}

bool StateOffers::is_taking(int taker) const {
  return std::any_of(offers_.begin(), offers_.end(),
                     [taker](const StateOffer& offer) { return offer.takers.contains(taker); });
}

bool StateOffers::has_given(int server, int taker) const {
  const auto known = takers_.find(taker);
  return known != takers_.end() && std::any_of(known->second.given.begin(), known->second.given.end(),
                                               [server](const auto& given) { return given.first == server; });
}

int StateOffers::taken(int taker, Step have) {
  const auto known = takers_.find(taker);
  if (known == takers_.end()) return -1;
  int from = -1;
  for (const auto& [server, step] : known->second.given) {
    if (step == have) from = server;
  }
  for (StateOffer& offer : offers_) offer.takers.erase(taker);
  takers_.erase(known);
  return from;
}

}  // namespace hvd_backup
