// A group of ranks whose GPUs exchange data through a transport that takes GPU memory (CUDA-aware MPI), where NCCL
// cannot be used. There is nothing to connect: it is ready at once.
//
// The transport knows nothing of the queue. So an exchange is copied, in the queue, to memory of its own; when that has
// been reached the transport sends and receives; when all has arrived it is copied, in the queue, to where it belongs.
// The memory belongs to the exchange, which the callbacks of its transfers own: when the group is aborted, and a peer
// has stopped, it stays until the transport has done with it, and what is the caller's is left alone at once.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "transport/transport.h"

namespace hvd_backup {

class TransportGroup final : public DeviceGroup {
 public:
  // Both must outlive the group, the transport until abort(). tag: of this group alone, the same on all its members.
  // members: their ranks.
  TransportGroup(Device& device, Transport& transport, Tag tag, std::vector<int> members);
  ~TransportGroup() override { abort(); }
  TransportGroup(const TransportGroup&) = delete;
  TransportGroup& operator=(const TransportGroup&) = delete;

  State state() override;
  std::string reason() const override { return reason_; }
  void exchange(std::span<const Part> parts) override;
  void abort() override;

 private:
  struct Exchange {
    std::vector<Part> parts;
    std::vector<std::byte*> places;  // in its memory, by part
    std::shared_ptr<std::byte> memory;
    Device::Mark copied = 0;
    std::size_t left = 0;  // transfers that have not ended
  };

  void copy_sent(std::span<const Part> parts);
  void start_transfers();
  void copy_received();
  void fail(std::string reason);

  Device& device_;
  Transport& transport_;
  const Tag tag_;
  const std::vector<int> members_;
  std::shared_ptr<Exchange> exchange_;  // null: none is going on
  bool transferring_ = false;
  bool failed_ = false;
  bool aborted_ = false;
  std::string reason_;
};

}  // namespace hvd_backup
