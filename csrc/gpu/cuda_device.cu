// The queue is one stream, copies beside it are another; points in streams are events, which are used again and again.
#include "gpu/cuda_device.h"

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "device/shared_blocks.h"
#include "gpu/cuda_handle.h"
#include "gpu/kernels.h"

namespace hvd_backup::gpu {

namespace {

// Events of one device that nobody waits for any more. From any thread, with the device as the current one.
class EventPool {
 public:
  Event take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return {};
    Event event = std::move(free_.back());
    free_.pop_back();
    return event;
  }
  void give_back(Event event) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(event));
  }

 private:
  std::mutex mutex_;
  std::vector<Event> free_;
};

// Where the host reads norms. All of one stream: what is given back before it was written, is written before it is used
// again. From any thread.
class NormsPool {
 public:
  NormsPool() { take_more(); }  // now, while the GPU has nothing to do that this could wait for

  SquaredNorms* take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) take_more();
    SquaredNorms* norms = free_.back();
    free_.pop_back();
    return norms;
  }
  void give_back(SquaredNorms* norms) {
    const std::lock_guard lock(mutex_);
    free_.push_back(norms);
  }

 private:
  static constexpr std::size_t at_once = 1024;  // more buckets than there usually are

  void take_more() {
    memory_.emplace_back(at_once);
    for (SquaredNorms& norms : memory_.back().get()) free_.push_back(&norms);
  }

  std::mutex mutex_;
  std::vector<HostMemory<SquaredNorms>> memory_;
  std::vector<SquaredNorms*> free_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int device, std::shared_ptr<const Nccl> nccl)
      : device_(device), nccl_(std::move(nccl)), pool_(device, stream_.get()), scratch_(pool_), norms_(pool_) {}

  Ready record(void* stream) override {
    const OnDevice here(device_);
    Event event = recorded(static_cast<cudaStream_t>(stream));
    // Who waits does so for what has been recorded by then: the event can be used again at once.
    const auto give_back = [pool = events_](Event* used) {
      pool->give_back(std::move(*used));
      delete used;
    };
    return std::shared_ptr<Event>(new Event(std::move(event)), give_back);
  }

  void wait_for(const Ready& ready) override {
    const OnDevice here(device_);
    const auto& event = *static_cast<const Event*>(ready.get());
    check(cudaStreamWaitEvent(stream_.get(), event.get(), 0), "waiting for a stream");
  }

  void copy(void* to, const void* from, std::size_t bytes) override {
    const OnDevice here(device_);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_.get()), "copying");
  }

  void copy_beside(void* to, const void* from, std::size_t bytes) override {
    const OnDevice here(device_);
    Event now = recorded(stream_.get());
    check(cudaStreamWaitEvent(beside_.get(), now.get(), 0), "waiting for the queue");
    events_->give_back(std::move(now));
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, beside_.get()), "copying beside the queue");
    has_copied_beside_ = true;
  }

  Norms sum(DataType dtype, void* destination, std::span<const void* const> sources, std::span<const double> weights,
            double scale, std::size_t count, bool measured) override {
    const OnDevice here(device_);
    auto* norms = measured ? static_cast<SquaredNorms*>(norms_.at_least(sizeof(SquaredNorms))) : nullptr;
    gpu::sum(dtype, destination, sources, weights, scale, count, Stream{device_, stream_.get()}, norms);
    if (!measured) return nullptr;
    const auto give_back = [pool = norms_pool_](SquaredNorms* used) { pool->give_back(used); };
    const std::shared_ptr<SquaredNorms> copied(norms_pool_->take(), give_back);
    copy(copied.get(), norms, sizeof *norms);
    return copied;
  }

  std::byte* scratch(std::size_t bytes) override {
    const OnDevice here(device_);
    return static_cast<std::byte*>(scratch_.at_least(bytes));
  }

  std::shared_ptr<std::byte> memory(std::size_t bytes) override { return blocks_->take(bytes); }

  std::shared_ptr<std::byte> queue_memory(std::size_t bytes) override {
    const OnDevice here(device_);
    return stream_memory(device_, pool_, bytes);
  }

  std::shared_ptr<std::byte> host_memory(std::size_t bytes, bool may_wait) override {
    return may_wait ? host_blocks_->take(bytes) : host_blocks_->take_again(bytes);
  }

  void read(void* to, const void* from, std::size_t bytes) override {
    const OnDevice here(device_);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, reads_.get()), "reading");
    check(cudaEventRecord(read_.get(), reads_.get()), "marking the end of a copy");
  }
  bool has_read() override {
    const OnDevice here(device_);
    return has_ended(read_);
  }

  void as_current(const std::function<void()>& body) override {
    const OnDevice here(device_);
    body();
  }

  Mark mark() override {
    const OnDevice here(device_);
    marks_.push_back(recorded(stream_.get()));
    // Once: later marks are reached after this one.
    if (std::exchange(has_copied_beside_, false)) marks_.push_back(recorded(beside_.get()));
    return reached_ + marks_.size();
  }

  bool reached(Mark mark) override {
    const OnDevice here(device_);
    while (reached_ < mark && !marks_.empty() && has_ended(marks_.front())) {
      events_->give_back(std::move(marks_.front()));
      marks_.pop_front();
      ++reached_;
    }
    return reached_ >= mark;
  }

  std::string why_no_groups() const override { return nccl_->why_not(); }
  std::string new_group() override {
    const OnDevice here(device_);
    return nccl_->new_group();
  }
  std::unique_ptr<DeviceGroup> join(const std::string& group, int member, int members) override {
    const OnDevice here(device_);
    return nccl_->join(group, member, members, stream_.get());
  }

 private:
  Event recorded(cudaStream_t stream) {
    Event event = events_->take();
    check(cudaEventRecord(event.get(), stream), "marking a point in a stream");
    return event;
  }

  static bool has_ended(const Event& event) {
    const cudaError_t status = cudaEventQuery(event.get());
    if (status == cudaErrorNotReady) {
      cudaGetLastError();  // or the next launch would be blamed for it
      return false;
    }
    check(status, "running what was put into the queue");
    return true;
  }

  const int device_;
  const std::shared_ptr<const Nccl> nccl_;
  OwnStream stream_;
  StreamPool pool_;
  StreamMemory scratch_;
  StreamMemory norms_;  // of the one sum that is at work
  const std::shared_ptr<SharedBlocks> blocks_ =
      std::make_shared<SharedBlocks>([device = device_](std::size_t bytes) { return shareable_memory(device, bytes); });
  const std::shared_ptr<SharedBlocks> host_blocks_ = std::make_shared<SharedBlocks>(
      [device = device_](std::size_t bytes) { return page_locked_memory(device, bytes); });
  OwnStream beside_;
  bool has_copied_beside_ = false;  // since the last mark
  OwnStream reads_;
  Event read_;  // the last one has ended
  const std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>();
  const std::shared_ptr<NormsPool> norms_pool_ = std::make_shared<NormsPool>();
  std::deque<Event> marks_;  // those that are not known to be reached
  Mark reached_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int device, std::shared_ptr<const Nccl> nccl) {
  const OnDevice here(device);
  load_all();
  return std::make_unique<CudaDevice>(device, std::move(nccl));
}

std::shared_ptr<std::byte> page_locked_memory(int device, std::size_t bytes) {
  const OnDevice here(device);
  const auto memory = std::make_shared<HostMemory<std::byte>>(bytes);
  return {memory, memory->get().data()};
}

}  // namespace hvd_backup::gpu
