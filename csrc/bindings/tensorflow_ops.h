// What TensorFlow's ops have in common: those on host memory (tensorflow_ops.cpp), those on a GPU's
// (tensorflow_device_ops.cpp).
#pragma once

#include <tensorflow/core/framework/op_kernel.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "bindings/tensorflow_stream.h"

namespace hvd_backup {

inline constexpr char stream_is_gone[] =
    "hvd_backup: this function was traced with an optimizer or a collective of hvd_backup from before shutdown(): make "
    "it anew after init()";

inline absl::Status failure(const std::string& reason) { return absl::AbortedError("hvd_backup: " + reason); }

inline std::uint64_t bytes_of(const tensorflow::Tensor& tensor) {
  return static_cast<std::uint64_t>(tensor.NumElements()) *
         static_cast<std::uint64_t>(tensorflow::DataTypeSize(tensor.dtype()));
}

// The kinds of an update, as hvd_backup/keras/tensorflow_updates.py knows them.
enum Kind : std::int32_t { nothing = 0, missed = 1, own = 2, offer = 3, resync = 4 };

// The first two outputs of an op that gives an update: its kind, and the hyperparameters that have come with it.
inline absl::Status give_account(tensorflow::OpKernelContext* context, const Outcome& outcome) {
  tensorflow::Tensor* kind = nullptr;
  TF_RETURN_IF_ERROR(context->allocate_output(0, {}, &kind));
  kind->scalar<std::int32_t>()() = outcome.kind == HVDB_UPDATE   ? (outcome.contributed ? own : missed)
                                   : outcome.kind == HVDB_OFFER  ? offer
                                   : outcome.kind == HVDB_RESYNC ? resync
                                                                 : nothing;
  tensorflow::Tensor* hyperparameters = nullptr;
  const auto count = static_cast<std::int64_t>(outcome.hyperparameters.size());
  TF_RETURN_IF_ERROR(context->allocate_output(1, {count}, &hyperparameters));
  std::copy(outcome.hyperparameters.begin(), outcome.hyperparameters.end(), hyperparameters->flat<double>().data());
  return absl::OkStatus();
}

// Whether this bucket has a result. Otherwise there is no update, or all contributors of the bucket have withdrawn: it
// counts as zero.
inline bool is_filled(const Outcome& outcome, std::size_t bucket) {
  const auto& scopes = outcome.contributors;
  return outcome.kind == HVDB_UPDATE && !scopes[scopes.size() == 1 ? 0 : bucket].empty();
}

}  // namespace hvd_backup
