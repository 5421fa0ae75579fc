// From what is asked for to launches: which kernel, with which arguments, over which tiles. The launcher is CUDA's
// (kernels.cu), or runs the threads one after the other on the CPU, for the tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

#include "base/data_type.h"
#include "base/error.h"
#include "base/squared_norms.h"
#include "gpu/elements.h"
#include "gpu/move.h"
#include "gpu/sum.h"

namespace hvd_backup::gpu {

// One block each; the first begins at element `from` of the bucket.
struct TileRange {
  std::uint64_t from;
  unsigned count;
};

// Calls visit(the format of a floating-point dtype); otherwise returns false.
template <class Visitor>
bool visit_format(DataType dtype, Visitor visit) {
  using enum DataType;
  if (dtype == float16) return visit(Float16{}), true;
  if (dtype == bfloat16) return visit(BFloat16{}), true;
  if (dtype == float32) return visit(Float32{}), true;
  if (dtype == float64) return visit(Float64{}), true;
  return false;
}

// Calls visit(gradient's format, wire's format) if the kernels are there for the two; otherwise returns false.
template <class Visitor>
bool visit_formats(DataType gradient, DataType wire, Visitor visit) {
  using enum DataType;
  if (gradient == wire) return visit_format(wire, [&](auto format) { visit(format, format); });
  if (gradient == float32 && wire == float16) return visit(Float32{}, Float16{}), true;
  if (gradient == float32 && wire == bfloat16) return visit(Float32{}, BFloat16{}), true;
  if (gradient == float64 && wire == float16) return visit(Float64{}, Float16{}), true;
  if (gradient == float64 && wire == float32) return visit(Float64{}, Float32{}), true;
  return false;
}

inline bool can_cast(DataType gradient, DataType wire) {
  return visit_formats(gradient, wire, [](auto, auto) {});
}

// A launch for each pieces_at_once pieces.
template <class Job, class Launcher>
void launch_move(const Launcher& launcher, std::span<const Piece> pieces, void* bucket, double scale, Tally* tally) {
  for (std::size_t first = 0; first < pieces.size(); first += pieces_at_once) {
    const auto part = pieces.subspan(first, std::min<std::size_t>(pieces_at_once, pieces.size() - first));
    Pieces argument;
    argument.count = static_cast<int>(part.size());
    std::copy(part.begin(), part.end(), argument.piece);
    const std::uint64_t from = part.front().begin / Job::tile * Job::tile;  // a tile begins where vectors do
    const std::uint64_t end = part.back().begin + part.back().count;
    const auto tiles = static_cast<unsigned>((end - from + Job::tile - 1) / Job::tile);
    if (tiles > 0) launcher.template move<Job>(argument, bucket, scale, TileRange{from, tiles}, tally);
  }
}

inline void check_cast(bool known) {
  if (!known) throw UsageError("the GPU library has no kernel for these two dtypes: ask can_cast first");
}

template <class Launcher>
void launch_pack(const Launcher& launcher, DataType gradient, DataType wire, std::span<const Piece> pieces,
                 void* bucket, double scale, Tally* tally) {
  check_cast(visit_formats(gradient, wire, [&]<class Gradient, class Wire>(Gradient, Wire) {
    if (tally != nullptr) {
      launch_move<Move<Gradient, Wire, Direction::pack, true>>(launcher, pieces, bucket, scale, tally);
    } else {
      launch_move<Move<Gradient, Wire, Direction::pack, false>>(launcher, pieces, bucket, scale, nullptr);
    }
  }));
}

template <class Launcher>
void launch_unpack(const Launcher& launcher, DataType gradient, DataType wire, std::span<const Piece> pieces,
                   void* bucket, double scale) {
  check_cast(visit_formats(gradient, wire, [&]<class Gradient, class Wire>(Gradient, Wire) {
    launch_move<Move<Gradient, Wire, Direction::unpack, false>>(launcher, pieces, bucket, scale, nullptr);
  }));
}

template <class Job, class Launcher>
void launch_sum_job(const Launcher& launcher, const Sources& sources, void* destination, double scale,
                    std::size_t count, SquaredNorms* norms) {
  const auto blocks = static_cast<unsigned>((count + Job::tile - 1) / Job::tile);
  const bool wide = Job::is_wide(sources, destination);
  if (blocks > 0) launcher.template sum<Job>(sources, destination, scale, wide, count, blocks, norms);
}

template <class Launcher>
void launch_sum(const Launcher& launcher, DataType dtype, void* destination, std::span<const void* const> sources,
                std::span<const double> weights, double scale, std::size_t count, SquaredNorms* norms) {
  if (sources.empty() || sources.size() > sources_at_once || sources.size() != weights.size()) {
    throw UsageError("a sum on the GPU takes 1 to " + std::to_string(sources_at_once) + " sources, with a weight each");
  }
  Sources argument;
  argument.count = static_cast<int>(sources.size());
  std::copy(sources.begin(), sources.end(), argument.source);
  std::copy(weights.begin(), weights.end(), argument.weight);
  const bool known = visit_format(dtype, [&]<class Format>(Format) {
    if (norms != nullptr) {
      launch_sum_job<Sum<Format, true>>(launcher, argument, destination, scale, count, norms);
    } else {
      launch_sum_job<Sum<Format, false>>(launcher, argument, destination, scale, count, nullptr);
    }
  });
  if (!known) throw UsageError("a sum on the GPU takes floating-point dtypes");
}

}  // namespace hvd_backup::gpu
