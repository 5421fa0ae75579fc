#include "bindings/tensorflow_stream.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <sstream>
#include <utility>

#include "bindings/tensorflow_interrupt.h"

namespace hvd_backup {

namespace {

constexpr std::int64_t slice_us = 100'000;  // between two looks for the end of the stream
constexpr char interrupted[] =
    "Ctrl-C has ended the wait for the other ranks in the middle of an update, so this rank can take part in it no "
    "more: end the program, or begin anew with new optimizers on all ranks";
constexpr char under_way[] = "it is under way already: give collectives that may run at the same time different names";

struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<Stream>> streams;
  std::int64_t next = 1;
};

// Never destroyed: at the end of the process a thread of a stream may still be asleep.
Registry& registry() {
  static auto* const one = new Registry;
  return *one;
}

}  // namespace

void keep(std::shared_ptr<void> memory) {
  static auto* const kept = new std::vector<std::shared_ptr<void>>;
  static auto* const mutex = new std::mutex;
  const std::scoped_lock lock(*mutex);
  kept->push_back(std::move(memory));
}

std::shared_ptr<Stream> find_stream(std::int64_t number) {
  const std::scoped_lock lock(registry().mutex);
  const auto found = registry().streams.find(number);
  return found == registry().streams.end() ? nullptr : found->second;
}

Stream::Stream(const hvdb_functions& core, hvdb_channel* channel, std::vector<BucketMemory> buckets,
               std::vector<std::string> hyperparameters)
    : core_(core),
      channel_(channel),
      buckets_(std::move(buckets)),
      names_(std::move(hyperparameters)),
      on_device_(buckets_.size()),
      thread_([this] { run(); }) {}

Stream::~Stream() {
  {
    const std::scoped_lock lock(mutex_);
    closed_ = true;
  }
  called_.notify_all();
  thread_.join();
  for (auto& tensors : on_device_) {
    if (tensors) keep(std::move(tensors));
  }
}

void Stream::set_samples(double samples) {
  const std::scoped_lock lock(mutex_);
  samples_ = samples;
}

std::string Stream::submit(int index, const void* contribution, void* result, const double* hyperparameters,
                           bool take_follows) {
  return submit(hyperparameters,
                [&] { return core_.submit(channel_, index, contribution, result, take_follows ? 1 : 0); });
}

std::string Stream::submit_on_device(int index, BucketOnDevice bucket, const double* hyperparameters) {
  const auto number = static_cast<std::size_t>(index);
  return submit(hyperparameters, [&] {
    const BucketMemory& host = buckets_[number];
    const hvdb_status status =
        core_.submit_on_device(channel_, index, host.contribution, host.result, bucket.contribution, bucket.result,
                               bucket.compute_stream, bucket.finite ? 1 : 0, 0);
    if (status == HVDB_OK) on_device_[number] = std::move(bucket.tensors);
    return status;
  });
}

std::string Stream::submit(const double* hyperparameters, const std::function<hvdb_status()>& hand_over) {
  const std::scoped_lock lock(mutex_);
  if (busy_) return under_way;
  if (interrupted_) return interrupt_waits() ? "" : interrupted;
  if (!begun_) {
    const std::string sent = metadata(hyperparameters);
    if (core_.begin(channel_, samples_, sent.data(), sent.size()) != HVDB_OK) return core_.last_error();
    begun_ = in_step_ = true;
  }
  return hand_over() == HVDB_OK ? "" : core_.last_error();
}

void Stream::take(Done done) {
  bool refused;
  {
    const std::scoped_lock lock(mutex_);
    refused = busy_ || closed_;
    if (!refused) {
      busy_ = true;
      task_ = std::move(done);
    }
  }
  if (refused) {
    Outcome outcome;
    outcome.error = under_way;
    done(outcome);
    return;
  }
  called_.notify_one();
}

