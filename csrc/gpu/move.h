// Gradients into their bucket and out of it: move_tile is what one thread of the kernel does.
//
// A bucket is one array; each gradient has a piece of it. Blocks of threads take a tile of the bucket each, whatever
// gradients lie in it, so one launch moves them all, many small ones as fast as a large one. On the way elements are
// scaled and cast, and if `measured`, what goes into the bucket is tallied.
#pragma once

#include <cstdint>

#include "gpu/elements.h"

namespace hvd_backup::gpu {

// Which elements of the bucket, and where the gradient is. Pieces are in ascending order and do not overlap; what lies
// between them is left alone.
struct Piece {
  void* gradient;  // its elements in the order of memory; null: zeros into the bucket, or nothing out of it
  std::uint64_t begin;
  std::uint64_t count;
};

// They travel as an argument of the kernel, so that there is no other copy to wait for.
inline constexpr int pieces_at_once = 512;
struct Pieces {
  int count;
  Piece piece[pieces_at_once];
};

// Of a thread, then of a block, then of all.
struct Tally {
  double squares;           // the squared norm
  std::uint32_t nonfinite;  // not 0: there is a NaN or an infinity
};

enum class Direction { pack, unpack };

inline constexpr unsigned threads_per_block = 256;
inline constexpr int vectors_at_once = 4;  // of one thread: loads that are on their way together

// Gradient, Wire: formats of the two sides.
template <class Gradient, class Wire, Direction direction, bool measured>
struct Move {
  using Lane = typename Wire::Lane;
  using Element = typename Wire::Stored;
  using GradientElement = typename Gradient::Stored;
  static constexpr bool is_measured = measured;
  static constexpr int width = 16 / sizeof(Element);
  static constexpr std::uint64_t tile = std::uint64_t{threads_per_block} * vectors_at_once * width;
  using WireVector = Vector<Element, width>;
  using GradientVector = Vector<GradientElement, width>;

  double scale;
  Tally* tally;

  // Of the elements [from, from + tile), those that fall to one of threads_per_block threads.
  HVD_BACKUP_EVERYWHERE void move_tile(const Pieces& pieces, Element* bucket, std::uint64_t from,
                                       unsigned thread) const {
    const std::uint64_t to = from + tile;
    int first = 0;  // the first piece that ends behind `from`
    for (int last = pieces.count; first < last;) {
      const int middle = (first + last) / 2;
      const Piece& piece = pieces.piece[middle];
      if (piece.begin + piece.count > from) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    for (; first < pieces.count && pieces.piece[first].begin < to; ++first) {
      const Piece& piece = pieces.piece[first];
      const std::uint64_t begin = piece.begin > from ? piece.begin : from;
      const std::uint64_t end = piece.begin + piece.count < to ? piece.begin + piece.count : to;
      auto* gradient = static_cast<GradientElement*>(piece.gradient);
      if (gradient != nullptr) gradient += begin - piece.begin;
      move_run(bucket + begin, gradient, static_cast<unsigned>(end - begin), thread);
    }
  }

 private:
  HVD_BACKUP_EVERYWHERE void move_run(Element* wire, GradientElement* gradient, unsigned count, unsigned thread) const {
    if (direction == Direction::unpack && gradient == nullptr) return;
    const bool wide = is_aligned_for<WireVector>(wire) && is_aligned_for<GradientVector>(gradient);
    const unsigned vectors = wide ? count / width : 0;
    for (unsigned base = 0; base < vectors; base += threads_per_block * vectors_at_once) {
      move_vectors(wire, gradient, base + thread, vectors);
    }
    for (unsigned i = vectors * width + thread; i < count; i += threads_per_block) move_one(wire, gradient, i);
  }

  HVD_BACKUP_EVERYWHERE void move_vectors(Element* wire, GradientElement* gradient, unsigned first,
                                          unsigned vectors) const {
    auto* wires = reinterpret_cast<WireVector*>(wire);
    auto* gradients = reinterpret_cast<GradientVector*>(gradient);
    if constexpr (direction == Direction::pack) {
      GradientVector loaded[vectors_at_once] = {};
      for (int k = 0; k < vectors_at_once; ++k) {
        const unsigned v = first + k * threads_per_block;
        if (v < vectors && gradient != nullptr) loaded[k] = gradients[v];
      }
      for (int k = 0; k < vectors_at_once; ++k) {
        const unsigned v = first + k * threads_per_block;
        if (v < vectors) wires[v] = packed(loaded[k]);
      }
    } else {
      WireVector loaded[vectors_at_once] = {};
      for (int k = 0; k < vectors_at_once; ++k) {
        const unsigned v = first + k * threads_per_block;
        if (v < vectors) loaded[k] = wires[v];
      }
      for (int k = 0; k < vectors_at_once; ++k) {
        const unsigned v = first + k * threads_per_block;
        if (v < vectors) gradients[v] = unpacked(loaded[k]);
      }
    }
  }

  HVD_BACKUP_EVERYWHERE void move_one(Element* wire, GradientElement* gradient, unsigned i) const {
    if constexpr (direction == Direction::pack) {
      wire[i] = to_wire(gradient == nullptr ? GradientElement{} : gradient[i]);
    } else {
      gradient[i] = from_wire(wire[i]);
    }
  }

  HVD_BACKUP_EVERYWHERE WireVector packed(const GradientVector& from) const {
    WireVector to;
    for (int i = 0; i < width; ++i) to.element[i] = to_wire(from.element[i]);
    return to;
  }

  HVD_BACKUP_EVERYWHERE GradientVector unpacked(const WireVector& from) const {
    GradientVector to;
    for (int i = 0; i < width; ++i) to.element[i] = from_wire(from.element[i]);
    return to;
  }

  HVD_BACKUP_EVERYWHERE Element to_wire(GradientElement element) const {
    const Element stored = Wire::store(static_cast<Lane>(Gradient::load(element)) * static_cast<Lane>(scale));
    if constexpr (measured) {
      const Lane sent = Wire::load(stored);
      tally->squares += static_cast<double>(sent) * static_cast<double>(sent);
      if (sent - sent != Lane(0)) tally->nonfinite = 1;
    }
    return stored;
  }

  HVD_BACKUP_EVERYWHERE GradientElement from_wire(Element element) const {
    using Wide = typename Gradient::Lane;
    return Gradient::store(static_cast<Wide>(Wire::load(element)) * static_cast<Wide>(scale));
  }
};

}  // namespace hvd_backup::gpu
