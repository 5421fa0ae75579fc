// The GPU library's kernels on the CPU, for tests without a GPU: the very code that a thread runs, one thread after the
// other.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <string_view>
#include <vector>

#include "bindings/gpu_arguments.h"
#include "bindings/testing.h"
#include "gpu/launch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_backup {

namespace {

using namespace gpu;

// The threads of a block have no order that could be relied on: here the last comes first.
struct HostLauncher {
  mutable int launches = 0;

  template <class Job>
  void move(const Pieces& pieces, void* bucket, double scale, TileRange tiles, Tally* tally) const {
    ++launches;
    for (unsigned block = tiles.count; block-- > 0;) {
      for (unsigned thread = threads_per_block; thread-- > 0;) {
        Tally mine{};
        Job{scale, &mine}.move_tile(pieces, static_cast<typename Job::Element*>(bucket), tiles.from + Job::tile * block,
                                    thread);
        if (!Job::is_measured) continue;
        tally->squares += mine.squares;
        tally->nonfinite |= mine.nonfinite;
      }
    }
  }

  template <class Job>
  void sum(const Sources& sources, void* destination, double scale, bool wide, std::uint64_t count, unsigned blocks,
           SquaredNorms* norms) const {
    ++launches;
    for (unsigned block = blocks; block-- > 0;) {
      for (unsigned thread = threads_per_block; thread-- > 0;) {
        SquaredNorms mine;
        Job{static_cast<typename Job::Lane>(scale), wide, &mine}.sum_tile(
            sources, static_cast<typename Job::Element*>(destination), Job::tile * block, count, thread);
        if (!Job::is_measured) continue;
        norms->sources += mine.sources;
        norms->destination += mine.destination;
      }
    }
  }
};

}  // namespace

void register_gpu_kernels(nb::module_& module) {
  module.def("gpu_can_cast", [](std::string_view gradient, std::string_view wire) {
    return can_cast(data_type(gradient), data_type(wire));
  });
  // Returns how many launches it took, and if `measured`, the squared norm and whether something is not finite.
  module.def(
      "gpu_pack",
      [](std::string_view gradient, std::string_view wire, const std::vector<Address>& gradients,
         const std::vector<std::uint64_t>& begins, const std::vector<std::uint64_t>& counts, Address bucket,
         double scale, bool measured) {
        const HostLauncher launcher;
        Tally tally{};
        launch_pack(launcher, data_type(gradient), data_type(wire), pieces(gradients, begins, counts), pointer(bucket),
                    scale, measured ? &tally : nullptr);
        return nb::make_tuple(launcher.launches, tally.squares, tally.nonfinite != 0);
      },
      "gradient"_a, "wire"_a, "gradients"_a, "begins"_a, "counts"_a, "bucket"_a, "scale"_a, "measured"_a = false);
  module.def(
      "gpu_unpack",
      [](std::string_view gradient, std::string_view wire, const std::vector<Address>& gradients,
         const std::vector<std::uint64_t>& begins, const std::vector<std::uint64_t>& counts, Address bucket,
         double scale) {
        launch_unpack(HostLauncher{}, data_type(gradient), data_type(wire), pieces(gradients, begins, counts),
                      pointer(bucket), scale);
      },
      "gradient"_a, "wire"_a, "gradients"_a, "begins"_a, "counts"_a, "bucket"_a, "scale"_a);
  // Returns, if `measured`, the squared norms of (sources, destination).
  module.def(
      "gpu_sum",
      [](std::string_view dtype, Address destination, const std::vector<Address>& sources,
         const std::vector<double>& weights, double scale, std::size_t count, bool measured) {
        SquaredNorms norms;
        launch_sum(HostLauncher{}, data_type(dtype), pointer(destination), pointers(sources), weights, scale, count,
                   measured ? &norms : nullptr);
        return nb::make_tuple(norms.sources, norms.destination);
      },
      "dtype"_a, "destination"_a, "sources"_a, "weights"_a, "scale"_a, "count"_a, "measured"_a = false);
}

}  // namespace hvd_backup
