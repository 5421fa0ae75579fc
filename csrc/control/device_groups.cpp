#include "control/device_groups.h"

#include <algorithm>
#include <string_view>

namespace hvd_backup {

namespace {

std::string in_words(const Ranks& ranks) {
  std::string words = ranks.size() == 1 ? "rank" : "ranks";
  for (std::size_t i = 0; i < ranks.size(); ++i) words += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
  return words;
}

constexpr std::string_view by_nccl = "nccl";

std::string in_words(const std::string& means) { return means == by_nccl ? "NCCL" : "CUDA-aware MPI"; }

}  // namespace

void DeviceGroups::receive(int from, const CanGroup& message, TimeUs now) {
  answers_[from] = message;
  settle(now);
}

void DeviceGroups::receive(int from, const Formed& message, TimeUs now) {
  if (!members_.contains(message.group)) return;  // broken up meanwhile
  if (!message.failure.empty()) {
    news_.push_back("rank " + std::to_string(from) + " has left the group of " + in_words(members_[message.group]) +
                    ", whose GPUs exchanged data directly: " + message.failure);
    ++failures_;
    break_up(message.group, now);
  } else if (forming_ && forming_->id == message.group) {
    forming_->formed.insert(from);
    if (forming_->formed.size() < forming_->members.size()) return;
    if (active_) retired_.insert(active_->id);
    active_ = std::exchange(forming_, std::nullopt);
    news_.push_back("the GPUs of " + in_words(active_->members) + " exchange data directly (" +
                    in_words(means_of(active_->members)) + ")");
  }
  settle(now);
}

void DeviceGroups::lost(int rank, TimeUs now) {
  lost_.insert(rank);
  failures_ = 0;
  for (const auto& [id, members] : std::map(members_)) {
    if (std::binary_search(members.begin(), members.end(), rank)) break_up(id, now);
  }
  settle(now);
}

void DeviceGroups::stopped(int rank, TimeUs now) {
  stopped_.insert(rank);
  if (forming_ && std::binary_search(forming_->members.begin(), forming_->members.end(), rank))
    break_up(forming_->id, now);
  settle(now);
}

void DeviceGroups::back(int rank, TimeUs now) {
  if (stopped_.erase(rank) > 0) settle(now);
}

void DeviceGroups::broken(GroupId group, TimeUs now) {
  break_up(group, now);
  settle(now);
}

void DeviceGroups::hangs(GroupId group, TimeUs now) {
  const auto found = members_.find(group);
  if (found == members_.end()) return;
  news_.push_back("the GPUs of " + in_words(found->second) + " wait for each other without end: their group is left");
  ++failures_;
  broken(group, now);
}

void DeviceGroups::dismiss(GroupId group) {
  retired_.erase(group);
  if (const auto found = members_.find(group); found != members_.end()) {
    tell(found->second, Disband{group});
    members_.erase(found);
  }
}

void DeviceGroups::break_up(GroupId group, TimeUs now) {
  if (!members_.contains(group)) return;
  if (forming_ && forming_->id == group) forming_.reset();
  if (active_ && active_->id == group) active_.reset();
  broken_.push_back(group);
  not_before_ = now + rest_us;
  dismiss(group);
}

void DeviceGroups::tick(TimeUs now) {
  if (forming_ && now - forming_->since >= forming_us) {
    for (const int rank : forming_->members) {
      if (!forming_->formed.contains(rank)) stopped_.insert(rank);
    }
    break_up(forming_->id, now);
  }
  settle(now);
}

std::optional<TimeUs> DeviceGroups::next_deadline() const {
  if (forming_) return forming_->since + forming_us;
  if (is_settled()) return std::nullopt;
  return not_before_;
}

GroupId DeviceGroups::serving(const Ranks& contributors) const {
  const bool serves =
      active_ && contributors.size() > 1 &&
      std::includes(active_->members.begin(), active_->members.end(), contributors.begin(), contributors.end());
  return serves ? active_->id : 0;
}

// Empty: not known yet, or none.
Ranks DeviceGroups::able() const {
  Ranks able;
  for (int rank = 0; rank < size_; ++rank) {
    if (lost_.contains(rank)) continue;
    const auto answer = answers_.find(rank);
    if (answer == answers_.end()) return {};
    if (answer->second.why_not.empty() && !stopped_.contains(rank)) able.push_back(rank);
  }
  return able;
}

const std::string& DeviceGroups::means_of(const Ranks& members) const { return answers_.at(members.front()).means; }

// Those that have the same means as the first of them. Empty: not known yet, or too few.
Ranks DeviceGroups::wanted() const {
  Ranks members = able();
  if (members.empty()) return {};
  const std::string means = means_of(members);
  if (means == by_nccl && !name_group_) return {};
  std::erase_if(members, [&](int rank) { return answers_.at(rank).means != means; });
  return members.size() > 1 ? members : Ranks{};
}

bool DeviceGroups::is_settled() const {
  const Ranks members = wanted();
  return failures_ >= most_failures || members.empty() || (active_ && active_->members == members);
}

void DeviceGroups::settle(TimeUs now) {
  for (const auto& [rank, answer] : answers_) {
    if (answer.why_not.empty() || told_why_not_) continue;
    news_.push_back("rank " + std::to_string(rank) + " cannot exchange data between GPUs directly: " + answer.why_not);
    told_why_not_ = true;
  }
  const Ranks can = able();
  for (const int rank : can) {
    if (told_why_not_ || answers_.at(rank).means == means_of(can)) continue;
    news_.push_back("rank " + std::to_string(rank) + " cannot exchange data between GPUs directly: it can by " +
                    in_words(answers_.at(rank).means) + ", rank " + std::to_string(can.front()) + " by " +
                    in_words(means_of(can)));
    told_why_not_ = true;
  }
  if (forming_ || is_settled() || now < not_before_) return;
  const Ranks members = wanted();
  const GroupName named = means_of(members) == by_nccl ? name_group_() : GroupName{};
  if (!named.failure.empty()) {
    news_.push_back("GPUs cannot exchange data directly: " + named.failure);
    failures_ = most_failures;
    return;
  }
  const GroupId id = ++last_;
  members_[id] = members;
  forming_ = Group{id, members, {}, now};
  tell(members, Form{id, members, named.name});
}

void DeviceGroups::tell(const Ranks& members, const Message& message) {
  for (const int rank : members) {
    if (!lost_.contains(rank)) replies_.emplace_back(rank, message);
  }
}

}  // namespace hvd_backup
