// The data plane for tests: kernels, transports and the collective by themselves, without an engine. Buffers are given
// by address, so that a test decides about alignment, overlap and kind of memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "bindings/gpu_arguments.h"
#include "bindings/testing.h"
#include "collective/allreduce.h"
#include "collective/partition.h"
#include "collective/segments.h"
#include "kernels/finite.h"
#include "kernels/weighted_sum.h"
#include "kernels/weighted_sum_isa.h"
#include "transport/in_process.h"
#include "transport/mpi_transport.h"
#include "transport/node_exchange.h"
#include "transport/shared_segment.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_backup {

namespace {

using gpu::Address;
using gpu::data_type;
using gpu::pointer;

void run_weighted_sum(std::string_view dtype, Address destination, const std::vector<Address>& sources,
                      const std::vector<double>& weights, double scale, std::size_t count,
                      std::string_view instruction_set, SquaredNorms* norms) {
  std::vector<const void*> pointers;
  for (const Address source : sources) pointers.push_back(pointer(source));
  if (instruction_set.empty()) {
    weighted_sum(data_type(dtype), pointer(destination), pointers, weights, scale, count, norms);
    return;
  }
  for (const InstructionSet& set : instruction_sets()) {
    if (set.name != instruction_set) continue;
    set.sum(data_type(dtype), pointer(destination), pointers.data(), weights.data(), pointers.size(), scale, count,
            norms);
    return;
  }
  throw UsageError("this machine or build has no kernel for " + std::string(instruction_set));
}

struct Collective {
  bool done = false;
  std::shared_ptr<RunningAllreduce> running;
};

// A transport with the pool that its collectives share, as the engine has them.
struct Endpoint {
  StagingPool staging;  // outlives the collectives, whose state the transport holds
  std::unique_ptr<Transport> transport;

  Transport& open() const {
    if (!transport) throw UsageError("this endpoint has been closed");
    return *transport;
  }

  std::shared_ptr<Collective> start(const std::vector<int>& members, const std::vector<double>& weights, double scale,
                                    std::string_view dtype, std::size_t count, Address contribution, Address result,
                                    Tag tag, std::size_t small_bytes, std::size_t segment_bytes,
                                    std::size_t staging_bytes, bool cancellable) {
    auto collective = std::make_shared<Collective>();
    AllreduceOptions options{.members = members,
                             .weights = weights,
                             .scale = scale,
                             .dtype = data_type(dtype),
                             .count = count,
                             .contribution = pointer(contribution),
                             .result = pointer(result),
                             .tag = tag,
                             .result_tag = tag + 1,
                             .cancellable = cancellable,
                             .small_bytes = small_bytes,
                             .segment_bytes = segment_bytes,
                             .staging_bytes = staging_bytes,
                             .staging = &staging,
                             .norms = nullptr};
    collective->running = start_allreduce(open(), std::move(options), [weak = std::weak_ptr(collective)] {
      if (const auto alive = weak.lock()) alive->done = true;  // it owns what calls this
    });
    return collective;
  }

  // Without the GIL, so that the other ranks' threads run too.
  void finish(const std::vector<std::shared_ptr<Collective>>& collectives, double timeout_s) {
    const auto all_done = [&] {
      return std::all_of(collectives.begin(), collectives.end(), [](const auto& one) { return one->done; });
    };
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
    while (!all_done()) {
      if (open().progress()) continue;
      sched_yield();
      if (std::chrono::steady_clock::now() > deadline) {
        throw RuntimeFailure("rank " + std::to_string(open().rank()) + " has " + std::to_string(open().pending()) +
                             " transfers pending after " + std::to_string(timeout_s) + " s");
      }
    }
  }
};

std::unique_ptr<Endpoint> endpoint(std::unique_ptr<Transport> transport) {
  auto made = std::make_unique<Endpoint>();
  made->transport = std::move(transport);
  return made;
}

nb::object receive_message(Endpoint& self) {
  int from = -1;
  Bytes message;
  if (!self.open().receive_message(&from, &message)) return nb::none();
  return nb::make_tuple(from, nb::bytes(reinterpret_cast<const char*>(message.data()), message.size()));
}

void send_message(Endpoint& self, int peer, const nb::bytes& message) {
  const auto* begin = reinterpret_cast<const std::byte*>(message.c_str());
  self.open().send_message(peer, Bytes(begin, begin + message.size()));
}

// The ranks of a node, all in this process. took_the_long_way(rank, peer, tag): instead of MPI.
using TookTheLongWay = std::function<void(std::size_t rank, std::size_t peer, Tag tag)>;

std::vector<std::unique_ptr<NodeExchange>> node_exchanges(std::size_t ranks, const TookTheLongWay& took_the_long_way) {
  std::vector<SharedSegment> offered;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    offered.push_back(SharedSegment::create(NodeExchange::segment_bytes(ranks)));
  }
  std::vector<std::unique_ptr<NodeExchange>> exchanges;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    std::vector<SharedSegment> mine;
    for (const SharedSegment& one : offered) mine.push_back(SharedSegment::open(one.path(), one.bytes().size()));
    exchanges.push_back(std::make_unique<NodeExchange>(
        std::move(mine), rank,
        [=](std::size_t peer, Tag tag, std::span<std::byte>, const OnDone&) { took_the_long_way(rank, peer, tag); }));
  }
  return exchanges;
}

