// The Python face of the GPU library (nanobind): addresses go over, and streams as integers.
// Documented in hvd_backup/_gpu.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/gpu_arguments.h"
#include "gpu/cuda_device.h"
#include "gpu/kernels.h"
#include "gpu/nccl.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// A GPU for the core, which is another library: it goes over as an address.
struct OwnedDevice {
  int number;
  std::shared_ptr<const hvd_backup::gpu::Nccl> nccl;
  std::unique_ptr<hvd_backup::Device> device;
};

struct OwnedHostMemory {
  std::shared_ptr<std::byte> data;
};

// Under its usual name it is the one that PyTorch has loaded, if it has: one NCCL is enough for a process.
std::vector<std::string> places_of_nccl(const std::string& path) {
  std::vector<std::string> places{"libnccl.so.2"};
  if (!path.empty()) places.push_back(path);
  return places;
}

}  // namespace

NB_MODULE(_gpu, module) {
  using namespace hvd_backup::gpu;
  nb::class_<OwnedHostMemory>(module, "HostMemory").def_prop_ro("address", [](const OwnedHostMemory& self) {
    return reinterpret_cast<Address>(self.data.get());
  });
  nb::class_<OwnedDevice>(module, "Device")
      .def(
          "__init__",
          [](OwnedDevice* self, int device, const std::string& nccl) {
            auto loaded = std::make_shared<const Nccl>(places_of_nccl(nccl));
            auto made = make_cuda_device(device, loaded);
            new (self) OwnedDevice{device, std::move(loaded), std::move(made)};
          },
          "device"_a, "nccl"_a = "")
      .def_prop_ro("address", [](const OwnedDevice& self) { return reinterpret_cast<Address>(self.device.get()); })
      .def_prop_ro("why_no_groups", [](const OwnedDevice& self) { return self.device->why_no_groups(); })
      .def_prop_ro("nccl_version", [](const OwnedDevice& self) { return self.nccl->version(); })
      .def(
          "host_memory",
          [](const OwnedDevice& self, std::size_t bytes) {
            return OwnedHostMemory{page_locked_memory(self.number, bytes)};
          },
          "bytes"_a);
  module.def("try_on", &try_on, "device"_a);
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
         const std::vector<double>& weights, double scale, std::size_t count, int device, Address stream,
         Address norms) {
        sum(data_type(dtype), pointer(destination), pointers(sources), weights, scale, count,
            Stream{device, pointer(stream)}, pointer<hvd_backup::SquaredNorms>(norms));
      },
      "dtype"_a, "destination"_a, "sources"_a, "weights"_a, "scale"_a, "count"_a, "device"_a, "stream"_a,
      "norms"_a = 0);
}
