// A channel as TensorFlow's ops use it: gradients go in bucket by bucket, updates come out through a callback. The ops
// (tensorflow_ops.cpp) find a stream by its number, which is an attribute of theirs; Python makes and closes streams
// (hvd_backup/tensorflow/streams.py) through the C functions at the end.
//
// Threads: each stream has a thread that does nothing but wait for the engine, so that no thread of TensorFlow's
// executor ever does. Buffers: Python's, alive until hvdb_tf_close() has returned; those on a GPU are the ops', kept
// here. No Python, no GIL.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "api/hvd_backup.h"

namespace hvd_backup {

// What waiting has given: an error, or an update. Or it was given up because of Ctrl-C: then the op succeeds with
// nothing to apply, so that TensorFlow returns to Python, which raises KeyboardInterrupt. (A failure would be made an
// exception first, by Python code, in which KeyboardInterrupt would come where TensorFlow does not expect it.)
struct Outcome {
  std::string error;
  bool given_up = false;
  hvdb_update_kind kind = HVDB_OVER;
  bool contributed = false;
  std::vector<std::vector<std::int32_t>> contributors;  // of each scope
  std::vector<double> hyperparameters;                  // NaN where the update brings none
  std::vector<std::shared_ptr<void>> on_device;  // of each bucket, BucketOnDevice::tensors of what was handed over
};

struct BucketMemory {
  void* contribution;
  void* result;
  std::uint64_t bytes;
};

// Where a bucket lies on the GPU, handed over from and to there.
struct BucketOnDevice {
  const void* contribution;
  void* result;
  void* compute_stream;           // what was begun on it until now makes the contribution; null: it is there
  bool finite;                    // holds neither NaN nor infinity, if the channel wants to know
  std::shared_ptr<void> tensors;  // keep both alive
};

// For good: memory that the engine may go on to use for a while, as the program ends.
void keep(std::shared_ptr<void> memory);

class Stream {
 public:
  using Done = std::function<void(const Outcome&)>;

  Stream(const hvdb_functions& core, hvdb_channel* channel, std::vector<BucketMemory> buckets,
         std::vector<std::string> hyperparameters);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const std::vector<BucketMemory>& buckets() const { return buckets_; }
  std::size_t hyperparameters() const { return names_.size(); }
  void set_samples(double samples);
  // Copies nothing: bucket `index` is handed over from and to these addresses. The first one of a step sends the
  // hyperparameters along. Returns the error, empty when there is none. Does nothing when a wait was given up just now.
  // take_follows: at once, so that the engine's own thread need not be told.
  std::string submit(int index, const void* contribution, void* result, const double* hyperparameters,
                     bool take_follows);
  // The same for a bucket on the GPU, of which nothing is waited for; besides, it has its buffers in host memory. Its
  // tensors are kept until there is an outcome, which has them; if there is none, after a failure or Ctrl-C, for good.
  std::string submit_on_device(int index, BucketOnDevice bucket, const double* hyperparameters);
  // Calls `done` from this stream's thread when there is an update to take; at once if another call is under way.
  void take(Done done);
  // What the last update was, as JSON, for Python.
  std::string last_update();

 private:
  std::string submit(const double* hyperparameters, const std::function<hvdb_status()>& hand_over);
  void run();
  Outcome wait();
  std::string metadata(const double* values) const;
  std::vector<double> values_of(const std::string& metadata) const;

  const hvdb_functions& core_;
  hvdb_channel* const channel_;
  const std::vector<BucketMemory> buckets_;
  const std::vector<std::string> names_;  // of the hyperparameters

  std::mutex mutex_;
  std::condition_variable called_;
  Done task_;
  bool busy_ = false;
  bool closed_ = false;
  bool interrupted_ = false;  // a wait was given up: what was handed over is still the engine's
  bool begun_ = false;        // a contribution is under way
  bool in_step_ = false;      // since a contribution, until its update or that there is none
  double samples_ = 1.0;
  std::vector<std::shared_ptr<void>> on_device_;  // by bucket, of the contribution that is under way
  std::int64_t calls_ = 0;                        // steps that have ended
  std::int64_t leftovers_ = 0;                    // of them, those whose round was over
  std::string kind_;                              // what the last take has found: update, resume or over
  std::int64_t caught_up_ = 0;                    // updates without this rank since the last step ended
  std::string account_;                           // of the last update
  std::string ending_;                            // of the last step
  std::thread thread_;
};

// The stream with this number; null when there is none (any more).
std::shared_ptr<Stream> find_stream(std::int64_t number);

}  // namespace hvd_backup
