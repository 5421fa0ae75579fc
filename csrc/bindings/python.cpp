// The Python face of the C API (nanobind). Thin: status codes become exceptions, waits release the GIL and answer
// Ctrl-C, and buffers go over as addresses. Documented in hvd_backup/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "api/hvd_backup.h"

namespace nb = nanobind;

namespace {

struct CoreError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CoreUsageError : CoreError {
  using CoreError::CoreError;
};

void check(hvdb_status status) {
  if (status == HVDB_OK) return;
  if (status == HVDB_USAGE_ERROR) throw CoreUsageError(hvdb_last_error());
  throw CoreError(hvdb_last_error());
}

constexpr int64_t slice_us = 100'000;  // between two looks for Ctrl-C
constexpr int long_wait_slices = 10;   // no message and no transfer takes so long: another rank is late, or elsewhere

// Calls `attempt(timeout_us)` without the GIL until it is something else than a timeout.
template <class Attempt>
void wait_until_done(Attempt attempt) {
  while (true) {
    hvdb_status status;
    {
      const nb::gil_scoped_release release;
      status = attempt(slice_us);
    }
    if (status != HVDB_TIMEOUT) {
      check(status);
      return;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

const std::pair<const char*, int> dtypes[] = {{"float16", HVDB_FLOAT16}, {"bfloat16", HVDB_BFLOAT16},
                                              {"float32", HVDB_FLOAT32}, {"float64", HVDB_FLOAT64},
                                              {"int32", HVDB_INT32},     {"int64", HVDB_INT64}};

int dtype_of(const std::string& name) {
  for (const auto& [known, value] : dtypes) {
    if (name == known) return value;
  }
  throw CoreUsageError("dtype '" + name +
                       "' is not supported: use float16, bfloat16, float32, float64, int32 or int64");
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct PyHub {
  PyHub(int size, bool takes_device_memory) { check(hvdb_hub_create(size, takes_device_memory ? 1 : 0, &hub)); }
  ~PyHub() { hvdb_hub_destroy(hub); }
  PyHub(const PyHub&) = delete;
  hvdb_hub* hub = nullptr;
};

struct PyEngine {
  explicit PyEngine(hvdb_engine* created) : engine(created) {}
  ~PyEngine() {
    const nb::gil_scoped_release release;
    hvdb_engine_destroy(engine);
  }
  PyEngine(const PyEngine&) = delete;
  hvdb_engine* engine;
  nb::object device;  // that it uses
};

// Keeps its engine alive, and does not go before the engine has let go of its buffers.
struct PyChannel {
  PyChannel(std::shared_ptr<PyEngine> owner, hvdb_channel* opened) : engine(std::move(owner)), channel(opened) {}
  ~PyChannel() {
    const nb::gil_scoped_release release;
    while (hvdb_close(channel, slice_us) == HVDB_TIMEOUT) {
    }
  }
  PyChannel(const PyChannel&) = delete;

  hvdb_channel_view view() const {
    hvdb_channel_view view;
    check(hvdb_view(channel, &view));
    return view;
  }

  std::shared_ptr<PyEngine> engine;
  hvdb_channel* channel;
};

struct PyUpdate {
  explicit PyUpdate(hvdb_update* taken) : update(taken) {}
  ~PyUpdate() { hvdb_update_destroy(update); }
  PyUpdate(const PyUpdate&) = delete;
  hvdb_update* update;
};

std::unique_ptr<PyChannel> open_channel(const std::shared_ptr<PyEngine>& self, const std::string& name,
                                        const std::string& kind, const std::string& description, nb::bytes proposal,
                                        int required, int64_t grace_us, int max_misses, int64_t max_lag,
                                        const std::string& arrive, bool wait_for_all, bool average, bool automatic,
                                        bool drop_nonfinite, bool resync, bool on_device) {
  if (kind != "training" && kind != "collective") {
    throw CoreUsageError("kind '" + kind + "' is not known: use 'training' or 'collective'");
  }
  if (arrive != "first" && arrive != "last") {
    throw CoreUsageError("arrive='" + arrive + "' is not known: use 'first' or 'last'");
  }
  hvdb_channel_spec spec{};
  spec.name = name.c_str();
  spec.kind = kind == "training" ? HVDB_TRAINING : HVDB_COLLECTIVE;
  spec.description = description.c_str();
  spec.proposal = proposal.c_str();
  spec.proposal_size = proposal.size();
  spec.required = required;
  spec.grace_us = grace_us;
  spec.max_misses = max_misses;
  spec.max_lag = max_lag;
  spec.automatic = automatic;
  spec.resync = resync;
  spec.arrive_first = arrive == "first";
  spec.drop_nonfinite = drop_nonfinite;
  spec.wait_for_all = wait_for_all;
  spec.average = average;
  spec.on_device = on_device;
  hvdb_channel* channel = nullptr;
  check(hvdb_open(self->engine, &spec, &channel));
  auto opened = std::make_unique<PyChannel>(self, channel);
  wait_until_done([&](int64_t timeout_us) { return hvdb_opened(channel, timeout_us); });
  return opened;
}

void set_layout(PyChannel& self, const std::vector<std::pair<uint64_t, std::string>>& buckets,
                const std::vector<int>& scopes, const std::vector<bool>& on_device) {
  if (buckets.size() != scopes.size() || (!on_device.empty() && buckets.size() != on_device.size())) {
    throw CoreUsageError("set_layout(): give one scope for each bucket, and whether it is on the GPU, if any is");
  }
  const std::vector<int> flags(on_device.begin(), on_device.end());
  std::vector<uint64_t> counts;
  std::vector<int> types;
  for (const auto& [count, dtype] : buckets) {
    counts.push_back(count);
    types.push_back(dtype_of(dtype));
  }
  check(hvdb_set_layout(self.channel, static_cast<int>(buckets.size()), counts.data(), types.data(), scopes.data(),
                        flags.empty() ? nullptr : flags.data()));
}

void set_results(PyChannel& self, const std::vector<std::uintptr_t>& results) {
  std::vector<void*> pointers;
  for (const std::uintptr_t address : results) pointers.push_back(pointer<void>(address));
  check(hvdb_set_results(self.channel, static_cast<int>(pointers.size()), pointers.data()));
}

std::unique_ptr<PyUpdate> wait(PyChannel& self) {
  hvdb_update* update = nullptr;
  int slices = 0;
  wait_until_done([&](int64_t timeout_us) {
    if (++slices == long_wait_slices) check(hvdb_announce_waiting(self.channel));
    return hvdb_wait(self.channel, timeout_us, &update);
  });
  return std::make_unique<PyUpdate>(update);
}

void offer_state(PyChannel& self, const std::vector<std::pair<std::uintptr_t, uint64_t>>& parts) {
  std::vector<const void*> data;
  std::vector<uint64_t> sizes;
  for (const auto& [address, size] : parts) {
    data.push_back(pointer<const void>(address));
    sizes.push_back(size);
  }
  const nb::gil_scoped_release release;
  check(hvdb_offer_state(self.channel, static_cast<int>(parts.size()), data.data(), sizes.data()));
}

std::pair<std::uintptr_t, uint64_t> state(PyChannel& self) {
  const void* data = nullptr;
  uint64_t size = 0;
  check(hvdb_state(self.channel, &data, &size));
  return {reinterpret_cast<std::uintptr_t>(data), size};
}

bool poll(PyChannel& self) {
  const hvdb_status status = hvdb_wait(self.channel, 0, nullptr);
  if (status == HVDB_TIMEOUT) return false;
  check(status);
  return true;
}

std::vector<std::vector<int32_t>> contributors(const PyUpdate& self) {
  std::vector<std::vector<int32_t>> all;
  for (int scope = 0; scope < hvdb_update_scopes(self.update); ++scope) {
    int count = 0;
    const int32_t* ranks = hvdb_update_contributors(self.update, scope, &count);
    all.emplace_back(ranks, ranks + count);
  }
  return all;
}

const char* kind_name(const PyUpdate& self) {
  switch (hvdb_update_get_kind(self.update)) {
    case HVDB_UPDATE:
      return "update";
    case HVDB_RESUME:
      return "resume";
    case HVDB_OVER:
      return "over";
    case HVDB_OFFER:
      return "offer";
    case HVDB_RESYNC:
      return "resync";
  }
  return "over";
}

nb::bytes metadata(const PyUpdate& self) {
  size_t size = 0;
  const void* data = hvdb_update_metadata(self.update, &size);
  return nb::bytes(data, size);
}

void weighted_sum(const std::string& dtype, std::uintptr_t destination, const std::vector<std::uintptr_t>& sources,
                  const std::vector<double>& weights, double scale, uint64_t count) {
  if (sources.size() != weights.size()) throw CoreUsageError("weighted_sum(): give one weight for each source");
  std::vector<const void*> pointers;
  for (const std::uintptr_t address : sources) pointers.push_back(pointer<const void>(address));
  check(hvdb_weighted_sum(dtype_of(dtype), pointer<void>(destination), static_cast<int>(pointers.size()),
                          pointers.data(), weights.data(), scale, count));
}

void replay_decision(PyEngine& self, const std::string& channel, int64_t step, int scope, int required,
                     const std::vector<int32_t>& ranks, const std::vector<double>& weights, const nb::bytes& metadata) {
  if (ranks.size() != weights.size()) throw CoreUsageError("replay_decision(): give one weight for each rank");
  check(hvdb_replay_decision(self.engine, channel.c_str(), step, scope, required, static_cast<int>(ranks.size()),
                             ranks.data(), weights.data(), metadata.c_str(), metadata.size()));
}

nb::tuple forecast(std::uintptr_t computing_us, uint64_t steps, int ranks, int required, double tail_us,
                   double catch_up_us, bool carry_over) {
  double update_us = 0;
  std::vector<double> contributed(static_cast<std::size_t>(std::max(ranks, 0)));
  {
    const nb::gil_scoped_release release;
    check(hvdb_forecast(pointer<const double>(computing_us), steps, ranks, required, tail_us, catch_up_us, carry_over,
                        &update_us, contributed.data()));
  }
  return nb::make_tuple(update_us, contributed);
}

std::shared_ptr<PyEngine> over_mpi(std::uintptr_t comm, const std::string& trace, const std::string& timeline,
                                   std::int64_t stall_check_us, bool host_for_device) {
  const hvdb_settings settings{trace.c_str(), timeline.c_str(), stall_check_us, host_for_device ? 1 : 0};
  hvdb_engine* engine = nullptr;
  hvdb_status status;
  {
    const nb::gil_scoped_release release;
    status = hvdb_engine_create_mpi(pointer<const void>(comm), &settings, &engine);
  }
  check(status);
  return std::make_shared<PyEngine>(engine);
}

std::shared_ptr<PyEngine> in_process(PyHub& hub, int rank, const std::string& trace, const std::string& timeline,
                                     std::int64_t stall_check_us) {
  const hvdb_settings settings{trace.c_str(), timeline.c_str(), stall_check_us, 0};
  hvdb_engine* engine = nullptr;
  check(hvdb_engine_create_in_process(hub.hub, rank, &settings, &engine));
  return std::make_shared<PyEngine>(engine);
}

int joined(PyEngine& self) {
  int last = 0;
  wait_until_done([&](int64_t timeout_us) { return hvdb_joined(self.engine, timeout_us, &last); });
  return last;
}

void shut_down(PyEngine& self, const std::string& failure) {
  check(hvdb_leave_for_good(self.engine, failure.c_str()));
  wait_until_done([&](int64_t timeout_us) { return hvdb_shut_down(self.engine, timeout_us); });
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The native core of hvd_backup.";
  // An exception that ends the program keeps channels alive in its traceback: not worth a page of warnings.
  nb::set_leak_warnings(false);
  const nb::object core_error = nb::exception<CoreError>(m, "CoreError", PyExc_RuntimeError);
  nb::exception<CoreUsageError>(m, "CoreUsageError", core_error.ptr());

  nb::class_<PyHub>(m, "Hub").def(nb::init<int, bool>(), nb::arg("size"), nb::arg("takes_device_memory") = false);

  nb::class_<PyEngine>(m, "Engine")
      .def_static("over_mpi", &over_mpi, nb::arg("comm"), nb::arg("trace") = "", nb::arg("timeline") = "",
                  nb::arg("stall_check_us") = 0, nb::arg("host_for_device") = false)
      .def_static("in_process", &in_process, nb::arg("hub"), nb::arg("rank"), nb::arg("trace") = "",
                  nb::arg("timeline") = "", nb::arg("stall_check_us") = 0)
      .def_prop_ro("rank", [](const PyEngine& self) { return hvdb_rank(self.engine); })
      .def_prop_ro("size", [](const PyEngine& self) { return hvdb_size(self.engine); })
      .def_prop_ro("survives_losses", [](const PyEngine& self) { return hvdb_survives_losses(self.engine) != 0; })
      .def_prop_ro("takes_device_memory",
                   [](const PyEngine& self) { return hvdb_takes_device_memory(self.engine) != 0; })
      .def_prop_ro("lost",
                   [](const PyEngine& self) {
                     std::vector<std::int32_t> ranks(static_cast<std::size_t>(hvdb_size(self.engine)));
                     int count = 0;
                     check(hvdb_lost(self.engine, hvdb_size(self.engine), ranks.data(), &count));
                     ranks.resize(static_cast<std::size_t>(count));
                     return ranks;
                   })
      .def("open", &open_channel, nb::arg("name"), nb::arg("kind"), nb::arg("description"), nb::arg("proposal"),
           nb::arg("required"), nb::arg("grace_us") = 0, nb::arg("max_misses") = 0, nb::arg("max_lag") = 64,
           nb::arg("arrive") = "first", nb::arg("wait_for_all") = false, nb::arg("average") = true,
           nb::arg("automatic") = false, nb::arg("drop_nonfinite") = false, nb::arg("resync") = false,
           nb::arg("on_device") = false)
      .def(
          "replay_channel",
          [](PyEngine& self, const std::string& channel, const std::string& description) {
            check(hvdb_replay_channel(self.engine, channel.c_str(), description.c_str()));
          },
          nb::arg("channel"), nb::arg("description"))
      .def("replay_decision", &replay_decision, nb::arg("channel"), nb::arg("step"), nb::arg("scope"),
           nb::arg("required"), nb::arg("ranks"), nb::arg("weights"), nb::arg("metadata"))
      .def(
          "replay_drop",
          [](PyEngine& self, const std::string& channel, int64_t step, int scope, int rank) {
            check(hvdb_replay_drop(self.engine, channel.c_str(), step, scope, rank));
          },
          nb::arg("channel"), nb::arg("step"), nb::arg("scope"), nb::arg("rank"))
      .def(
          "use_device",
          [](PyEngine& self, const nb::object& device, const std::string& means, bool journal_on_device) {
            auto* address = pointer<void>(nb::cast<std::uintptr_t>(device.attr("address")));
            check(hvdb_use_device(self.engine, address, means.c_str(), journal_on_device ? 1 : 0));
            self.device = device;
          },
          nb::arg("device"), nb::arg("means") = "nccl", nb::arg("journal_on_device") = false)
      .def_prop_ro("device", [](const PyEngine& self) { return self.device.is_valid() ? self.device : nb::none(); })
      .def(
          "replay_round_end",
          [](PyEngine& self, const std::string& channel, int64_t step) {
            check(hvdb_replay_round_end(self.engine, channel.c_str(), step));
          },
          nb::arg("channel"), nb::arg("step"))
      .def(
          "recorded",
          [](PyEngine& self, int64_t last) {
            const char* text = nullptr;
            check(hvdb_recorded(self.engine, last, &text));
            return std::string(text);
          },
          nb::arg("last"))
      .def("away", [](PyEngine& self) { check(hvdb_pause(self.engine)); })
      .def("join", [](PyEngine& self) { check(hvdb_join(self.engine)); })
      .def("joined", &joined)
      .def("shutdown", &shut_down, nb::arg("failure") = "");

  nb::class_<PyChannel>(m, "Channel")
      .def_prop_ro("address", [](const PyChannel& self) { return reinterpret_cast<std::uintptr_t>(self.channel); })
      .def_prop_ro("proposal",
                   [](PyChannel& self) {
                     const void* data = nullptr;
                     size_t size = 0;
                     check(hvdb_proposal(self.channel, &data, &size));
                     return nb::bytes(data, size);
                   })
      .def("set_layout", &set_layout, nb::arg("buckets"), nb::arg("scopes"), nb::arg("on_device") = std::vector<bool>{})
      .def("set_results", &set_results, nb::arg("results"))
      .def(
          "measure", [](PyChannel& self, int buckets) { check(hvdb_measure(self.channel, buckets)); },
          nb::arg("buckets"))
      .def_prop_ro("step", [](const PyChannel& self) { return self.view().step; })
      .def_prop_ro("round_end",
                   [](const PyChannel& self) -> std::optional<int64_t> {
                     const int64_t end = self.view().round_end;
                     return end < 0 ? std::nullopt : std::optional(end);
                   })
      .def_prop_ro("round_start", [](const PyChannel& self) { return self.view().round_start; })
      .def_prop_ro("state_wanted", [](const PyChannel& self) { return self.view().state_wanted != 0; })
      .def_prop_ro("state_wanted_at_exit", [](const PyChannel& self) { return self.view().state_wanted_at_exit != 0; })
      .def("offer_state", &offer_state, nb::arg("parts"))
      .def("state", &state)
      .def_prop_ro("round_over", [](const PyChannel& self) { return self.view().round_over != 0; })
      .def(
          "begin",
          [](PyChannel& self, double samples, const nb::bytes& metadata) {
            check(hvdb_begin(self.channel, samples, metadata.c_str(), metadata.size()));
          },
          nb::arg("samples"), nb::arg("metadata"))
      .def(
          "submit",
          [](PyChannel& self, int bucket, std::uintptr_t contribution, std::uintptr_t result, bool wait_follows) {
            check(hvdb_submit(self.channel, bucket, pointer<const void>(contribution), pointer<void>(result),
                              wait_follows ? 1 : 0));
          },
          nb::arg("bucket"), nb::arg("contribution"), nb::arg("result"), nb::arg("wait_follows") = false)
      .def(
          "submit_on_device",
          [](PyChannel& self, int bucket, std::uintptr_t contribution, std::uintptr_t result,
             std::uintptr_t device_contribution, std::uintptr_t device_result, std::uintptr_t stream, bool finite) {
            check(hvdb_submit_on_device(self.channel, bucket, pointer<const void>(contribution), pointer<void>(result),
                                        pointer<const void>(device_contribution), pointer<void>(device_result),
                                        pointer<void>(stream), finite ? 1 : 0, 0));
          },
          nb::arg("bucket"), nb::arg("contribution"), nb::arg("result"), nb::arg("device_contribution"),
          nb::arg("device_result"), nb::arg("stream"), nb::arg("finite") = true)
      .def("wait", &wait)
      .def("hold", [](PyChannel& self) { check(hvdb_hold(self.channel)); })
      .def("commit", [](PyChannel& self) { check(hvdb_commit(self.channel)); })
      .def("poll", &poll)
      .def(
          "begin_round",
          [](PyChannel& self, int64_t length, int64_t align_every) {
            check(hvdb_begin_round(self.channel, length, align_every));
          },
          nb::arg("length"), nb::arg("align_every"))
      .def("away", [](PyChannel& self) { check(hvdb_away(self.channel)); })
      .def("leave", [](PyChannel& self) { check(hvdb_leave(self.channel)); })
      .def("counters",
           [](const PyChannel& self) {
             const hvdb_channel_view view = self.view();
             nb::dict counters;
             counters["contributed"] = view.contributed;
             counters["dropped"] = view.dropped;
             counters["caught_up"] = view.caught_up;
             counters["resynced"] = view.resynced;
             return counters;
           })
      .def("journal_bytes", [](const PyChannel& self) { return self.view().journal_bytes; });

  nb::class_<PyUpdate>(m, "Update")
      .def_prop_ro("kind", &kind_name)
      .def_prop_ro("step", [](const PyUpdate& self) { return hvdb_update_step(self.update); })
      .def_prop_ro("contributors", &contributors)
      .def_prop_ro("contributed", [](const PyUpdate& self) { return hvdb_update_contributed(self.update) != 0; })
      .def_prop_ro("samples", [](const PyUpdate& self) { return hvdb_update_samples(self.update); })
      .def_prop_ro("required", [](const PyUpdate& self) { return hvdb_update_required(self.update); })
      .def_prop_ro("metadata", &metadata);

  m.def("weighted_sum", &weighted_sum, nb::arg("dtype"), nb::arg("destination"), nb::arg("sources"), nb::arg("weights"),
        nb::arg("scale"), nb::arg("count"));
  m.def("forecast", &forecast, nb::arg("computing_us"), nb::arg("steps"), nb::arg("ranks"), nb::arg("required"),
        nb::arg("tail_us") = 0.0, nb::arg("catch_up_us") = 0.0, nb::arg("carry_over") = true);
  m.def("kernel_instruction_set", &hvdb_kernel_instruction_set);
  m.def("mpi_library_version", &hvdb_mpi_library_version);
  m.def("mpi_built_with", &hvdb_mpi_built_with);
  m.def("function_table", [] { return reinterpret_cast<std::uintptr_t>(hvdb_function_table()); });
}