std::string Stream::last_update() {
  const std::scoped_lock lock(mutex_);
  const bool missed = caught_up_ > 0;  // while its functions run, an update says how many came before it
  const std::string ending =
      missed ? "\"caught_up\": " + std::to_string(caught_up_ - 1) + ", \"dropped\": false" : ending_;
  return "{\"calls\": " + std::to_string(calls_) + ", \"leftovers\": " + std::to_string(leftovers_) + ", \"kind\": \"" +
         kind_ + "\"" + (account_.empty() ? "" : ", ") + account_ + (ending.empty() ? "" : ", ") + ending + "}";
}

void Stream::run() {
  while (true) {
    Done done;
    {
      std::unique_lock lock(mutex_);
      called_.wait(lock, [this] { return closed_ || task_; });
      if (!task_) return;
      done = std::exchange(task_, nullptr);
    }
    Outcome outcome = wait();
    {
      const std::scoped_lock lock(mutex_);
      busy_ = false;
      if (outcome.kind == HVDB_RESYNC) begun_ = false;  // what was contributed has been dropped
      if (outcome.error.empty() && !outcome.given_up && outcome.kind != HVDB_OFFER) {
        outcome.on_device = std::exchange(on_device_, std::vector<std::shared_ptr<void>>(buckets_.size()));
      }
      const bool is_between = outcome.kind == HVDB_OFFER || outcome.kind == HVDB_RESYNC;
      if (is_between) kind_ = outcome.kind == HVDB_OFFER ? "offer" : "resync";
      if (outcome.error.empty() && !outcome.given_up && !is_between) {
        const bool missed = outcome.kind == HVDB_UPDATE && !outcome.contributed;
        caught_up_ += missed ? 1 : 0;
        kind_ = outcome.kind == HVDB_UPDATE ? "update" : outcome.kind == HVDB_OVER ? "over" : "resume";
        begun_ = false;  // a late rank's contribution has been dropped with the first update that it gets
        if (!missed) {
          if (in_step_) {
            ++calls_;
            leftovers_ += outcome.kind == HVDB_OVER && caught_up_ == 0 ? 1 : 0;
            ending_ = "\"caught_up\": " + std::to_string(caught_up_) +
                      ", \"dropped\": " + (outcome.contributed ? "false" : "true");
          }
          in_step_ = false;
          caught_up_ = 0;
        }
      }
    }
    done(outcome);
  }
}

Outcome Stream::wait() {
  Outcome outcome;
  outcome.hyperparameters.assign(names_.size(), std::numeric_limits<double>::quiet_NaN());
  {
    const std::scoped_lock lock(mutex_);
    if (interrupted_) {
      outcome.given_up = interrupt_waits();
      outcome.error = outcome.given_up ? "" : interrupted;
      return outcome;
    }
  }
  hvdb_update* update = nullptr;
  hvdb_status status = HVDB_TIMEOUT;
  int waits = 0;  // how often in a row there was an interrupt that nobody has heard
  while (status == HVDB_TIMEOUT) {
    {
      const std::scoped_lock lock(mutex_);
      if (closed_) {
        outcome.error = "hvd_backup was shut down meanwhile";
        return outcome;
      }
    }
    status = core_.wait(channel_, slice_us, &update);
    waits = status == HVDB_TIMEOUT && interrupt_waits() ? waits + 1 : 0;
    if (waits == 2) {  // for a whole slice, in which Python did not hear of it
      const std::scoped_lock lock(mutex_);
      interrupted_ = outcome.given_up = true;
      return outcome;
    }
  }
  if (status != HVDB_OK) {
    outcome.error = core_.last_error();
    return outcome;
  }
  outcome.kind = core_.update_get_kind(update);
  outcome.contributed = core_.update_contributed(update) != 0;
  std::ostringstream contributors;
  for (int scope = 0; scope < core_.update_scopes(update); ++scope) {
    int count = 0;
    const std::int32_t* ranks = core_.update_contributors(update, scope, &count);
    outcome.contributors.emplace_back(ranks, ranks + count);
    contributors << (scope ? ", [" : "[");
    for (int i = 0; i < count; ++i) contributors << (i ? ", " : "") << ranks[i];
    contributors << "]";
  }
  if (outcome.kind == HVDB_UPDATE) {
    size_t size = 0;
    const void* data = core_.update_metadata(update, &size);
    outcome.hyperparameters = values_of(std::string(static_cast<const char*>(data), data ? size : 0));
    std::ostringstream account;
    account.precision(17);
    account << "\"step\": " << core_.update_step(update) << ", \"required\": " << core_.update_required(update)
            << ", \"samples\": " << core_.update_samples(update)
            << ", \"contributed\": " << (outcome.contributed ? "true" : "false") << ", \"contributors\": ["
            << contributors.str() << "]";
    const std::scoped_lock lock(mutex_);
    account_ = account.str();
  }
  core_.update_destroy(update);
  return outcome;
}

