// A stand-in for a GPU (device/device.h): its memory is the host's, its queue runs late and a little at a time, and its
// groups exchange files in a folder, so that ranks may be threads or processes.
//
// Addresses on it may be given with the bit `disguise` set: whoever else uses them crashes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <mutex>
#include <random>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/gpu_arguments.h"
#include "bindings/testing.h"
#include "bindings/testing_group.h"
#include "collective/transport_group.h"
#include "device/device.h"
#include "device/shared_blocks.h"
#include "kernels/weighted_sum.h"
#include "transport/in_process.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_backup {

namespace {

using gpu::Address;
using gpu::pointer;

constexpr Address disguise = Address{1} << 62;

template <class T>
T* undisguised(T* address) {
  return reinterpret_cast<T*>(reinterpret_cast<Address>(address) & ~disguise);
}

// Work of the caller's, done in its order, each when somebody waits for it.
struct HostStream {
  std::mutex mutex;
  std::deque<std::function<void()>> work;
  std::uint64_t begun = 0, ended = 0;

  void write(Address to, const nb::bytes& data) {
    const std::scoped_lock lock(mutex);
    ++begun;
    work.push_back([to, data = std::string(data.c_str(), data.size())] {
      std::memcpy(undisguised(pointer<char>(to)), data.data(), data.size());
    });
  }
  void run_one() {
    const std::scoped_lock lock(mutex);
    if (work.empty()) return;
    work.front()();
    work.pop_front();
    ++ended;
  }
  void run_all() {
    while (ended < begun) run_one();
  }
};

struct Point {
  HostStream* stream;
  std::uint64_t position;
};

class HostDevice;

class HostGroup final : public DeviceGroup {
 public:
  HostGroup(HostDevice& device, std::string name, int member, int members);
  ~HostGroup() override { abort(); }
  State state() override;
  std::string reason() const override { return reason_; }
  void exchange(std::span<const Part> parts) override;
  void abort() override;

 private:
  struct Exchange {
    std::vector<Part> parts;
    std::vector<std::string> files;
    bool sent = false;
    bool aborted = false;
    bool go_on();
  };

  HostDevice& device_;
  const std::string name_;
  const int member_;
  const int members_;
  std::vector<int> sends_, receives_;  // so far, by peer
  std::vector<std::shared_ptr<Exchange>> at_work_;
  int busy_ = 3;  // for so many questions
  bool here_ = false;
  bool failed_ = false;
  std::string reason_;
};

class HostDevice final : public Device {
 public:
  HostDevice(std::string folder, unsigned seed, std::string why_no_groups)
      : folder_(std::move(folder)), why_no_groups_(std::move(why_no_groups)), random_(seed) {}

  Ready record(void* stream) override {
    auto* recorded = static_cast<HostStream*>(stream);
    if (recorded == nullptr) return nullptr;
    const std::scoped_lock lock(recorded->mutex);
    return std::make_shared<const Point>(Point{recorded, recorded->begun});
  }

  void wait_for(const Ready& ready) override {
    if (!ready) return;
    put([point = *static_cast<const Point*>(ready.get())] {
      if (point.stream->ended >= point.position) return true;
      point.stream->run_one();
      return false;
    });
  }

  void copy(void* to, const void* from, std::size_t bytes) override {
    ++copies;
    put([=] { return std::memcpy(undisguised(to), undisguised(from), bytes), true; });
  }

  void copy_beside(void* to, const void* from, std::size_t bytes) override {
    ++copies;
    ++beside;
    beside_.push_back({put_, [=] { std::memcpy(to, undisguised(from), bytes); }});
  }

  Norms sum(DataType dtype, void* destination, std::span<const void* const> sources, std::span<const double> weights,
            double scale, std::size_t count, bool measured) override {
    ++sums;
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();  // until it has run
    const auto norms = measured ? std::make_shared<SquaredNorms>(SquaredNorms{nan, nan}) : nullptr;
    std::vector<const void*> places;
    for (const void* source : sources) places.push_back(undisguised(source));
    put([=, weights = std::vector(weights.begin(), weights.end())] {
      if (norms) *norms = {};
      return weighted_sum(dtype, undisguised(destination), places, weights, scale, count, norms.get()), true;
    });
    return norms;
  }

  std::byte* scratch(std::size_t bytes) override {
    refuse_if_full();
    scratch_.push_back(std::make_unique<std::byte[]>(bytes));  // what was before may be in use still
    return scratch_.back().get();
  }

