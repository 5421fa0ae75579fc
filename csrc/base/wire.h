// How small messages become bytes and back. A message lists its fields once, in `fields(archive)`; Writer and Reader
// walk the same list. Ranks of one job run the same build on the same kind of machine, so numbers travel as they lie in
// memory. A Reader never reads past the end: a message that is too short, or has bytes left over, is a RuntimeFailure,
// and so is a value that is none: a bool is 0 or 1, an enum what its is_known(value), declared beside it, says. So
// bytes that can be read are those that would be written again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/error.h"

namespace hvd_backup {

class Writer {
 public:
  template <class T>
    requires std::is_arithmetic_v<T> || std::is_enum_v<T>
  void operator()(const T& value) {
    append(&value, sizeof value);
  }
  void operator()(const std::string& text) {
    (*this)(static_cast<std::uint32_t>(text.size()));
    append(text.data(), text.size());
  }
  template <class T>
  void operator()(const std::vector<T>& list) {
    (*this)(static_cast<std::uint32_t>(list.size()));
    for (const T& item : list) (*this)(item);
  }
  template <class T>
    requires requires(T& message, Writer& writer) { message.fields(writer); }
  void operator()(const T& message) {
    const_cast<T&>(message).fields(*this);  // a Writer only reads the fields
  }

  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  void append(const void* data, std::size_t size) {
    if (size == 0) return;
    const std::size_t old = bytes_.size();
    bytes_.resize(old + size);
    std::memcpy(bytes_.data() + old, data, size);
  }

  std::vector<std::byte> bytes_;
};

class Reader {
 public:
  explicit Reader(const std::vector<std::byte>& bytes) : bytes_(bytes) {}

  template <class T>
    requires std::is_arithmetic_v<T>
  void operator()(T& value) {
    std::memcpy(&value, take(sizeof value), sizeof value);
  }
  void operator()(bool& value) {
    std::uint8_t byte = 0;
    (*this)(byte);
    if (byte > 1) throw RuntimeFailure("malformed message: a bool is " + std::to_string(byte));
    value = byte == 1;
  }
  template <class T>
    requires std::is_enum_v<T>
  void operator()(T& value) {
    std::underlying_type_t<T> number = 0;
    (*this)(number);
    value = static_cast<T>(number);
    if (!is_known(value)) throw RuntimeFailure("malformed message: no value of its kind is " + std::to_string(number));
  }
  void operator()(std::string& text) {
    std::uint32_t size = 0;
    (*this)(size);
    text.assign(reinterpret_cast<const char*>(take(size)), size);
  }
  template <class T>
  void operator()(std::vector<T>& list) {
    std::uint32_t size = 0;
    (*this)(size);
    if (size > bytes_.size() - position_) throw RuntimeFailure("malformed message: a list is longer than the message");
    list.resize(size);
    for (T& item : list) (*this)(item);
  }
  template <class T>
    requires requires(T& message, Reader& reader) { message.fields(reader); }
  void operator()(T& message) {
    message.fields(*this);
  }

  void expect_end() const {
    if (position_ != bytes_.size()) throw RuntimeFailure("malformed message: bytes left over");
  }

 private:
  const std::byte* take(std::size_t size) {
    if (size > bytes_.size() - position_) throw RuntimeFailure("malformed message: it ends too early");
    const std::byte* data = bytes_.data() + position_;
    position_ += size;
    return data;
  }

  const std::vector<std::byte>& bytes_;
  std::size_t position_ = 0;
};

}  // namespace hvd_backup
