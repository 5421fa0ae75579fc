#include "engine/device_work.h"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "base/error.h"
#include "collective/transport_group.h"

namespace hvd_backup {

namespace {
constexpr std::size_t staging_bytes = 1 << 20;  // much longer on its way than it takes to begin the next one
}

// In a group. When that fails it never completes: the coordinator begins another attempt.
class DeviceWork::InGroup final : public RunningAllreduce {
 public:
  InGroup(DeviceWork& work, GroupId group, OnDone on_done) : work_(work), id(group), on_done(std::move(on_done)) {}

  Missing missing() const override { return {}; }  // nobody knows whom the GPUs wait for
  void abandon() override {
    if (over) return;
    over = true;
    if (begun == 0) return;
    work_.abort(id, "rank " + std::to_string(work_.rank_) + " gives up what it had begun");
    work_.drain();
  }

 private:
  DeviceWork& work_;

 public:
  const GroupId id;
  const OnDone on_done;
  std::optional<DeviceAllreduce> allreduce;  // none: the group was gone before
  std::uint64_t begun = 0;                   // something of it is in the queue: after that of smaller numbers
  bool over = false;                         // complete, or given up
};

// To host memory, among the hosts, and back.
class DeviceWork::ThroughHost final : public RunningAllreduce, public std::enable_shared_from_this<ThroughHost> {
 public:
  ThroughHost(DeviceWork& work, Transport& transport, AllreduceOptions options, void* result, OnDone on_done)
      : work_(work),
        transport_(transport),
        options_(std::move(options)),
        result_(result),
        bytes_(options_.count * size_of(options_.dtype)),
        on_done_(std::move(on_done)) {}

  void start(const void* contribution, const Device::Ready& ready) {
    Device& device = work_.device_;
    device.wait_for(ready);
    device.copy(const_cast<void*>(options_.contribution), contribution, bytes_);
    copied_ = device.mark();
  }

  // Whether anything has happened.
  bool go_on() {
    if (!copied_ || !work_.device_.reached(*copied_)) return false;
    copied_.reset();
    if (ended_) {
      complete_ = true;
      return true;
    }
    running_ = start_allreduce(transport_, options_, [weak = weak_from_this()] {  // it is owned by what it owns
      if (const auto self = weak.lock()) self->copy_back();
    });
    return true;
  }
  bool complete() const { return complete_; }
  bool over() const { return over_; }
  const OnDone& on_done() const { return on_done_; }

  Missing missing() const override { return running_ ? running_->missing() : Missing{}; }
  void abandon() override {
    over_ = true;
    if (running_ && !ended_) running_->abandon();
    if (copied_) work_.drain();
    copied_.reset();
  }

 private:
  void copy_back() {
    ended_ = true;
    work_.device_.copy(result_, options_.result, bytes_);
    copied_ = work_.device_.mark();
  }

