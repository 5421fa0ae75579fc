// TensorFlow's ops over streams (tensorflow_stream.h), for eager mode and inside tf.function. None of them needs the
// GIL, and none blocks a thread of the executor: what waits is an AsyncOpKernel, and its stream's thread calls done().
//
//   HvdBackupSubmit      packs the gradients of one bucket and hands them over
//   HvdBackupNextUpdate  gives the next update to apply, this rank's own or one that it has missed
//   HvdBackupFirstN      sums tensors over the first N ranks to arrive
//
// They take and give tensors in host memory; tensorflow_device_ops.cpp has those for gradients that stay on a GPU.
#include <tensorflow/core/framework/op.h>
#include <tensorflow/core/framework/op_kernel.h>
#include <tensorflow/core/framework/shape_inference.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/tensorflow_ops.h"

namespace {

using hvd_backup::bytes_of;
using hvd_backup::failure;
using hvd_backup::find_stream;
using hvd_backup::Outcome;
using hvd_backup::Stream;
using hvd_backup::stream_is_gone;
namespace tf = tensorflow;

class Submit : public tf::OpKernel {
 public:
  explicit Submit(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("stream", &number_));
    OP_REQUIRES_OK(context, context->GetAttr("bucket", &bucket_));
  }

  void Compute(tf::OpKernelContext* context) override {
    const auto stream = find_stream(number_);
    OP_REQUIRES(context, stream != nullptr, absl::FailedPreconditionError(stream_is_gone));
    const tf::Tensor& hyperparameters = context->input(0);
    OP_REQUIRES(context, hyperparameters.NumElements() == static_cast<std::int64_t>(stream->hyperparameters()),
                absl::InvalidArgumentError("hvd_backup: wrong number of hyperparameters"));
    const auto& bucket = stream->buckets()[static_cast<std::size_t>(bucket_)];
    auto* place = static_cast<char*>(bucket.contribution);
    std::uint64_t packed = 0;
    for (int i = 1; i < context->num_inputs(); ++i) {
      const tf::Tensor& gradient = context->input(i);
      const std::uint64_t bytes = bytes_of(gradient);
      OP_REQUIRES(context, packed + bytes <= bucket.bytes,
                  absl::InvalidArgumentError(
                      "hvd_backup: a gradient has another shape than its variable: " + gradient.shape().DebugString() +
                      ", number " + std::to_string(i - 1) + " of bucket " + std::to_string(bucket_)));
      if (bytes > 0) std::memcpy(place + packed, gradient.data(), bytes);
      packed += bytes;
    }
    OP_REQUIRES(context, packed == bucket.bytes,
                absl::InvalidArgumentError("hvd_backup: the gradients of bucket " + std::to_string(bucket_) +
                                           " have other shapes than their variables"));
    const std::string error =
        stream->submit(bucket_, bucket.contribution, bucket.result, hyperparameters.flat<double>().data(), false);
    OP_REQUIRES(context, error.empty(), failure(error));
  }

 private:
  std::int64_t number_;
  int bucket_;
};

class NextUpdate : public tf::AsyncOpKernel {
 public:
  explicit NextUpdate(tf::OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("stream", &number_));
    OP_REQUIRES_OK(context, context->GetAttr("shapes", &shapes_));
  }

  void ComputeAsync(tf::OpKernelContext* context, DoneCallback done) override {
    const auto stream = find_stream(number_);
    OP_REQUIRES_ASYNC(context, stream != nullptr, absl::FailedPreconditionError(stream_is_gone), done);
    // Not shared with the callback: the stream's thread must not be the one to destroy the stream.
    Stream* const taken = stream.get();
    stream->take([this, context, taken, done = std::move(done)](const Outcome& outcome) {
      OP_REQUIRES_ASYNC(context, outcome.error.empty(), failure(outcome.error), done);
      OP_REQUIRES_OK_ASYNC(context, give(context, *taken, outcome), done);
      done();
    });
  }

 private:
  absl::Status give(tf::OpKernelContext* context, const Stream& stream, const Outcome& outcome) {
    TF_RETURN_IF_ERROR(hvd_backup::give_account(context, outcome));
    std::size_t bucket = 0;
    std::uint64_t read = 0;
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      tf::Tensor* gradient = nullptr;
      TF_RETURN_IF_ERROR(context->allocate_output(static_cast<int>(2 + i), shapes_[i], &gradient));
      const std::uint64_t bytes = bytes_of(*gradient);
      if (bytes == 0) continue;
      if (read == stream.buckets()[bucket].bytes) {
        ++bucket;
        read = 0;
      }
      if (hvd_backup::is_filled(outcome, bucket)) {
        std::memcpy(gradient->data(), static_cast<const char*>(stream.buckets()[bucket].result) + read, bytes);
      } else {
        std::memset(gradient->data(), 0, bytes);
      }
      read += bytes;
    }
    return absl::OkStatus();
  }

  std::int64_t number_;
  std::vector<tf::TensorShape> shapes_;
};