bool poll(NodeExchange& self) {
  std::vector<OnDone> finished;
  self.poll(&finished);
  for (const OnDone& on_done : finished) on_done();
  return !finished.empty();
}

void register_node_exchange(nb::module_& module) {
  nb::class_<NodeExchange>(module, "NodeExchange")
      .def_ro_static("block_bytes", &NodeExchange::block_bytes)
      .def_ro_static("block_count", &NodeExchange::block_count)
      .def(
          "send",
          [](NodeExchange& self, const std::vector<std::size_t>& peers, Tag tag, Address data, std::size_t bytes,
             const OnDone& on_done) { return self.send(peers, tag, {pointer<const std::byte>(data), bytes}, on_done); },
          "peers"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a)
      .def("announce", &NodeExchange::announce, "peer"_a, "tag"_a)
      .def(
          "receive",
          [](NodeExchange& self, std::size_t peer, Tag tag, Address data, std::size_t bytes, OnDone on_done) {
            self.receive(peer, tag, {pointer<std::byte>(data), bytes}, std::move(on_done));
          },
          "peer"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a)
      .def("cancel", &NodeExchange::cancel, "tag"_a)
      .def("progress", &poll)
      .def_prop_ro("pending", &NodeExchange::pending);
  module.def("node_exchanges", &node_exchanges, "ranks"_a, "took_the_long_way"_a);
}

}  // namespace