  // An exchange of a group that is not one of HostGroup takes memory once.
  std::shared_ptr<std::byte> memory(std::size_t bytes) override {
    ++exchanges;
    if (is_failing()) throw RuntimeFailure("told to fail");
    auto block = blocks_->take(bytes);
    std::byte* const data = block.get();
    ++*in_use;
    return {data, [block, in_use = in_use](std::byte*) mutable {
              block.reset();
              --*in_use;
            }};
  }
  std::shared_ptr<std::byte> queue_memory(std::size_t bytes) override {
    if (*in_queue_memory >= most_queue_memory) return nullptr;
    ++*in_queue_memory;
    auto* const data = new std::byte[bytes];
    return {pointer<std::byte>(reinterpret_cast<Address>(data) | disguise), [in_use = in_queue_memory](std::byte* it) {
              delete[] undisguised(it);
              --*in_use;
            }};
  }
  std::shared_ptr<std::byte> host_memory(std::size_t bytes, bool may_wait) override {
    if (may_wait) refuse_if_full();
    auto block = may_wait ? host_blocks_->take(bytes) : host_blocks_->take_again(bytes);
    if (block) ++host_places;
    return block;
  }
  void read(void* to, const void* from, std::size_t bytes) override {
    if (read_) throw RuntimeFailure("a second copy beside the queue before the first has ended");
    ++reads;
    read_ = [=] { std::memcpy(to, undisguised(from), bytes); };
  }
  bool has_read() override {
    if (!read_ || random_() % 4 > 0) return false;
    std::exchange(read_, nullptr)();
    return true;
  }

  void as_current(const std::function<void()>& body) override { body(); }

  Mark mark() override {
    marks_.push_back({put_, begun_beside()});
    return marks_.size();
  }
  bool reached(Mark mark) override {
    for (int n = static_cast<int>(random_() % 4); n > 0 && !queue_.empty() && !hangs; --n) {
      if (!queue_.front()()) break;
      queue_.pop_front();
      ++ended_;
    }
    if (!beside_.empty() && ended_ >= beside_.front().after && !holds_beside && random_() % 4 == 0) {
      beside_.front().work();
      beside_.pop_front();
      ++ended_beside_;
      --beside;
    }
    in_queue = static_cast<int>(queue_.size());
    const auto& [queued, copied] = marks_[mark - 1];
    return ended_ >= queued && ended_beside_ >= copied;
  }

  std::string why_no_groups() const override { return why_no_groups_; }
  std::string new_group() override {
    return folder_ + "/" + std::to_string(getpid()) + "-" + std::to_string(random_());
  }
  std::unique_ptr<DeviceGroup> join(const std::string& group, int member, int members) override {
    ++groups;
    return std::make_unique<HostGroup>(*this, group, member, members);
  }

  void put(std::function<bool()> work) {
    queue_.push_back(std::move(work));
    ++put_;
  }

  std::atomic<int> copies = 0, sums = 0, groups = 0, exchanges = 0, aborts = 0;
  const std::shared_ptr<std::atomic<int>> in_use = std::make_shared<std::atomic<int>>(0);  // blocks of memory()
  const std::shared_ptr<std::atomic<int>> in_queue_memory = std::make_shared<std::atomic<int>>(0);  // blocks
  std::atomic<int> host_places = 0, reads = 0;                                                      // so far
  std::atomic<int> in_queue = 0, beside = 0;                             // that have not ended
  std::atomic<int> most_queue_memory = std::numeric_limits<int>::max();  // blocks: then none is left
  std::atomic<bool> hangs = false;                                       // nothing of the queue is done
  std::atomic<bool> holds_beside = false;                                // no copy beside it is
  std::atomic<bool> is_full = false;                                     // there is no memory, page-locked or there
  std::atomic<int> refused = 0;
  std::atomic<int> failing_exchange = 0;  // from the exchange with this number on, groups fail; 0: none does

  bool is_failing() const { return failing_exchange > 0 && exchanges >= failing_exchange; }

 private:
  void refuse_if_full() {
    if (!is_full) return;
    ++refused;
    throw RuntimeFailure("no memory is left");
  }

