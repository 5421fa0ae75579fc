// A piece of memory that processes of one machine share: the owner of its mapping. What lies in it is its users'
// business.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace hvd_backup {

class SharedSegment {
 public:
  // Creates a segment of zeros under a new name and maps it. All of it is reserved: a full /dev/shm is an error here
  // and not a crash later. Throws RuntimeFailure with the system's reason.
  static SharedSegment create(std::size_t size);

  // Maps what another process has created. Throws RuntimeFailure.
  static SharedSegment open(const std::string& name, std::size_t size);

  SharedSegment() = default;
  SharedSegment(SharedSegment&& other) noexcept;
  SharedSegment& operator=(SharedSegment&& other) noexcept;
  ~SharedSegment();

  std::span<std::byte> bytes() const { return bytes_; }
  const std::string& name() const { return name_; }

  // Takes the name away, in the process that has created it; the memory lives while anybody has it mapped. To be called
  // as soon as everybody has opened it, so that no crash leaves it behind.
  void unlink() noexcept;

 private:
  SharedSegment(std::string name, std::span<std::byte> bytes, bool linked);

  std::string name_;
  std::span<std::byte> bytes_;
  bool linked_ = false;
};

}  // namespace hvd_backup
