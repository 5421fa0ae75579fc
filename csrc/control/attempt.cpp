#include "control/attempt.h"

#include <algorithm>

namespace hvd_backup {

void TransferTime::measured(TimeUs took_us) {
  if (mean_us_ < 0) {
    mean_us_ = took_us;
    deviation_us_ = took_us / 2;
    return;
  }
  const TimeUs off_us = std::max(took_us, mean_us_) - std::min(took_us, mean_us_);
  deviation_us_ += (off_us - deviation_us_) / 4;
  mean_us_ += (took_us - mean_us_) / 8;
}

TimeUs TransferTime::patience_us() const {
  return mean_us_ < 0 ? first_patience_us : std::max(least_patience_us, mean_us_ + 4 * deviation_us_);
}

Attempt::Attempt(const Ranks& contributors, TimeUs now, TimeUs patience_us)
    : contributors_(contributors), began_(now), patience_us_(patience_us) {}

bool Attempt::done(int rank, bool kept, TimeUs now) {
  if (!std::binary_search(contributors_.begin(), contributors_.end(), rank)) return false;
  if (kept) kept_.insert(rank);
  return done_.emplace(rank, now).second;
}

void Attempt::answered(int rank, const Progress& progress, TimeUs now) {
  const auto asked = asked_.find(rank);
  if (asked == asked_.end()) return;
  asked->second.answered_at = now;
  asked->second.answer = progress;
}

// As in engine/journal.h: contributor i keeps shard i and its neighbour's, shard i-1.
bool Attempt::each_shard_has_keeper(const std::function<bool(int rank)>& keeps) const {
  const std::size_t k = contributors_.size();
  const auto is_there = [&](int rank) { return !lost_.contains(rank) && keeps(rank); };
  if (!whole_keepers_.empty()) return std::any_of(whole_keepers_.begin(), whole_keepers_.end(), is_there);
  for (std::size_t shard = 0; shard < k; ++shard) {
    if (!is_there(contributors_[shard]) && !is_there(contributors_[(shard + 1) % k])) return false;
  }
  return true;
}

void Attempt::keep_whole() {
  whole_keepers_.clear();
  for (const auto& [rank, since] : done_) whole_keepers_.push_back(rank);
}

bool Attempt::kept_by_all() const {
  return std::all_of(contributors_.begin(), contributors_.end(),
                     [this](int rank) { return kept_.contains(rank) || lost_.contains(rank); }) &&
         kept();
}

bool Attempt::kept() const {
  return each_shard_has_keeper([this](int rank) { return kept_.contains(rank); });
}

bool Attempt::complete_without(const Ranks& suspects, int holders) const {
  const auto suspected = [&](int rank) { return std::binary_search(suspects.begin(), suspects.end(), rank); };
  return std::all_of(contributors_.begin(), contributors_.end(),
                     [&](int rank) { return has(rank) || suspected(rank); }) &&
         static_cast<int>(done_.size()) >= holders && each_shard_has_keeper([&](int rank) { return has(rank); });
}

Ranks Attempt::ask(TimeUs now) {
  Ranks asked;
  if (now < overdue_at()) return asked;
  for (const int rank : contributors_) {
    if (has(rank)) continue;
    const auto before = asked_.find(rank);
    const bool answered = before != asked_.end() && before->second.answered_at;
    if (before != asked_.end() && (!answered || now - before->second.at < patience_us_)) continue;
    asked_[rank] = {now, std::nullopt, {}};
    asked.push_back(rank);
  }
  return asked;
}

Suspicion Attempt::suspicion(TimeUs now) const {
  if (complete()) return {};
  Ranks dead;
  for (const int rank : contributors_) {
    if (lost_.contains(rank) && !has(rank)) dead.push_back(rank);
  }
  if (!dead.empty()) return suspected(dead, "has died", now);
  if (now < overdue_at()) return {{}, {}, overdue_at()};
  Ranks silent, slow;
  std::map<int, int> owing, owing_results;  // how many ranks miss something of whom
  TimeUs look_again = now + patience_us_;   // the next question
  for (const auto& [rank, question] : asked_) {
    if (has(rank)) continue;
    if (!question.answered_at) {
      if (now - question.at < answer_us) return {{}, {}, question.at + answer_us};
      silent.push_back(rank);
      continue;
    }
    look_again = std::min(look_again, std::max(now, question.at + patience_us_));
    if (question.answer.unsubmitted > 0) slow.push_back(rank);
    for (const int other : question.answer.contributions_missing) ++owing[other];
    for (const int other : question.answer.results_missing) ++owing_results[other];
  }
  Suspicion found;
  if (!silent.empty()) {
    found = suspected(silent, "does not answer", now);
    found.stopped = true;
  } else if (!slow.empty()) {
    found = suspected(slow, "is still computing its gradient", now);
  } else if (const auto& most_owing = owing.empty() ? owing_results : owing; !most_owing.empty()) {
    const auto most = std::max_element(most_owing.begin(), most_owing.end(),
                                       [](const auto& a, const auto& b) { return a.second <= b.second; });
    found = suspected({most->first}, "answers, but its data do not arrive", now);
  }
  found.look_again = std::max(look_again, now + 1000);
  return found;
}

Suspicion Attempt::suspected(Ranks ranks, const std::string& why, TimeUs now) const {
  std::string who;
  for (const int rank : ranks) who += (who.empty() ? "" : ", ") + std::to_string(rank);
  const std::string expected =
      now < overdue_at() ? "" : ", " + std::to_string(patience_us_ / 1000) + " ms were expected at most";
  return {std::move(ranks),
          "rank " + who + " " + why + " (" + std::to_string((now - began_) / 1000) + " ms after the decision" +
              expected + ")",
          {}};
}

}  // namespace hvd_backup