  const std::string folder_;
  const std::string why_no_groups_;
  std::minstd_rand random_;
  std::deque<std::function<bool()>> queue_;
  struct Beside {
    std::uint64_t after;  // in the queue
    std::function<void()> work;
  };
  std::uint64_t begun_beside() const { return ended_beside_ + beside_.size(); }
  std::uint64_t put_ = 0, ended_ = 0, ended_beside_ = 0;
  std::deque<Beside> beside_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> marks_;  // in the queue, and beside it
  std::vector<std::unique_ptr<std::byte[]>> scratch_;
  std::function<void()> read_;  // one that has not ended
  // What is given back is used again, though something may still use it, so that a test finds that.
  static std::shared_ptr<std::byte> allocated(std::size_t bytes) {
    return {new std::byte[bytes], std::default_delete<std::byte[]>()};
  }
  const std::shared_ptr<SharedBlocks> blocks_ = std::make_shared<SharedBlocks>(allocated);
  const std::shared_ptr<SharedBlocks> host_blocks_ = std::make_shared<SharedBlocks>(allocated);
};

HostGroup::HostGroup(HostDevice& device, std::string name, int member, int members)
    : device_(device),
      name_(std::move(name)),
      member_(member),
      members_(members),
      sends_(static_cast<std::size_t>(members)),
      receives_(static_cast<std::size_t>(members)) {
  std::ofstream(name_ + "." + std::to_string(member_)).close();
}

DeviceGroup::State HostGroup::state() {
  if (failed_) return State::failed;
  for (int member = 0; member < members_ && !here_; ++member) {
    if (!std::filesystem::exists(name_ + "." + std::to_string(member))) return State::busy;
  }
  here_ = true;
  return busy_ > 0 && busy_-- > 0 ? State::busy : State::ready;
}

void HostGroup::exchange(std::span<const Part> parts) {
  if (parts.empty() || busy_ > 0 || failed_) throw RuntimeFailure("an exchange of nothing, or when it is not ready");
  ++device_.exchanges;
  busy_ = 2;
  if (device_.is_failing()) {
    failed_ = true;
    reason_ = "told to fail";
    return;
  }
  auto exchange = std::make_shared<Exchange>();
  for (const Part& part : parts) {
    const auto peer = static_cast<std::size_t>(part.peer);
    const int number = part.is_send ? sends_[peer]++ : receives_[peer]++;
    const int from = part.is_send ? member_ : part.peer, to = part.is_send ? part.peer : member_;
    exchange->parts.push_back(part);
    exchange->files.push_back(name_ + "." + std::to_string(from) + "." + std::to_string(to) + "." +
                              std::to_string(number));
  }
  at_work_.push_back(exchange);
  device_.put([exchange] { return exchange->go_on(); });
}

// Whether it has ended.
bool HostGroup::Exchange::go_on() {
  if (aborted) return true;
  bool all = true;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    char* data = reinterpret_cast<char*>(undisguised(part.data));
    if (part.is_send && !sent) {
      std::ofstream(files[i] + ".new", std::ios::binary).write(data, static_cast<std::streamsize>(part.bytes));
      std::filesystem::rename(files[i] + ".new", files[i]);
    }
    if (part.is_send || files[i].empty()) continue;
    std::error_code none;
    const auto size = std::filesystem::file_size(files[i], none);
    if (none) {
      all = false;
      continue;
    }
    if (size != part.bytes) throw RuntimeFailure("a send and its receive differ in size: " + files[i]);
    std::ifstream(files[i], std::ios::binary).read(data, static_cast<std::streamsize>(part.bytes));
    files[i].clear();
  }
  sent = true;
  return all;
}

void HostGroup::abort() {
  if (!failed_) ++device_.aborts;
  failed_ = true;
  for (const auto& exchange : at_work_) exchange->aborted = true;
}

// A TransportGroup by itself, and the transport that it uses.
class GroupThroughTransport {
 public:
  GroupThroughTransport(HostDevice& device, std::shared_ptr<Hub> hub, int rank, Tag tag, std::vector<int> members)
      : transport_(make_in_process_transport(std::move(hub), rank)),
        group_(device, *transport_, tag, std::move(members)) {}

  const char* state() { return name_of(group_.state()); }
  std::string reason() const { return group_.reason(); }
  void exchange(const std::vector<Described>& sends, const std::vector<Described>& receives) {
    hvd_backup::exchange(group_, sends, receives);
  }
  void abort() { group_.abort(); }
  void progress() { transport_->progress(); }
  std::size_t pending() const { return transport_->pending(); }

