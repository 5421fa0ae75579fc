// The C API over Engine: handles, and the one place where exceptions become status codes.
#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "api/hvd_backup.h"
#include "control/forecast.h"
#include "engine/engine.h"
#include "kernels/weighted_sum.h"
#include "transport/in_process.h"
#include "transport/mpi_transport.h"

using namespace hvd_backup;

struct hvdb_hub {
  std::shared_ptr<Hub> hub;
};
struct hvdb_engine {
  std::unique_ptr<Engine> engine;
  std::vector<std::unique_ptr<hvdb_channel>> channels;
  std::string recorded;
};
struct hvdb_channel {
  Engine* engine = nullptr;
  Channel* channel = nullptr;
  std::string proposal;
};
struct hvdb_update {
  Update update;
};

namespace {

thread_local std::string last_error;

template <class Action>
hvdb_status guarded(Action action) {
  try {
    return action();
  } catch (const UsageError& error) {
    last_error = error.what();
    return HVDB_USAGE_ERROR;
  } catch (const std::exception& error) {
    last_error = error.what();
    return HVDB_FAILURE;
  }
}

std::string text(const char* value) { return value ? value : ""; }

std::string blob(const void* data, size_t size) { return {static_cast<const char*>(data), data ? size : 0}; }

EngineSettings engine_settings(const hvdb_settings* given) {
  if (given == nullptr) return {};
  return {text(given->trace), text(given->timeline), given->stall_check_us};
}

ChannelScript& channel_of(Script& script, const char* name) {
  const auto found = script.find(name);
  if (found == script.end()) throw UsageError(std::string("hvdb_replay_channel was not called for ") + name);
  return found->second;
}

hvdb_status yes_or_timeout(bool yes) { return yes ? HVDB_OK : HVDB_TIMEOUT; }

DataType data_type(int value) {
  if (value < 0 || value >= data_type_count) throw UsageError("there is no element type " + std::to_string(value));
  return static_cast<DataType>(value);
}

}  // namespace

const char* hvdb_last_error(void) { return last_error.c_str(); }

hvdb_status hvdb_hub_create(int size, int takes_device_memory, hvdb_hub** hub) {
  return guarded([&] {
    if (size < 1) throw UsageError("a hub needs at least one rank, given " + std::to_string(size));
    *hub = new hvdb_hub{std::make_shared<Hub>(size, takes_device_memory != 0)};
    return HVDB_OK;
  });
}

void hvdb_hub_destroy(hvdb_hub* hub) { delete hub; }

hvdb_status hvdb_engine_create_mpi(const void* mpi_comm, const hvdb_settings* settings, hvdb_engine** engine) {
  return guarded([&] {
    auto created = std::make_unique<hvdb_engine>();
    MpiTransportOptions options;
    if (settings != nullptr && settings->host_for_device != 0) options.takes_device_memory = true;
    created->engine = std::make_unique<Engine>(make_mpi_transport(mpi_comm, options), engine_settings(settings));
    *engine = created.release();
    return HVDB_OK;
  });
}

hvdb_status hvdb_engine_create_in_process(hvdb_hub* hub, int rank, const hvdb_settings* settings,
                                          hvdb_engine** engine) {
  return guarded([&] {
    if (rank < 0 || rank >= hub->hub->size()) throw UsageError("the hub has no rank " + std::to_string(rank));
    auto created = std::make_unique<hvdb_engine>();
    created->engine = std::make_unique<Engine>(make_in_process_transport(hub->hub, rank), engine_settings(settings));
    *engine = created.release();
    return HVDB_OK;
  });
}

void hvdb_engine_destroy(hvdb_engine* engine) {
  if (engine && !engine->engine->in_forked_child()) delete engine;
}

int hvdb_rank(const hvdb_engine* engine) { return engine->engine->rank(); }
int hvdb_size(const hvdb_engine* engine) { return engine->engine->size(); }

int hvdb_survives_losses(const hvdb_engine* engine) { return engine->engine->survives_losses() ? 1 : 0; }

hvdb_status hvdb_lost(hvdb_engine* engine, int most, int32_t* ranks, int* count) {
  return guarded([&] {
    const Ranks lost = engine->engine->lost();
    *count = std::min(most, static_cast<int>(lost.size()));
    std::copy_n(lost.begin(), *count, ranks);
    return HVDB_OK;
  });
}

