// Which ranks' GPUs exchange data directly, without the host (device/device.h), by NCCL or by CUDA-aware MPI: a group
// is formed of all ranks that can, by the means of the lowest of them, while they train, and serves the decisions whose
// contributors are all in it. Everything else goes through host memory, to the same bits, so nobody ever waits for a
// group.
//
// A group dies as a whole: when one of its contributors has stopped, and the others go on without it, nothing of what
// they do in the group ends. Then it is broken up, the attempts that it served are begun anew without it, and a new one
// is formed of those that are left; of all again, when the one that had stopped is back. Pure.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "control/messages.h"

namespace hvd_backup {

// What ranks need to form a new group by NCCL.
struct GroupName {
  std::string name;     // opaque
  std::string failure;  // why there is none; empty: there is
};
using NameGroup = std::function<GroupName()>;

class DeviceGroups {
 public:
  static constexpr TimeUs forming_us = 60'000'000;  // thousands of GPUs take tens of seconds
  static constexpr TimeUs rest_us = 5'000'000;      // after one was broken up, until the next is formed
  static constexpr int most_failures = 3;           // besides those that a dead rank explains

  explicit DeviceGroups(int size) : size_(size) {}

  void set_name_group(NameGroup name) { name_group_ = std::move(name); }

  void receive(int from, const CanGroup& message, TimeUs now);
  void receive(int from, const Formed& message, TimeUs now);
  void lost(int rank, TimeUs now);
  // The others go on without this rank, which had been contributing; and: it has arrived again.
  void stopped(int rank, TimeUs now);
  void back(int rank, TimeUs now);
  // What it was to do will not end: without one of its members; or nobody knows why.
  void broken(GroupId group, TimeUs now);
  void hangs(GroupId group, TimeUs now);

  void tick(TimeUs now);
  std::optional<TimeUs> next_deadline() const;

  // The group that serves these contributors; 0: none does.
  GroupId serving(const Ranks& contributors) const;

  // Groups that have been broken up since the last call: their attempts are to be begun anew.
  std::vector<GroupId> take_broken() { return std::exchange(broken_, {}); }
  // Groups in whose place a larger one has come, and that go when nothing that they serve goes on any more.
  const std::set<GroupId>& retired() const { return retired_; }
  void dismiss(GroupId group);

  std::vector<std::pair<int, Message>> take_replies() { return std::exchange(replies_, {}); }
  // In words, for people.
  std::vector<std::string> take_news() { return std::exchange(news_, {}); }

 private:
  struct Group {
    GroupId id = 0;
    Ranks members;
    std::set<int> formed;
    TimeUs since = 0;
  };

  Ranks able() const;
  Ranks wanted() const;
  const std::string& means_of(const Ranks& members) const;
  bool is_settled() const;
  void settle(TimeUs now);
  void break_up(GroupId group, TimeUs now);
  void tell(const Ranks& members, const Message& message);

  const int size_;
  NameGroup name_group_;
  std::map<int, CanGroup> answers_;  // by rank
  std::set<int> lost_, stopped_;
  std::map<GroupId, Ranks> members_;  // of all groups that have not been broken up
  std::optional<Group> forming_;
  std::optional<Group> active_;
  std::set<GroupId> retired_;
  std::vector<GroupId> broken_;
  GroupId last_ = 0;
  TimeUs not_before_ = 0;  // the next is formed
  int failures_ = 0;
  bool told_why_not_ = false;
  std::vector<std::pair<int, Message>> replies_;
  std::vector<std::string> news_;
};

}  // namespace hvd_backup