 private:
  std::unique_ptr<Transport> transport_;
  TransportGroup group_;
};

}  // namespace

void register_device(nb::module_& module) {
  module.attr("disguise") = disguise;
  nb::class_<HostStream>(module, "HostStream")
      .def(nb::init<>())
      .def_prop_ro("address", [](HostStream& self) { return reinterpret_cast<Address>(&self); })
      .def("write", &HostStream::write, "to"_a, "data"_a)
      .def("run_all", &HostStream::run_all);
  nb::class_<HostDevice>(module, "HostDevice")
      .def(nb::init<std::string, unsigned, std::string>(), "folder"_a, "seed"_a = 1, "why_no_groups"_a = "")
      .def_prop_ro("address", [](HostDevice& self) { return reinterpret_cast<Address>(static_cast<Device*>(&self)); })
      .def_prop_ro("why_no_groups", &HostDevice::why_no_groups)
      .def_prop_ro("copies", [](const HostDevice& self) { return self.copies.load(); })
      .def_prop_ro("sums", [](const HostDevice& self) { return self.sums.load(); })
      .def_prop_ro("groups", [](const HostDevice& self) { return self.groups.load(); })
      .def_prop_ro("exchanges", [](const HostDevice& self) { return self.exchanges.load(); })
      .def_prop_ro("aborts", [](const HostDevice& self) { return self.aborts.load(); })
      .def_prop_ro("in_use", [](const HostDevice& self) { return self.in_use->load(); })
      .def_prop_ro("in_queue_memory", [](const HostDevice& self) { return self.in_queue_memory->load(); })
      .def_prop_ro("host_places", [](const HostDevice& self) { return self.host_places.load(); })
      .def_prop_ro("reads", [](const HostDevice& self) { return self.reads.load(); })
      .def_prop_rw(
          "most_queue_memory", [](const HostDevice& self) { return self.most_queue_memory.load(); },
          [](HostDevice& self, int value) { self.most_queue_memory = value; })
      .def_prop_rw(
          "hangs", [](const HostDevice& self) { return self.hangs.load(); },
          [](HostDevice& self, bool value) { self.hangs = value; })
      .def_prop_ro("in_queue", [](const HostDevice& self) { return self.in_queue.load(); })
      .def_prop_ro("beside", [](const HostDevice& self) { return self.beside.load(); })
      .def_prop_rw(
          "holds_beside", [](const HostDevice& self) { return self.holds_beside.load(); },
          [](HostDevice& self, bool value) { self.holds_beside = value; })
      .def_prop_ro("refused", [](const HostDevice& self) { return self.refused.load(); })
      .def_prop_rw(
          "is_full", [](const HostDevice& self) { return self.is_full.load(); },
          [](HostDevice& self, bool value) { self.is_full = value; })
      .def_prop_rw(
          "failing_exchange", [](const HostDevice& self) { return self.failing_exchange.load(); },
          [](HostDevice& self, int value) { self.failing_exchange = value; });
  // On any device, given by its address: returns the squared norms of (sources, destination) once it has run.
  module.def(
      "measured_sum_on",
      [](Address address, std::string_view dtype, Address destination, const std::vector<Address>& sources,
         const std::vector<double>& weights, double scale, std::size_t count) {
        auto& device = *pointer<Device>(address);
        const Device::Norms norms = device.sum(gpu::data_type(dtype), pointer(destination), gpu::pointers(sources),
                                               weights, scale, count, true);
        const Device::Mark end = device.mark();
        while (!device.reached(end)) sched_yield();
        return std::pair(norms->sources, norms->destination);
      },
      "device"_a, "dtype"_a, "destination"_a, "sources"_a, "weights"_a, "scale"_a, "count"_a);
  nb::class_<GroupThroughTransport>(module, "GroupThroughTransport")
      .def(nb::init<HostDevice&, std::shared_ptr<Hub>, int, Tag, std::vector<int>>(), "device"_a, "hub"_a, "rank"_a,
           "tag"_a, "members"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("state", &GroupThroughTransport::state)
      .def_prop_ro("reason", &GroupThroughTransport::reason)
      .def("exchange", &GroupThroughTransport::exchange, "sends"_a, "receives"_a)
      .def("abort", &GroupThroughTransport::abort)
      .def("progress", &GroupThroughTransport::progress)
      .def_prop_ro("pending", &GroupThroughTransport::pending);
}

}  // namespace hvd_backup
