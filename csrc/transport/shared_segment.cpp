#include "transport/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "base/error.h"

namespace hvd_backup {

namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int number) : number_(number) {}
  ~FileDescriptor() {
    if (number_ >= 0) ::close(number_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return number_; }

 private:
  int number_;
};

[[noreturn]] void fail(const char* doing, const std::string& name, int error) {
  throw RuntimeFailure(std::string("shared memory: ") + doing + " " + name + ": " + std::strerror(error));
}

std::span<std::byte> map(const FileDescriptor& file, const std::string& name, std::size_t size) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (address == MAP_FAILED) fail("cannot map", name, errno);
  return {static_cast<std::byte*>(address), size};
}

}  // namespace

SharedSegment SharedSegment::create(std::size_t size) {
  std::random_device random;
  const std::string name =
      "/hvd_backup." + std::to_string(getpid()) + "." + std::to_string(random()) + "." + std::to_string(random());
  const FileDescriptor file(shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
  if (file.get() < 0) fail("cannot create", name, errno);
  SharedSegment segment(name, {}, true);  // unlinks if what follows fails
  if (const int error = posix_fallocate(file.get(), 0, static_cast<off_t>(size)); error != 0) {
    fail("no room for", name, error);
  }
  segment.bytes_ = map(file, name, size);
  return segment;
}

SharedSegment SharedSegment::open(const std::string& name, std::size_t size) {
  const FileDescriptor file(shm_open(name.c_str(), O_RDWR, 0));
  if (file.get() < 0) fail("cannot open", name, errno);
  return SharedSegment(name, map(file, name, size), false);
}

SharedSegment::SharedSegment(std::string name, std::span<std::byte> bytes, bool linked)
    : name_(std::move(name)), bytes_(bytes), linked_(linked) {}

SharedSegment::SharedSegment(SharedSegment&& other) noexcept
    : name_(std::move(other.name_)),
      bytes_(std::exchange(other.bytes_, {})),
      linked_(std::exchange(other.linked_, false)) {}

SharedSegment& SharedSegment::operator=(SharedSegment&& other) noexcept {
  std::swap(name_, other.name_);
  std::swap(bytes_, other.bytes_);
  std::swap(linked_, other.linked_);
  return *this;
}

SharedSegment::~SharedSegment() {
  unlink();
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

void SharedSegment::unlink() noexcept {
  if (std::exchange(linked_, false)) shm_unlink(name_.c_str());
}

}  // namespace hvd_backup