hvdb_status hvdb_replay_channel(hvdb_engine* engine, const char* channel, const char* description) {
  return guarded([&] {
    engine->engine->edit_script([&](Script& script) { script.try_emplace(channel, text(description)); });
    return HVDB_OK;
  });
}

hvdb_status hvdb_replay_decision(hvdb_engine* engine, const char* channel, int64_t step, int scope, int required,
                                 int contributors, const int32_t* ranks, const double* weights, const void* metadata,
                                 size_t metadata_size) {
  return guarded([&] {
    ScriptedDecision decision{{ranks, ranks + contributors}, {weights, weights + contributors}, {}, required};
    decision.metadata = blob(metadata, metadata_size);
    engine->engine->edit_script(
        [&](Script& script) { channel_of(script, channel).add_decision(step, scope, std::move(decision)); });
    return HVDB_OK;
  });
}

hvdb_status hvdb_replay_drop(hvdb_engine* engine, const char* channel, int64_t step, int scope, int rank) {
  return guarded([&] {
    engine->engine->edit_script([&](Script& script) { channel_of(script, channel).add_drop(step, scope, rank); });
    return HVDB_OK;
  });
}

hvdb_status hvdb_replay_round_end(hvdb_engine* engine, const char* channel, int64_t step) {
  return guarded([&] {
    engine->engine->edit_script([&](Script& script) { channel_of(script, channel).add_round_end(step); });
    return HVDB_OK;
  });
}

hvdb_status hvdb_recorded(hvdb_engine* engine, int64_t last, const char** text) {
  return guarded([&] {
    engine->recorded = engine->engine->recorded(last);
    *text = engine->recorded.c_str();
    return HVDB_OK;
  });
}

hvdb_status hvdb_use_device(hvdb_engine* engine, void* device, const char* means, int journal_on_device) {
  return guarded([&] {
    engine->engine->use_device(*static_cast<Device*>(device), text(means), journal_on_device != 0);
    return HVDB_OK;
  });
}

int hvdb_takes_device_memory(const hvdb_engine* engine) { return engine->engine->takes_device_memory() ? 1 : 0; }

hvdb_status hvdb_pause(hvdb_engine* engine) {
  return guarded([&] {
    engine->engine->pause();
    return HVDB_OK;
  });
}

hvdb_status hvdb_join(hvdb_engine* engine) {
  return guarded([&] {
    engine->engine->join();
    return HVDB_OK;
  });
}

hvdb_status hvdb_joined(hvdb_engine* engine, int64_t timeout_us, int* last_rank) {
  return guarded([&] { return yes_or_timeout(engine->engine->joined(timeout_us, last_rank)); });
}

hvdb_status hvdb_leave_for_good(hvdb_engine* engine, const char* failure) {
  return guarded([&] {
    engine->engine->leave_for_good(text(failure));
    return HVDB_OK;
  });
}

hvdb_status hvdb_shut_down(hvdb_engine* engine, int64_t timeout_us) {
  return guarded([&] { return yes_or_timeout(engine->engine->shut_down(timeout_us)); });
}

hvdb_status hvdb_open(hvdb_engine* engine, const hvdb_channel_spec* spec, hvdb_channel** channel) {
  return guarded([&] {
    ChannelSpec own;
    own.name = text(spec->name);
    own.kind = spec->kind == HVDB_COLLECTIVE ? ChannelKind::collective : ChannelKind::training;
    own.description = text(spec->description);
    own.proposal = blob(spec->proposal, spec->proposal_size);
    own.options = {spec->required, spec->grace_us,       spec->max_misses,
                   spec->max_lag,  spec->automatic != 0, spec->resync != 0};
    own.arrive_first = spec->arrive_first != 0;
    own.drop_nonfinite = spec->drop_nonfinite != 0;
    own.wait_for_all = spec->wait_for_all != 0;
    own.average = spec->average != 0;
    own.on_device = spec->on_device != 0;
    auto created = std::make_unique<hvdb_channel>();
    created->engine = engine->engine.get();
    created->channel = &engine->engine->open(own);
    *channel = created.get();
    engine->channels.push_back(std::move(created));
    return HVDB_OK;
  });
}

hvdb_status hvdb_opened(hvdb_channel* channel, int64_t timeout_us) {
  return guarded([&] { return yes_or_timeout(channel->engine->opened(*channel->channel, timeout_us)); });
}