// As JSON, because traces show it: {"learning_rate": 0.1}. 17 digits give every double back.
std::string Stream::metadata(const double* values) const {
  if (names_.empty()) return "";
  std::string text = "{";
  for (std::size_t i = 0; i < names_.size(); ++i) {
    char number[40];
    std::snprintf(number, sizeof number, "%.17g", values[i]);
    text += (i ? ", \"" : "\"") + names_[i] + "\": " + number;
  }
  return text + "}";
}

std::vector<double> Stream::values_of(const std::string& metadata) const {
  std::vector<double> values(names_.size(), std::numeric_limits<double>::quiet_NaN());
  for (std::size_t i = 0; i < names_.size(); ++i) {
    const std::string key = "\"" + names_[i] + "\": ";
    const std::size_t at = metadata.find(key);
    if (at != std::string::npos) values[i] = std::strtod(metadata.c_str() + at + key.size(), nullptr);
  }
  return values;
}

}  // namespace hvd_backup

// --- called by hvd_backup/tensorflow/streams.py through ctypes -----------------------------------------------------

#define HVD_BACKUP_TF_API extern "C" __attribute__((visibility("default")))

// functions: _core.function_table(). names: of the hyperparameters that travel with updates, separated by commas.
// contributions, results: nulls for streams of first-N collectives, whose tensors are handed over as they are. Returns
// the stream's number, or -1 when the core has another table of functions than this library was built for.
HVD_BACKUP_TF_API std::int64_t hvdb_tf_open(const void* functions, void* channel, int buckets,
                                            void* const* contributions, void* const* results,
                                            const std::uint64_t* bytes, const char* names) {
  using namespace hvd_backup;
  const auto* core = static_cast<const hvdb_functions*>(functions);
  if (core->abi != HVDB_FUNCTIONS_ABI) return -1;
  std::vector<BucketMemory> memory;
  for (int b = 0; b < buckets; ++b) {
    memory.push_back({contributions[b], results[b], bytes[b]});
  }
  std::vector<std::string> hyperparameters;
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');) hyperparameters.push_back(name);
  auto stream = std::make_shared<Stream>(*core, static_cast<hvdb_channel*>(channel), std::move(memory),
                                         std::move(hyperparameters));
  watch_for_interrupt();
  const std::scoped_lock lock(registry().mutex);
  const std::int64_t number = registry().next++;
  registry().streams[number] = std::move(stream);
  return number;
}

// Returns when the stream's thread has ended and no op uses its buffers any more.
HVD_BACKUP_TF_API void hvdb_tf_close(std::int64_t number) {
  std::shared_ptr<hvd_backup::Stream> stream;
  {
    const std::scoped_lock lock(hvd_backup::registry().mutex);
    const auto found = hvd_backup::registry().streams.find(number);
    if (found == hvd_backup::registry().streams.end()) return;
    stream = std::move(found->second);
    hvd_backup::registry().streams.erase(found);
  }
}

HVD_BACKUP_TF_API void hvdb_tf_set_samples(std::int64_t number, double samples) {
  if (const auto stream = hvd_backup::find_stream(number)) stream->set_samples(samples);
}

// See Stream::last_update. Belongs to the calling thread, until its next call.
HVD_BACKUP_TF_API const char* hvdb_tf_last_update(std::int64_t number) {
  static thread_local std::string text;
  const auto stream = hvd_backup::find_stream(number);
  text = stream ? stream->last_update() : "";
  return text.c_str();
}
