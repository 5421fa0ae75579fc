// What the engine does on a GPU: reductions in groups (collective/device_allreduce.h), one after the other in the order
// of their decisions, which is the same on all ranks; and reductions through host memory, where there is no group. Used
// with the engine's turn.
//
// The queue of the GPU has one order. So what is given up may be in the way of everything after it, until its group is
// aborted: drain() does so. A group that fails here is aborted at once, and the coordinator told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "collective/allreduce.h"
#include "collective/device_allreduce.h"
#include "control/messages.h"
#include "device/device.h"
#include "engine/journal.h"

namespace hvd_backup {

class DeviceWork {
 public:
  // device: must outlive this. group_transport: what groups exchange data through, until end(); null: by NCCL.
  // journal_on_device: what is kept for late ranks stays on the GPU; otherwise it goes to page-locked host memory.
  DeviceWork(Device& device, Transport* group_transport, bool journal_on_device, int rank);
  ~DeviceWork();

  Device& device() { return device_; }

  // Transport::progress(), which may touch the GPU's memory.
  bool progress_of(Transport& transport);
  // Leaves all groups, and the transport alone.
  void end();

  void form(const Form& message);
  void disband(GroupId group);
  // Of groups that have been formed, or have failed, since the last call.
  std::vector<Formed> take_answers() { return std::exchange(answers_, {}); }

  // A reduction in a group will be started with this tag: what comes after it in the group waits for it.
  void announce(GroupId group, Tag tag);
  // ranks: the contributors, from which members and self of the options are made. on_done: as of start_allreduce.
  std::shared_ptr<RunningAllreduce> start_in_group(GroupId group, Tag tag, const std::vector<int>& ranks,
                                                   DeviceAllreduceOptions options, Device::Ready ready, OnDone on_done);
  // Contribution and result of the options lie in host memory; those given besides on the GPU.
  std::shared_ptr<RunningAllreduce> start_through_host(Transport& transport, AllreduceOptions options,
                                                       const void* contribution, void* result, Device::Ready ready,
                                                       OnDone on_done);
  // Where a reduction in a group puts what is kept of it, see DeviceAllreduceOptions::kept. None: there is no memory
  // that could be had without waiting for the GPU, which may wait for another rank.
  Journal::Block place_for(std::size_t bytes);
  // What lies on the GPU, for whoever has no access to it: on_read(data) in a later progress().
  using OnRead = std::function<void(std::shared_ptr<const std::vector<std::byte>> data)>;
  void read(Journal::Block block, OnRead on_read);

  // Blocks until the copy has ended.
  void copy_now(void* to, const void* from, std::size_t bytes);

  // Goes on with what can go on; whether anything has.
  bool progress();
  std::size_t pending() const { return in_groups_.size() + through_host_.size() + reads_.size(); }

 private:
  class InGroup;
  class ThroughHost;
  struct Group {
    std::unique_ptr<DeviceGroup> group;
    std::vector<int> members;  // ranks
    bool formed = false;
    bool failed = false;
  };

  // Of all groups, in one order: two GPUs that begin with those of different groups would wait for each other.
  struct Announced {
    GroupId group = 0;
    std::shared_ptr<InGroup> op;  // null until it is started
  };

  // Goes through `staging_` a piece at a time.
  struct Read {
    Journal::Block block;
    OnRead on_read;
    std::shared_ptr<std::vector<std::byte>> data;
    std::size_t begun = 0;  // bytes
    std::size_t ended = 0;
  };

  void abort(GroupId id, const std::string& reason);
  void fail(GroupId id, const std::string& reason);
  bool look_after(GroupId id, Group& group);
  bool put_into_queue();
  void drain();
  bool go_on_reading();

  Device& device_;
  Transport* const group_transport_;
  const bool journal_on_device_;
  const int rank_;
  std::map<GroupId, Group> groups_;
  std::map<Tag, Announced> announced_;             // and not issued
  std::list<std::shared_ptr<InGroup>> in_groups_;  // not complete
  std::list<std::shared_ptr<ThroughHost>> through_host_;
  std::deque<Read> reads_;
  std::shared_ptr<std::byte> staging_;  // of reads; null: there are none
  std::vector<Formed> answers_;
  std::uint64_t begun_ = 0;
};

}  // namespace hvd_backup
