// The ops of tensorflow_ops.cpp for gradients that the engine gets where they are, on a GPU: one flat tensor for each
// bucket, made and taken apart by TensorFlow's own operations.
//
//   HvdBackupSubmitOnDevice      hands one bucket over, made by what was begun on TensorFlow's stream until now
//   HvdBackupNextUpdateOnDevice  gives the next update: its own as it lies on the GPU, missed ones from host memory
//
// The host waits for the GPU in neither.
#include <tensorflow/core/framework/device.h>
#include <tensorflow/core/framework/op.h>
#include <tensorflow/core/framework/op_kernel.h>
#include <tensorflow/core/framework/shape_inference.h>
#include <xla/stream_executor/stream.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/tensorflow_ops.h"

namespace {

using hvd_backup::bytes_of;
using hvd_backup::find_stream;
using hvd_backup::Outcome;
using hvd_backup::Stream;
namespace tf = tensorflow;

// Of one bucket. Memory that TensorFlow gives back it gives out again in the order of its stream, so the result may be
// written to once that has come as far as it had when the bucket was handed over, which is what the engine waits for.
struct OnDevice {
  tf::Tensor contribution;
  tf::Tensor result;
};

// Where TensorFlow's work on the GPU goes (a cudaStream_t).
void* compute_stream(tf::OpKernelContext* context) {
  return context->op_device_context()->stream()->platform_specific_handle().stream;
}

class SubmitOnDevice : public tf::OpKernel {
 public:
  explicit SubmitOnDevice(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("stream", &number_));
    OP_REQUIRES_OK(context, context->GetAttr("bucket", &bucket_));
  }

  void Compute(tf::OpKernelContext* context) override {
    const auto stream = find_stream(number_);
    OP_REQUIRES(context, stream != nullptr, absl::FailedPreconditionError(hvd_backup::stream_is_gone));
    const tf::Tensor& hyperparameters = context->input(0);
    OP_REQUIRES(context, hyperparameters.NumElements() == static_cast<std::int64_t>(stream->hyperparameters()),
                absl::InvalidArgumentError("hvd_backup: wrong number of hyperparameters"));
    const auto tensors = std::make_shared<OnDevice>();
    tensors->contribution = context->input(2);
    OP_REQUIRES(context, bytes_of(tensors->contribution) == stream->buckets()[static_cast<std::size_t>(bucket_)].bytes,
                absl::InvalidArgumentError("hvd_backup: the gradients of bucket " + std::to_string(bucket_) +
                                           " have other shapes than their variables"));
    OP_REQUIRES_OK(context, context->allocate_temp(tensors->contribution.dtype(), tensors->contribution.shape(),
                                                   &tensors->result));
    const std::string error =
        stream->submit_on_device(bucket_,
                                 {tensors->contribution.data(), tensors->result.data(), compute_stream(context),
                                  context->input(1).scalar<bool>()(), tensors},
                                 hyperparameters.flat<double>().data());
    OP_REQUIRES(context, error.empty(), hvd_backup::failure(error));
  }

 private:
  std::int64_t number_;
  int bucket_;
};

