// One GPU as the engine uses it: one queue of work of our own (a stream), copies beside it, and groups of ranks whose
// GPUs exchange data without the host (an NCCL communicator). The GPU library implements it with CUDA; the tests with
// host memory.
//
// Threads: record() from any; all else from the one that has the engine's turn. Nothing here blocks but abort(), and
// host_memory() if it may. What goes wrong is a RuntimeFailure; in a group it is the group's state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/data_type.h"
#include "base/squared_norms.h"

namespace hvd_backup {

// Ranks that can exchange data, numbered from 0 within the group. All of them must ask for the same exchanges, each for
// its part of them, in one order.
class DeviceGroup {
 public:
  enum class State {
    busy,   // it is being formed, or the last exchange is being put into the queue
    ready,  // exchange() may be called
    failed  // for good: see reason()
  };

  struct Part {
    int peer = 0;
    std::byte* data = nullptr;  // on the GPU; of a send only read
    std::size_t bytes = 0;
    bool is_send = false;
  };

  virtual ~DeviceGroup() = default;  // ends it, as abort() does, unless it has ended

  virtual State state() = 0;
  virtual std::string reason() const = 0;

  // Puts one exchange into the queue: it begins when all work before has ended, and has ended when all parts have. Only
  // when ready; what follows may be put into the queue when the group is ready again. At least one part, none towards
  // this rank itself, at most one send and one receive for each peer.
  virtual void exchange(std::span<const Part> parts) = 0;

  // Exchanges that have not ended, end without having done their work, and the group has failed. Returns once what it
  // has put into the queue does not touch anything any more: not before what comes before that in the queue has ended.
  // So of several groups with exchanges that will not end, the one that comes first in the queue is aborted first.
  virtual void abort() = 0;
};

class Device {
 public:
  using Ready = std::shared_ptr<const void>;  // a point in the caller's stream
  using Mark = std::uint64_t;                 // a point in the queue, and in the copies beside it
  // In host memory; to be read once a mark that was put behind the sum is reached. From any thread it may be let go, at
  // any time, also unread.
  using Norms = std::shared_ptr<const SquaredNorms>;

  virtual ~Device() = default;

  // What the caller has begun on this stream until now.
  virtual Ready record(void* stream) = 0;

  // What is put into the queue from now on begins when that has ended.
  virtual void wait_for(const Ready& ready) = 0;

  // Between host memory and the GPU's, or within it.
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;

  // The same, to host_memory(), after what is in the queue by now, but beside what comes after that, which so does not
  // wait for the way to the host.
  virtual void copy_beside(void* to, const void* from, std::size_t bytes) = 0;

  // As in kernels/weighted_sum.h, to the same bits. Floating point only. Null unless `measured`.
  virtual Norms sum(DataType dtype, void* destination, std::span<const void* const> sources,
                    std::span<const double> weights, double scale, std::size_t count, bool measured) = 0;

  // At least so many bytes on the GPU; RuntimeFailure if there are not. There is one such block: it is valid until the
  // next call, and work that is put into the queue after this call may use it (whatever used it before comes first).
  virtual std::byte* scratch(std::size_t bytes) = 0;

  // At least so many bytes on the GPU, of which any library may be told (scratch() may be memory that only the queue
  // knows). Work that is in the queue already may still use them: touch them in the queue's order, or, from outside of
  // it, once a mark that was made after this call has been reached. May be given back after the device has gone, but by
  // whoever has the engine's turn.
  virtual std::shared_ptr<std::byte> memory(std::size_t bytes) = 0;

  // The same, but for the queue alone and in its order, and neither taking nor giving back waits for anything. It must
  // not outlive the device. Null: there is no memory left.
  virtual std::shared_ptr<std::byte> queue_memory(std::size_t bytes) = 0;

  // At least so many bytes of host memory to and from which copies go without the host (page-locked). To take more than
  // there was may wait for all that is in the queue: unless `may_wait`, null is given instead. RuntimeFailure if there
  // is no more. The rest as memory().
  virtual std::shared_ptr<std::byte> host_memory(std::size_t bytes, bool may_wait) = 0;

  // Waits for nothing in the queue: begins a copy from the GPU, of what is there by now, to host_memory(). One at a
  // time.
  virtual void read(void* to, const void* from, std::size_t bytes) = 0;
  virtual bool has_read() = 0;  // the last one has ended

  // Runs this with the GPU as the calling thread's current one, as other libraries need it that are told of its memory.
  virtual void as_current(const std::function<void()>& body) = 0;

  // Of all that was begun by now.
  virtual Mark mark() = 0;
  virtual bool reached(Mark mark) = 0;

  // Why this rank cannot be in a group; empty: it can.
  virtual std::string why_no_groups() const = 0;
  // Names a new group: one rank asks, and all members give it to join().
  virtual std::string new_group() = 0;
  virtual std::unique_ptr<DeviceGroup> join(const std::string& group, int member, int members) = 0;
};

}  // namespace hvd_backup
