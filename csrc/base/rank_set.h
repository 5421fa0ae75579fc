// A set of ranks 0..size-1. Ordered: members() is ascending, which is the order in which contributions are summed.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace hvd_backup {

class RankSet {
 public:
  RankSet() = default;
  explicit RankSet(int size) : size_(size), words_((static_cast<std::size_t>(size) + 63) / 64, 0) {}

  static RankSet of(int size, const std::vector<int>& ranks) {
    RankSet set(size);
    for (int rank : ranks) set.insert(rank);
    return set;
  }

  int size() const { return size_; }
  void insert(int rank) { words_[word(rank)] |= bit(rank); }
  void erase(int rank) { words_[word(rank)] &= ~bit(rank); }
  bool contains(int rank) const {
    return rank >= 0 && rank < size_ && (words_[word(rank)] & bit(rank)) != 0;
  }
  int count() const {
    int total = 0;
    for (std::uint64_t w : words_) total += std::popcount(w);
    return total;
  }
  bool empty() const { return count() == 0; }
  std::vector<int> members() const {
    std::vector<int> ranks;
    for (int rank = 0; rank < size_; ++rank) {
      if (contains(rank)) ranks.push_back(rank);
    }
    return ranks;
  }
  bool operator==(const RankSet&) const = default;

 private:
  static std::size_t word(int rank) { return static_cast<std::size_t>(rank) / 64; }
  static std::uint64_t bit(int rank) { return std::uint64_t{1} << (static_cast<unsigned>(rank) % 64); }

  int size_ = 0;
  std::vector<std::uint64_t> words_;
};

}  // namespace hvd_backup
