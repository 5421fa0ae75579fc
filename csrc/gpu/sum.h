// The sum of several buffers, in rank order: sum_tile is what one thread of the kernel does. The same bits as
// kernels/weighted_sum.h: destination[e] = scale * sum_i weights[i] * sources[i][e]. If `measured`, the squares of what
// is read and of what is stored are added up on the way, in float64; the bits stay the same.
#pragma once

#include <cstdint>

#include "base/squared_norms.h"
#include "gpu/elements.h"
#include "gpu/move.h"

namespace hvd_backup::gpu {

// Travel as an argument of the kernel.
inline constexpr int sources_at_once = 1024;
struct Sources {
  int count;  // at least 1
  const void* source[sources_at_once];
  double weight[sources_at_once];
};

template <class Format, bool measured>
struct Sum {
  using Lane = typename Format::Lane;
  using Element = typename Format::Stored;
  static constexpr bool is_measured = measured;
  static constexpr int width = 16 / sizeof(Element);
  static constexpr std::uint64_t tile = std::uint64_t{threads_per_block} * vectors_at_once * width;
  using Elements = Vector<Element, width>;

  Lane scale;
  bool wide;            // every buffer is aligned for Elements
  SquaredNorms* norms;  // of this thread

  HVD_BACKUP_EVERYWHERE static bool is_wide(const Sources& sources, const void* destination) {
    bool all = is_aligned_for<Elements>(destination);
    for (int i = 0; i < sources.count; ++i) all = all && is_aligned_for<Elements>(sources.source[i]);
    return all;
  }

  // Elements [from, from + tile) of `count`, as far as they fall to one of threads_per_block threads. The destination
  // may be one of the sources.
  HVD_BACKUP_EVERYWHERE void sum_tile(const Sources& sources, Element* destination, std::uint64_t from,
                                      std::uint64_t count, unsigned thread) const {
    const std::uint64_t to = from + tile < count ? from + tile : count;
    std::uint64_t scalars = from;
    if (wide) {
      const std::uint64_t vectors = (to - from) / width;
      if (vectors == std::uint64_t{threads_per_block} * vectors_at_once) {
        sum_vectors<vectors_at_once>(sources, destination, from / width + thread);
      } else {
        for (std::uint64_t v = thread; v < vectors; v += threads_per_block) {
          sum_vectors<1>(sources, destination, from / width + v);
        }
      }
      scalars += vectors * width;
    }
    for (std::uint64_t e = scalars + thread; e < to; e += threads_per_block) {
      Lane total = term(sources, 0, static_cast<const Element*>(sources.source[0])[e]);
      for (int i = 1; i < sources.count; ++i)
        total += term(sources, i, static_cast<const Element*>(sources.source[i])[e]);
      destination[e] = stored_as(total);
    }
  }

 private:
  // So many vectors, threads_per_block apart.
  template <int at_once>
  HVD_BACKUP_EVERYWHERE void sum_vectors(const Sources& sources, Element* destination, std::uint64_t first) const {
    Lane total[at_once][width];
    for (int i = 0; i < sources.count; ++i) {
      const auto* source = static_cast<const Elements*>(sources.source[i]) + first;
      Elements loaded[at_once];
      for (int k = 0; k < at_once; ++k) loaded[k] = source[k * threads_per_block];
      for (int k = 0; k < at_once; ++k) {
        for (int j = 0; j < width; ++j) {
          const Lane value = term(sources, i, loaded[k].element[j]);
          total[k][j] = i == 0 ? value : total[k][j] + value;
        }
      }
    }
    for (int k = 0; k < at_once; ++k) {
      Elements stored;
      for (int j = 0; j < width; ++j) stored.element[j] = stored_as(total[k][j]);
      reinterpret_cast<Elements*>(destination)[first + k * threads_per_block] = stored;
    }
  }

  HVD_BACKUP_EVERYWHERE Lane term(const Sources& sources, int i, Element element) const {
    const Lane value = Format::load(element);
    if constexpr (measured) norms->sources += square(value);
    return value * static_cast<Lane>(sources.weight[i]);
  }

  HVD_BACKUP_EVERYWHERE Element stored_as(Lane total) const {
    const Element element = Format::store(total * scale);
    if constexpr (measured) norms->destination += square(Format::load(element));
    return element;
  }

  HVD_BACKUP_EVERYWHERE static double square(Lane value) {
    return static_cast<double>(value) * static_cast<double>(value);
  }
};

}  // namespace hvd_backup::gpu