  DeviceWork& work_;
  Transport& transport_;
  const AllreduceOptions options_;
  void* const result_;
  const std::size_t bytes_;
  const OnDone on_done_;
  std::optional<Device::Mark> copied_;  // the copy that goes on, has ended then
  std::shared_ptr<RunningAllreduce> running_;
  bool ended_ = false;
  bool complete_ = false;
  bool over_ = false;
};

DeviceWork::DeviceWork(Device& device, Transport* group_transport, bool journal_on_device, int rank)
    : device_(device), group_transport_(group_transport), journal_on_device_(journal_on_device), rank_(rank) {
  if (journal_on_device) staging_ = device.host_memory(staging_bytes, true);  // now, while the GPU waits for nobody
}
DeviceWork::~DeviceWork() = default;

bool DeviceWork::progress_of(Transport& transport) {
  if (group_transport_ == nullptr) return transport.progress();
  bool worked = false;
  device_.as_current([&] { worked = transport.progress(); });
  return worked;
}

void DeviceWork::end() {
  for (const auto& [id, group] : groups_) abort(id, "");
}

void DeviceWork::form(const Form& message) {
  Group& group = groups_[message.group];
  group.members.assign(message.members.begin(), message.members.end());
  const auto self = std::find(group.members.begin(), group.members.end(), rank_);
  try {
    if (group_transport_ != nullptr) {
      group.group = std::make_unique<TransportGroup>(device_, *group_transport_, message.group, group.members);
    } else {
      group.group = device_.join(message.name, static_cast<int>(self - group.members.begin()),
                                 static_cast<int>(group.members.size()));
    }
  } catch (const std::exception& error) {
    fail(message.group, error.what());
  }
}

void DeviceWork::disband(GroupId id) {
  abort(id, "");
  std::erase_if(answers_, [id](const Formed& answer) { return answer.group == id; });
  groups_.erase(id);
}

// NCCL waits in its abort for what the group has in the queue, and so for what comes before it: a group that may be
// stuck there is aborted first.
void DeviceWork::abort(GroupId id, const std::string& reason) {
  std::map<std::uint64_t, GroupId> at_work;
  for (const auto& op : in_groups_) {
    const bool is_there = op->begun > 0 && (op->id == id || (!op->over && !op->allreduce->complete()));
    if (is_there) at_work.emplace(op->begun, op->id);
  }
  for (const auto& [begun, other] : at_work) {
    if (other == id) break;
    fail(other, "rank " + std::to_string(rank_) + " gives up what had come before");
  }
  fail(id, reason);
}

// It stays, without doing anything, until the coordinator disbands it.
void DeviceWork::fail(GroupId id, const std::string& reason) {
  const auto found = groups_.find(id);
  if (found == groups_.end() || found->second.failed) return;
  Group& group = found->second;
  group.failed = true;
  std::erase_if(announced_, [id](const auto& each) { return each.second.group == id; });
  if (group.group) group.group->abort();
  for (const auto& op : in_groups_) {
    if (op->id != id || op->over) continue;
    op->over = true;
    while (op->allreduce->issued() && !op->allreduce->complete())
      sched_yield();  // copies, which nothing is in the way of
  }
  answers_.push_back(Formed{id, reason});
}

void DeviceWork::announce(GroupId id, Tag tag) {
  const auto found = groups_.find(id);
  if (found != groups_.end() && !found->second.failed) announced_.emplace(tag, Announced{id, nullptr});
}

std::shared_ptr<RunningAllreduce> DeviceWork::start_in_group(GroupId id, Tag tag, const std::vector<int>& ranks,
                                                             DeviceAllreduceOptions options, Device::Ready ready,
                                                             OnDone on_done) {
  auto op = std::make_shared<InGroup>(*this, id, std::move(on_done));
  const auto found = groups_.find(id);
  if (found == groups_.end() || found->second.failed) {
    op->over = true;
    return op;
  }
  Group& group = found->second;
  for (const int rank : ranks) {
    const auto member = std::lower_bound(group.members.begin(), group.members.end(), rank);
    if (rank == rank_) options.self = options.members.size();
    options.members.push_back(static_cast<int>(member - group.members.begin()));
  }
  op->allreduce.emplace(device_, *group.group, std::move(options), ready);
  announced_[tag] = {id, op};
  in_groups_.push_back(op);
  return op;
}

std::shared_ptr<RunningAllreduce> DeviceWork::start_through_host(Transport& transport, AllreduceOptions options,
                                                                 const void* contribution, void* result,
                                                                 Device::Ready ready, OnDone on_done) {
  auto op = std::make_shared<ThroughHost>(*this, transport, std::move(options), result, std::move(on_done));
  through_host_.push_back(op);
  op->start(contribution, ready);
  return op;
}

Journal::Block DeviceWork::place_for(std::size_t bytes) {
  if (journal_on_device_) {
    if (auto data = device_.queue_memory(bytes)) return {std::move(data), bytes, true};
  }
  const bool waits_for_nobody = in_groups_.empty();
  try {
    return {device_.host_memory(bytes, waits_for_nobody), bytes, false};
  } catch (const RuntimeFailure&) {  // no memory is left, most likely
    return {nullptr, bytes, false};
  }
}

void DeviceWork::read(Journal::Block block, OnRead on_read) {
  auto data = std::make_shared<std::vector<std::byte>>(block.bytes);
  reads_.push_back({std::move(block), std::move(on_read), std::move(data)});
}

// Whether anything has happened.
bool DeviceWork::go_on_reading() {
  if (reads_.empty()) return false;
  Read& first = reads_.front();
  const bool reading = first.begun > first.ended;
  if (reading && !device_.has_read()) return false;
  if (reading) {
    std::memcpy(first.data->data() + first.ended, staging_.get(), first.begun - first.ended);
    first.ended = first.begun;
  }
  if (first.ended < first.block.bytes) {
    const std::size_t piece = std::min(staging_bytes, first.block.bytes - first.ended);
    device_.read(staging_.get(), first.block.data.get() + first.ended, piece);
    first.begun += piece;
    return true;
  }
  const Read done = std::move(first);
  reads_.pop_front();
  done.on_read(done.data);
  return true;
}

void DeviceWork::copy_now(void* to, const void* from, std::size_t bytes) {
  device_.copy(to, from, bytes);
  drain();
}

// Waits until all that is in the queue has ended. Groups at work are aborted: they may wait for ranks that have
// stopped.
void DeviceWork::drain() {
  for (const auto& op : in_groups_) {
    if (!op->over && op->begun > 0 && !op->allreduce->complete()) {
      abort(op->id, "rank " + std::to_string(rank_) + " gives up what had come before");
    }
  }
  const Device::Mark end = device_.mark();
  while (!device_.reached(end)) sched_yield();
}

// Whether anything has happened.
bool DeviceWork::look_after(GroupId id, Group& group) {
  if (group.failed) return false;
  const DeviceGroup::State state = group.group->state();
  if (state == DeviceGroup::State::failed) {
    abort(id, group.group->reason());
    return true;
  }
  if (state == DeviceGroup::State::busy || std::exchange(group.formed, true)) return false;
  answers_.push_back(Formed{id, ""});
  return true;
}

// What comes first, as far as it can. Whether there was anything.
bool DeviceWork::put_into_queue() {
  bool worked = false;
  while (!announced_.empty()) {
    const auto first = announced_.begin();
    const std::shared_ptr<InGroup> op = first->second.op;
    if (!op) break;  // its bucket is not here yet
    if (!op->over) {
      try {
        if (!op->allreduce->go_on()) break;
      } catch (const RuntimeFailure& error) {  // no memory is left, most likely
        abort(op->id, error.what());
        continue;
      }
      worked = true;
      if (op->begun == 0) op->begun = ++begun_;
      if (!op->allreduce->issued()) break;  // its group is at work, and asked again next time
    }
    announced_.erase(first);
  }
  return worked;
}

bool DeviceWork::progress() {
  bool worked = false;
  for (auto& [id, group] : groups_) worked = look_after(id, group) || worked;
  worked = put_into_queue() || worked;
  std::vector<OnDone> done;
  std::erase_if(in_groups_, [&](const auto& op) {
    const bool complete = !op->over && op->allreduce->complete();
    if (complete) done.push_back(op->on_done);
    op->over = op->over || complete;
    return op->over;
  });
  std::erase_if(through_host_, [&](const auto& op) {
    if (!op->over()) worked = op->go_on() || worked;
    if (op->complete()) done.push_back(op->on_done());
    return op->over() || op->complete();
  });
  for (const OnDone& each : done) each();
  worked = go_on_reading() || worked;
  return worked || !done.empty();
}

}  // namespace hvd_backup