class NextUpdateOnDevice : public tf::AsyncOpKernel {
 public:
  explicit NextUpdateOnDevice(tf::OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("stream", &number_));
    OP_REQUIRES_OK(context, context->GetAttr("counts", &counts_));
  }

  void ComputeAsync(tf::OpKernelContext* context, DoneCallback done) override {
    const auto stream = find_stream(number_);
    OP_REQUIRES_ASYNC(context, stream != nullptr, absl::FailedPreconditionError(hvd_backup::stream_is_gone), done);
    // Not shared with the callback: the stream's thread must not be the one to destroy the stream.
    Stream* const taken = stream.get();
    stream->take([this, context, taken, done = std::move(done)](const Outcome& outcome) {
      OP_REQUIRES_ASYNC(context, outcome.error.empty(), hvd_backup::failure(outcome.error), done);
      OP_REQUIRES_OK_ASYNC(context, hvd_backup::give_account(context, outcome), done);
      if (outcome.kind == HVDB_UPDATE && outcome.contributed) {
        for (std::size_t b = 0; b < counts_.size(); ++b) {
          context->set_output(output_of(b), static_cast<const OnDevice*>(outcome.on_device[b].get())->result);
        }
        done();
      } else {
        copy(context, *taken, outcome, done);
      }
    });
  }

 private:
  static int output_of(std::size_t bucket) { return static_cast<int>(2 + bucket); }

  // From host memory, whose buffers may change again at once.
  void copy(tf::OpKernelContext* context, const Stream& stream, const Outcome& outcome, const DoneCallback& done) {
    std::vector<tf::Tensor*> results;
    for (std::size_t b = 0; b < counts_.size(); ++b) {
      tf::Tensor* result = nullptr;
      OP_REQUIRES_OK_ASYNC(context, context->allocate_output(output_of(b), {counts_[b]}, &result), done);
      OP_REQUIRES_ASYNC(context, bytes_of(*result) == stream.buckets()[b].bytes,
                        absl::InternalError("hvd_backup: a bucket of another size than its gradients"), done);
      results.push_back(result);
    }
    std::vector<std::shared_ptr<tf::Tensor>> sources;
    for (std::size_t b = 0; b < counts_.size(); ++b) {
      tf::AllocatorAttributes page_locked;
      page_locked.set_on_host(true);
      page_locked.set_gpu_compatible(true);
      sources.push_back(std::make_shared<tf::Tensor>());
      OP_REQUIRES_OK_ASYNC(
          context, context->allocate_temp(results[b]->dtype(), results[b]->shape(), sources.back().get(), page_locked),
          done);
      fill(*sources.back(), stream, outcome, b);
    }
    const auto left = std::make_shared<std::atomic<std::size_t>>(counts_.size());
    for (std::size_t b = 0; b < counts_.size(); ++b) {
      context->op_device_context()->CopyCPUTensorToDevice(
          sources[b].get(), static_cast<tf::Device*>(context->device()), results[b],
          [context, done, left, source = sources[b]](const absl::Status& status) {
            if (!status.ok()) context->SetStatus(status);
            if (--*left == 0) done();
          });
    }
  }

  static void fill(tf::Tensor& tensor, const Stream& stream, const Outcome& outcome, std::size_t bucket) {
    const std::uint64_t bytes = stream.buckets()[bucket].bytes;
    if (bytes == 0) return;
    if (hvd_backup::is_filled(outcome, bucket)) {
      std::memcpy(tensor.data(), stream.buckets()[bucket].result, bytes);
    } else {
      std::memset(tensor.data(), 0, bytes);
    }
  }

  std::int64_t number_;
  std::vector<std::int64_t> counts_;
};

REGISTER_OP("HvdBackupSubmitOnDevice")
    .Input("hyperparameters: double")
    .Input("finite: bool")
    .Input("contribution: dtype")
    .Attr("stream: int")
    .Attr("bucket: int")
    .Attr("dtype: {half, bfloat16, float, double}")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext*) { return absl::OkStatus(); })
    .Doc("Hands one bucket of gradients on a GPU over to hvd_backup.");

REGISTER_OP("HvdBackupNextUpdateOnDevice")
    .Output("kind: int32")
    .Output("hyperparameters: double")
    .Output("results: dtypes")
    .Attr("stream: int")
    .Attr("dtypes: list({half, bfloat16, float, double}) >= 1")
    .Attr("counts: list(int) >= 1")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* context) {
      std::vector<std::int64_t> counts;
      TF_RETURN_IF_ERROR(context->GetAttr("counts", &counts));
      context->set_output(0, context->Scalar());
      context->set_output(1, context->Vector(context->UnknownDim()));
      for (std::size_t b = 0; b < counts.size(); ++b) {
        context->set_output(static_cast<int>(2 + b), context->Vector(counts[b]));
      }
      return absl::OkStatus();
    })
    .Doc("As HvdBackupNextUpdate, with each bucket's gradients in one tensor on a GPU.");

REGISTER_KERNEL_BUILDER(
    Name("HvdBackupSubmitOnDevice").Device(tf::DEVICE_GPU).HostMemory("hyperparameters").HostMemory("finite"),
    SubmitOnDevice);
REGISTER_KERNEL_BUILDER(
    Name("HvdBackupNextUpdateOnDevice").Device(tf::DEVICE_GPU).HostMemory("kind").HostMemory("hyperparameters"),
    NextUpdateOnDevice);

}  // namespace