hvdb_status hvdb_proposal(hvdb_channel* channel, const void** data, size_t* size) {
  return guarded([&] {
    channel->proposal = channel->engine->view(*channel->channel).proposal;
    *data = channel->proposal.data();
    *size = channel->proposal.size();
    return HVDB_OK;
  });
}

hvdb_status hvdb_set_layout(hvdb_channel* channel, int buckets, const uint64_t* counts, const int* dtypes,
                            const int* scopes, const int* on_device) {
  return guarded([&] {
    std::vector<BucketLayout> layout;
    for (int b = 0; b < buckets; ++b) {
      layout.push_back({counts[b], data_type(dtypes[b]), scopes[b], on_device != nullptr && on_device[b] != 0});
    }
    channel->engine->set_layout(*channel->channel, layout);
    return HVDB_OK;
  });
}

hvdb_status hvdb_set_results(hvdb_channel* channel, int buckets, void* const* results) {
  return guarded([&] {
    channel->engine->set_results(*channel->channel, {results, results + buckets});
    return HVDB_OK;
  });
}

hvdb_status hvdb_measure(hvdb_channel* channel, int buckets) {
  return guarded([&] {
    channel->engine->measure(*channel->channel, buckets);
    return HVDB_OK;
  });
}

hvdb_status hvdb_begin(hvdb_channel* channel, double samples, const void* metadata, size_t metadata_size) {
  return guarded([&] {
    channel->engine->begin(*channel->channel, samples, blob(metadata, metadata_size));
    return HVDB_OK;
  });
}

hvdb_status hvdb_submit(hvdb_channel* channel, int bucket, const void* contribution, void* result, int wait_follows) {
  return guarded([&] {
    channel->engine->submit(*channel->channel, bucket, contribution, result, wait_follows != 0);
    return HVDB_OK;
  });
}

hvdb_status hvdb_submit_on_device(hvdb_channel* channel, int bucket, const void* contribution, void* result,
                                  const void* device_contribution, void* device_result, void* stream, int finite,
                                  int wait_follows) {
  return guarded([&] {
    channel->engine->submit(*channel->channel, bucket, contribution, result,
                            OnDevice{device_contribution, device_result, finite != 0, {}}, stream, wait_follows != 0);
    return HVDB_OK;
  });
}

hvdb_status hvdb_wait(hvdb_channel* channel, int64_t timeout_us, hvdb_update** update) {
  return guarded([&] {
    if (!update) return yes_or_timeout(channel->engine->wait(*channel->channel, timeout_us, nullptr));
    auto taken = std::make_unique<hvdb_update>();
    if (!channel->engine->wait(*channel->channel, timeout_us, &taken->update)) return HVDB_TIMEOUT;
    *update = taken.release();
    return HVDB_OK;
  });
}

hvdb_status hvdb_hold(hvdb_channel* channel) {
  return guarded([&] {
    channel->engine->hold(*channel->channel);
    return HVDB_OK;
  });
}

hvdb_status hvdb_commit(hvdb_channel* channel) {
  return guarded([&] {
    channel->engine->commit(*channel->channel);
    return HVDB_OK;
  });
}

hvdb_status hvdb_begin_round(hvdb_channel* channel, int64_t length, int64_t align_every) {
  return guarded([&] {
    channel->engine->begin_round(*channel->channel, length, align_every);
    return HVDB_OK;
  });
}

hvdb_status hvdb_away(hvdb_channel* channel) {
  return guarded([&] {
    channel->engine->away(*channel->channel);
    return HVDB_OK;
  });
}

hvdb_status hvdb_leave(hvdb_channel* channel) {
  return guarded([&] {
    channel->engine->leave(*channel->channel);
    return HVDB_OK;
  });
}

hvdb_status hvdb_offer_state(hvdb_channel* channel, int parts, const void* const* data, const uint64_t* sizes) {
  return guarded([&] {
    std::vector<std::span<const std::byte>> all;
    for (int i = 0; i < parts; ++i) all.emplace_back(static_cast<const std::byte*>(data[i]), sizes[i]);
    channel->engine->offer_state(*channel->channel, all);
    return HVDB_OK;
  });
}

hvdb_status hvdb_state(hvdb_channel* channel, const void** data, uint64_t* size) {
  return guarded([&] {
    const auto state = channel->engine->state_taken_over(*channel->channel);
    *data = state.data();
    *size = state.size();
    return HVDB_OK;
  });
}

