#include "transport/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace hvd_backup {

namespace {

[[noreturn]] void fail(const std::string& doing, int error) {
  throw RuntimeFailure("shared memory: cannot " + doing + ": " + std::strerror(error));
}

}  // namespace

SharedSegment SharedSegment::create(std::size_t size) {
  const int file = memfd_create("hvd_backup", MFD_CLOEXEC);
  if (file < 0) fail("create", errno);
  if (const int error = posix_fallocate(file, 0, static_cast<off_t>(size)); error != 0) {
    ::close(file);
    fail("reserve " + std::to_string(size) + " bytes", error);
  }
  return SharedSegment(file, size);
}

SharedSegment SharedSegment::open(const std::string& path, std::size_t size) {
  const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) fail("open " + path, errno);
  struct stat status{};
  if (fstat(file, &status) != 0 || static_cast<std::size_t>(status.st_size) != size) {
    ::close(file);
    fail("use " + path + ", which is something else", EINVAL);
  }
  SharedSegment segment(file, size);
  segment.stop_offering();
  return segment;
}

SharedSegment::SharedSegment(int file, std::size_t size) : file_(file) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (address == MAP_FAILED) {
    const int error = errno;
    stop_offering();
    fail("map " + std::to_string(size) + " bytes", error);
  }
  bytes_ = {static_cast<std::byte*>(address), size};
}

SharedSegment::SharedSegment(SharedSegment&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})), file_(std::exchange(other.file_, -1)) {}

SharedSegment& SharedSegment::operator=(SharedSegment&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(file_, other.file_);
  return *this;
}

SharedSegment::~SharedSegment() {
  stop_offering();
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

std::string SharedSegment::path() const { return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(file_); }

void SharedSegment::stop_offering() noexcept {
  if (file_ >= 0) ::close(std::exchange(file_, -1));
}

}  // namespace hvd_backup