void register_data_plane(nb::module_& module) {
  nb::exception<UsageError>(module, "UsageError", PyExc_RuntimeError);
  nb::exception<RuntimeFailure>(module, "RuntimeFailure", PyExc_RuntimeError);

  module.def(
      "weighted_sum",
      [](std::string_view dtype, Address destination, const std::vector<Address>& sources,
         const std::vector<double>& weights, double scale, std::size_t count, std::string_view instruction_set) {
        run_weighted_sum(dtype, destination, sources, weights, scale, count, instruction_set, nullptr);
      },
      "dtype"_a, "destination"_a, "sources"_a, "weights"_a, "scale"_a, "count"_a, "instruction_set"_a = "",
      nb::call_guard<nb::gil_scoped_release>());
  // The same; returns the squared norms of (sources, destination).
  module.def(
      "measured_sum",
      [](std::string_view dtype, Address destination, const std::vector<Address>& sources,
         const std::vector<double>& weights, double scale, std::size_t count, std::string_view instruction_set) {
        SquaredNorms norms;
        run_weighted_sum(dtype, destination, sources, weights, scale, count, instruction_set, &norms);
        return std::pair(norms.sources, norms.destination);
      },
      "dtype"_a, "destination"_a, "sources"_a, "weights"_a, "scale"_a, "count"_a, "instruction_set"_a = "");
  module.def(
      "all_finite",
      [](std::string_view dtype, Address source, std::size_t count) {
        return all_finite(data_type(dtype), pointer(source), count);
      },
      "dtype"_a, "source"_a, "count"_a);
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets()) names.emplace_back(set.name);
    return names;
  });
  module.def("kernel_instruction_set", &kernel_instruction_set);

  module.def(
      "shard_of",
      [](std::size_t count, std::size_t parts, std::size_t part) {
        const Shard shard = shard_of(count, parts, part);
        return std::pair(shard.begin, shard.end);
      },
      "count"_a, "parts"_a, "part"_a);
  module.attr("shard_granule") = shard_granule;
  module.def("segment_elements", &segment_elements, "members"_a, "element_bytes"_a, "segment_bytes"_a,
             "staging_bytes"_a);
  module.attr("staging_slots") = staging_slots;
  module.attr("min_segment_bytes") = min_segment_bytes;

  nb::class_<Hub>(module, "Hub").def(nb::init<int, bool>(), "size"_a, "takes_device_memory"_a = false);
  nb::class_<Collective>(module, "Collective")
      .def_ro("done", &Collective::done)
      .def("abandon", [](Collective& self) { self.running->abandon(); })
      .def("missing", [](Collective& self) {
        const Missing missing = self.running->missing();
        return std::pair(std::vector<int>(missing.contributions.begin(), missing.contributions.end()),
                         std::vector<int>(missing.results.begin(), missing.results.end()));
      });
  const AllreduceOptions defaults;
  nb::class_<Endpoint>(module, "Endpoint")
      .def_static(
          "in_process",
          [](std::shared_ptr<Hub> hub, int rank) { return endpoint(make_in_process_transport(std::move(hub), rank)); },
          "hub"_a, "rank"_a)
      .def_static(
          "over_mpi",
          [](Address comm, std::size_t piece_bytes, bool share_memory, std::optional<bool> takes_device_memory) {
            return endpoint(make_mpi_transport(pointer(comm), {piece_bytes, share_memory, takes_device_memory}));
          },
          "comm"_a, "piece_bytes"_a = MpiTransportOptions().piece_bytes, "share_memory"_a = true,
          "takes_device_memory"_a = nb::none())
      .def("close", [](Endpoint& self) { self.transport.reset(); })
      .def_prop_ro("rank", [](Endpoint& self) { return self.open().rank(); })
      .def_prop_ro("size", [](Endpoint& self) { return self.open().size(); })
      .def_prop_ro("pending", [](Endpoint& self) { return self.open().pending(); })
      .def("send_message", &send_message, "peer"_a, "message"_a)
      .def("receive_message", &receive_message)
      .def(
          "start_send",
          [](Endpoint& self, int peer, Tag tag, Address data, std::size_t bytes, OnDone on_done, bool cancellable) {
            self.open().start_send(peer, tag, {pointer<const std::byte>(data), bytes}, std::move(on_done), cancellable);
          },
          "peer"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a, "cancellable"_a = false)
      .def(
          "start_receive",
          [](Endpoint& self, int peer, Tag tag, Address data, std::size_t bytes, OnDone on_done, bool cancellable) {
            self.open().start_receive(peer, tag, {pointer<std::byte>(data), bytes}, std::move(on_done), cancellable);
          },
          "peer"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a, "cancellable"_a = false)
      .def(
          "start_send_to_all",
          [](Endpoint& self, const std::vector<int>& peers, Tag tag, Address data, std::size_t bytes, OnDone on_done,
             bool cancellable) {
            self.open().start_send_to_all(peers, tag, {pointer<const std::byte>(data), bytes}, std::move(on_done),
                                          cancellable);
          },
          "peers"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a, "cancellable"_a = false)
      .def(
          "cancel", [](Endpoint& self, Tag tag) { self.open().cancel(tag); }, "tag"_a)
      .def_prop_ro("takes_device_memory", [](Endpoint& self) { return self.open().takes_device_memory(); })
      .def(
          "start_device_send",
          [](Endpoint& self, int peer, Tag tag, Address data, std::size_t bytes, OnDone on_done) {
            self.open().start_device_send(peer, tag, {pointer<const std::byte>(data), bytes}, std::move(on_done));
          },
          "peer"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a)
      .def(
          "start_device_receive",
          [](Endpoint& self, int peer, Tag tag, Address data, std::size_t bytes, OnDone on_done) {
            self.open().start_device_receive(peer, tag, {pointer<std::byte>(data), bytes}, std::move(on_done));
          },
          "peer"_a, "tag"_a, "data"_a, "bytes"_a, "on_done"_a)
      .def(
          "give_up_device", [](Endpoint& self, Tag tag) { self.open().give_up_device(tag); }, "tag"_a)
      .def("progress", [](Endpoint& self) { return self.open().progress(); })
      .def("start_allreduce", &Endpoint::start, nb::kw_only(), "members"_a, "weights"_a, "scale"_a = 1.0, "dtype"_a,
           "count"_a, "contribution"_a, "result"_a, "tag"_a = 0, "small_bytes"_a = defaults.small_bytes,
           "segment_bytes"_a = defaults.segment_bytes, "staging_bytes"_a = defaults.staging_bytes,
           "cancellable"_a = false)
      .def("finish", &Endpoint::finish, "collectives"_a, "timeout_s"_a = 60.0,
           nb::call_guard<nb::gil_scoped_release>());
  module.def("mpi_library_version", &mpi_library_version);
  module.def("mpi_says_it_takes_device_memory", &mpi_says_it_takes_device_memory);
  register_node_exchange(module);
}

}  // namespace hvd_backup
