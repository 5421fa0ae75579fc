// Numbers for things that come and go: an element keeps its number while it is there, and numbers are used again.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace hvd_backup {

template <class Element>
class Slots {
 public:
  std::size_t add(Element element) {
    if (free_.empty()) {
      elements_.push_back(std::move(element));
      return elements_.size() - 1;
    }
    const std::size_t number = free_.back();
    free_.pop_back();
    elements_[number] = std::move(element);
    return number;
  }

  Element remove(std::size_t number) {
    free_.push_back(number);
    return std::exchange(elements_[number], Element());
  }

  Element& operator[](std::size_t number) { return elements_[number]; }
  const Element& operator[](std::size_t number) const { return elements_[number]; }

  std::size_t size() const { return elements_.size() - free_.size(); }

  // Also the empty ones, default-constructed, of numbers that are not in use.
  std::vector<Element>& all() { return elements_; }

 private:
  std::vector<Element> elements_;
  std::vector<std::size_t> free_;
};

}  // namespace hvd_backup