class FirstN : public tf::AsyncOpKernel {
 public:
  explicit FirstN(tf::OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("stream", &number_));
  }

  void ComputeAsync(tf::OpKernelContext* context, DoneCallback done) override {
    const auto stream = find_stream(number_);
    OP_REQUIRES_ASYNC(context, stream != nullptr, absl::FailedPreconditionError(stream_is_gone), done);
    for (int i = 0; i < context->num_inputs(); ++i) {
      const tf::Tensor& tensor = context->input(i);
      const std::uint64_t bytes = bytes_of(tensor);
      OP_REQUIRES_ASYNC(
          context, bytes == stream->buckets()[static_cast<std::size_t>(i)].bytes,
          absl::InvalidArgumentError("hvd_backup: tensor " + std::to_string(i) + " has shape " +
                                     tensor.shape().DebugString() + ", another one than when the function was traced"),
          done);
    }
    for (int i = 0; i < context->num_inputs(); ++i) {
      const tf::Tensor& tensor = context->input(i);
      tf::Tensor* result = nullptr;
      OP_REQUIRES_OK_ASYNC(context, context->allocate_output(i, tensor.shape(), &result), done);
      const std::string error = stream->submit(i, tensor.data(), result->data(), nullptr, true);
      OP_REQUIRES_ASYNC(context, error.empty(), failure(error), done);
    }
    stream->take([context, done = std::move(done)](const Outcome& outcome) {
      if (!outcome.error.empty() || outcome.given_up) keep(context);
      OP_REQUIRES_ASYNC(context, outcome.error.empty(), failure(outcome.error), done);
      const auto ranks = outcome.given_up ? std::vector<std::int32_t>{} : outcome.contributors.front();
      tf::Tensor* contributors = nullptr;
      const auto count = static_cast<std::int64_t>(ranks.size());
      OP_REQUIRES_OK_ASYNC(context, context->allocate_output(context->num_inputs(), {count}, &contributors), done);
      std::copy(ranks.begin(), ranks.end(), contributors->flat<std::int32_t>().data());
      done();
    });
  }

 private:
  // After a failure, or when Ctrl-C has ended the wait, the engine may still use the buffers for a while: they are kept
  // for good, as the program ends.
  static void keep(tf::OpKernelContext* context) {
    for (int i = 0; i < context->num_inputs(); ++i) {
      hvd_backup::keep(std::make_shared<tf::Tensor>(context->input(i)));
      if (const tf::Tensor* result = context->mutable_output(i))
        hvd_backup::keep(std::make_shared<tf::Tensor>(*result));
    }
  }

  std::int64_t number_;
};

REGISTER_OP("HvdBackupSubmit")
    .Input("hyperparameters: double")
    .Input("gradients: dtypes")
    .Attr("stream: int")
    .Attr("bucket: int")
    .Attr("dtypes: list(type) >= 1")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext*) { return absl::OkStatus(); })
    .Doc("Hands one bucket of gradients over to hvd_backup.");

REGISTER_OP("HvdBackupNextUpdate")
    .Output("kind: int32")
    .Output("hyperparameters: double")
    .Output("gradients: dtypes")
    .Attr("stream: int")
    .Attr("dtypes: list(type) >= 1")
    .Attr("shapes: list(shape) >= 1")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* context) {
      std::vector<tf::PartialTensorShape> shapes;
      TF_RETURN_IF_ERROR(context->GetAttr("shapes", &shapes));
      context->set_output(0, context->Scalar());
      context->set_output(1, context->Vector(context->UnknownDim()));
      for (std::size_t i = 0; i < shapes.size(); ++i) {
        tf::shape_inference::ShapeHandle shape;
        TF_RETURN_IF_ERROR(context->MakeShapeFromPartialTensorShape(shapes[i], &shape));
        context->set_output(static_cast<int>(2 + i), shape);
      }
      return absl::OkStatus();
    })
    .Doc(
        "The next update of hvd_backup: kind 0: nothing to apply, 1: one that this rank has missed, 2: its own; \n"
        "3: the state of this rank is wanted, 4: that of another one is to be taken over.");

REGISTER_OP("HvdBackupFirstN")
    .Input("tensors: dtypes")
    .Output("results: dtypes")
    .Output("contributors: int32")
    .Attr("stream: int")
    .Attr("dtypes: list(type) >= 1")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* context) {
      const int tensors = context->num_inputs();
      for (int i = 0; i < tensors; ++i) context->set_output(i, context->input(i));
      context->set_output(tensors, context->Vector(context->UnknownDim()));
      return absl::OkStatus();
    })
    .Doc("Mean or sum of hvd_backup over the first N ranks to arrive, and who they are.");

REGISTER_KERNEL_BUILDER(Name("HvdBackupSubmit").Device(tf::DEVICE_CPU), Submit);
REGISTER_KERNEL_BUILDER(Name("HvdBackupNextUpdate").Device(tf::DEVICE_CPU), NextUpdate);
REGISTER_KERNEL_BUILDER(Name("HvdBackupFirstN").Device(tf::DEVICE_CPU), FirstN);

// On a GPU, the same with tensors in host memory: TensorFlow copies them, in the order of its own streams.
REGISTER_KERNEL_BUILDER(
    Name("HvdBackupSubmit").Device(tf::DEVICE_GPU).HostMemory("hyperparameters").HostMemory("gradients"), Submit);
REGISTER_KERNEL_BUILDER(Name("HvdBackupNextUpdate")
                            .Device(tf::DEVICE_GPU)
                            .HostMemory("kind")
                            .HostMemory("hyperparameters")
                            .HostMemory("gradients"),
                        NextUpdate);
REGISTER_KERNEL_BUILDER(Name("HvdBackupFirstN")
                            .Device(tf::DEVICE_GPU)
                            .HostMemory("tensors")
                            .HostMemory("results")
                            .HostMemory("contributors"),
                        FirstN);

}  // namespace
