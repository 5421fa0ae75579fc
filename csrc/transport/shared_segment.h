// A piece of memory that processes of one machine share: the owner of its mapping. What lies in it is its users'
// business.
//
// It has no name in a file system (Linux: memfd), so that no crash leaves it behind and a small /dev/shm does not
// matter; others reach it through /proc while its creator offers it.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace hvd_backup {

class SharedSegment {
 public:
  // Creates and maps a segment of zeros. All of it is reserved: too little memory is an error here and not a crash
  // later. Throws RuntimeFailure with the system's reason.
  static SharedSegment create(std::size_t size);

  // Maps what another process of this machine offers at `path`. Throws RuntimeFailure. In another container the path
  // can lead to something else: users compare a number that only the creator can have written.
  static SharedSegment open(const std::string& path, std::size_t size);

  SharedSegment() = default;
  SharedSegment(SharedSegment&& other) noexcept;
  SharedSegment& operator=(SharedSegment&& other) noexcept;
  ~SharedSegment();

  std::span<std::byte> bytes() const { return bytes_; }

  // Where other processes can open it, in the process that has created it.
  std::string path() const;
  // Once they have. The memory lives while anybody has it mapped.
  void stop_offering() noexcept;

 private:
  SharedSegment(int file, std::size_t size);

  std::span<std::byte> bytes_;
  int file_ = -1;  // while offered
};

}  // namespace hvd_backup
