// The state of a rank on its way to another one (design, rule 6): weights, optimizer state and what belongs to them, as
// bytes that the engine does not look into. A copy of it is made between two updates, and kept until the coordinator
// says that nobody needs it.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace hvd_backup {

class State {
 public:
  explicit State(std::size_t size) : data_(std::make_unique_for_overwrite<std::byte[]>(size)), size_(size) {}

  // One after the other.
  static std::shared_ptr<const State> copy_of(const std::vector<std::span<const std::byte>>& parts) {
    std::size_t size = 0;
    for (const auto& part : parts) size += part.size();
    auto state = std::make_shared<State>(size);
    std::byte* place = state->data();
    for (const auto& part : parts) {
      if (!part.empty()) std::memcpy(std::exchange(place, place + part.size()), part.data(), part.size());
    }
    return state;
  }

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  std::unique_ptr<std::byte[]> data_;
  std::size_t size_;
};

}  // namespace hvd_backup
