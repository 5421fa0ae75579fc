// The Python face of the GPU library (nanobind): addresses go over, and streams as integers.
// Documented in hvd_backup/_gpu.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <string_view>
#include <vector>

#include "bindings/gpu_arguments.h"
#include "gpu/kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_gpu, module) {
  using namespace hvd_backup::gpu;
  module.def(
      "can_cast",
      [](std::string_view gradient, std::string_view wire) { return can_cast(data_type(gradient), data_type(wire)); },
      "gradient"_a, "wire"_a);
  module.def(
      "pack",
      [](std::string_view gradient, std::string_view wire, const std::vector<Address>& gradients,
         const std::vector<std::uint64_t>& begins, const std::vector<std::uint64_t>& counts, Address bucket,
         double scale, int device, Address stream, Address tally) {
        pack(data_type(gradient), data_type(wire), pieces(gradients, begins, counts), pointer(bucket), scale,
             Stream{device, pointer(stream)}, pointer<Tally>(tally));
      },
      "gradient"_a, "wire"_a, "gradients"_a, "begins"_a, "counts"_a, "bucket"_a, "scale"_a, "device"_a, "stream"_a,
      "tally"_a = 0);
  module.def(
      "unpack",
      [](std::string_view gradient, std::string_view wire, const std::vector<Address>& gradients,
         const std::vector<std::uint64_t>& begins, const std::vector<std::uint64_t>& counts, Address bucket,
         double scale, int device, Address stream) {
        unpack(data_type(gradient), data_type(wire), pieces(gradients, begins, counts), pointer(bucket), scale,
               Stream{device, pointer(stream)});
      },
      "gradient"_a, "wire"_a, "gradients"_a, "begins"_a, "counts"_a, "bucket"_a, "scale"_a, "device"_a, "stream"_a);
  module.def(
      "sum",
      [](std::string_view dtype, Address destination, const std::vector<Address>& sources,
         const std::vector<double>& weights, double scale, std::size_t count, int device, Address stream) {
        sum(data_type(dtype), pointer(destination), pointers(sources), weights, scale, count,
            Stream{device, pointer(stream)});
      },
      "dtype"_a, "destination"_a, "sources"_a, "weights"_a, "scale"_a, "count"_a, "device"_a, "stream"_a);
}
