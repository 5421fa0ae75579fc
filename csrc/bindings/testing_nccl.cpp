// The use of NCCL, for tests that put a library of their own in its place (tests/nccl_double.cpp).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings/gpu_arguments.h"
#include "bindings/testing.h"
#include "bindings/testing_group.h"
#include "gpu/nccl.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_backup {

using namespace gpu;

void register_nccl(nb::module_& module) {
  nb::class_<DeviceGroup>(module, "NcclGroup")
      .def("state", [](DeviceGroup& self) { return name_of(self.state()); })
      .def("reason", &DeviceGroup::reason)
      // sends, receives: (peer, address, bytes)
      .def(
          "exchange",
          [](DeviceGroup& self, const std::vector<Described>& sends, const std::vector<Described>& receives) {
            exchange(self, sends, receives);
          },
          "sends"_a, "receives"_a)
      .def("abort", &DeviceGroup::abort);
  nb::class_<Nccl>(module, "Nccl")
      .def(nb::init<const std::vector<std::string>&>(), "libraries"_a)
      .def_prop_ro("why_not", &Nccl::why_not)
      .def_prop_ro("version", &Nccl::version)
      .def("new_group",
           [](const Nccl& self) {
             const std::string group = self.new_group();
             return nb::bytes(group.data(), group.size());
           })
      .def(
          "join",
          [](const Nccl& self, const nb::bytes& group, int member, int members, Address stream) {
            return self.join(std::string(group.c_str(), group.size()), member, members, pointer(stream));
          },
          "group"_a, "member"_a, "members"_a, "stream"_a);
}

}  // namespace hvd_backup