hvdb_status hvdb_announce_waiting(hvdb_channel* channel) {
  return guarded([&] {
    channel->engine->announce_waiting(*channel->channel);
    return HVDB_OK;
  });
}

hvdb_status hvdb_close(hvdb_channel* channel, int64_t timeout_us) {
  return guarded([&] { return yes_or_timeout(channel->engine->close(*channel->channel, timeout_us)); });
}

hvdb_status hvdb_view(hvdb_channel* channel, hvdb_channel_view* view) {
  return guarded([&] {
    const Engine::View own = channel->engine->view(*channel->channel);
    *view = {own.step,
             own.round_end.value_or(-1),
             own.round_over ? 1 : 0,
             own.counters.contributed,
             own.counters.dropped,
             own.counters.caught_up,
             own.counters.resynced,
             own.journal_bytes,
             own.round_start,
             own.state_wanted ? 1 : 0,
             own.state_wanted_at_exit ? 1 : 0};
    return HVDB_OK;
  });
}

hvdb_update_kind hvdb_update_get_kind(const hvdb_update* update) {
  switch (update->update.kind) {
    case Update::Kind::update:
      return HVDB_UPDATE;
    case Update::Kind::resume:
      return HVDB_RESUME;
    case Update::Kind::over:
      return HVDB_OVER;
    case Update::Kind::offer:
      return HVDB_OFFER;
    case Update::Kind::resync:
      return HVDB_RESYNC;
  }
  return HVDB_OVER;
}

int64_t hvdb_update_step(const hvdb_update* update) { return update->update.step; }
int hvdb_update_contributed(const hvdb_update* update) { return update->update.contributed ? 1 : 0; }
double hvdb_update_samples(const hvdb_update* update) { return update->update.samples; }
int hvdb_update_required(const hvdb_update* update) { return update->update.required; }
int hvdb_update_scopes(const hvdb_update* update) { return static_cast<int>(update->update.contributors.size()); }

const int32_t* hvdb_update_contributors(const hvdb_update* update, int scope, int* count) {
  const Ranks& ranks = update->update.contributors[static_cast<std::size_t>(scope)];
  *count = static_cast<int>(ranks.size());
  return ranks.data();
}

const void* hvdb_update_metadata(const hvdb_update* update, size_t* size) {
  *size = update->update.metadata.size();
  return update->update.metadata.data();
}

void hvdb_update_destroy(hvdb_update* update) { delete update; }

hvdb_status hvdb_weighted_sum(int dtype, void* destination, int sources, const void* const* source,
                              const double* weights, double scale, uint64_t count) {
  return guarded([&] {
    const auto k = static_cast<std::size_t>(sources);
    weighted_sum(data_type(dtype), destination, std::span(source, k), std::span(weights, k), scale, count);
    return HVDB_OK;
  });
}

hvdb_status hvdb_forecast(const double* us, uint64_t steps, int ranks, int required, double tail_us, double catch_up_us,
                          int carry_over, double* update_us, double* contributed) {
  return guarded([&] {
    if (ranks < 1) throw UsageError("forecast: given " + std::to_string(ranks) + " ranks, expected at least 1");
    const ComputingTimes times{ranks, std::span(us, steps * static_cast<std::size_t>(ranks))};
    const Forecast found = forecast(times, {required, tail_us, catch_up_us, carry_over != 0});
    *update_us = found.update_us;
    std::copy(found.contributed.begin(), found.contributed.end(), contributed);
    return HVDB_OK;
  });
}

const char* hvdb_kernel_instruction_set(void) { return kernel_instruction_set(); }

const char* hvdb_mpi_library_version(void) {
  static const std::string version = mpi_library_version();
  return version.c_str();
}

const char* hvdb_mpi_built_with(void) { return HVD_BACKUP_BUILT_WITH_MPI; }

const hvdb_functions* hvdb_function_table(void) {
  static const hvdb_functions table = {HVDB_FUNCTIONS_ABI,
                                       hvdb_last_error,
                                       hvdb_begin,
                                       hvdb_submit,
                                       hvdb_submit_on_device,
                                       hvdb_wait,
                                       hvdb_update_get_kind,
                                       hvdb_update_step,
                                       hvdb_update_contributed,
                                       hvdb_update_samples,
                                       hvdb_update_required,
                                       hvdb_update_scopes,
                                       hvdb_update_contributors,
                                       hvdb_update_metadata,
                                       hvdb_update_destroy};
  return &table;
}
