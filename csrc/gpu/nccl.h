// NCCL, loaded while the program runs, so that nothing needs it to be built or imported. No CUDA here: a stream is a
// pointer that goes through, and the tests put a library of their own in NCCL's place (tests/nccl_double.cpp).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device/device.h"

namespace hvd_backup::gpu {

struct NcclFunctions;  // nccl.cpp

class Nccl {
 public:
  // Loads the first of these libraries that there is: names as dlopen takes them. Never fails: see why_not(). A library
  // stays loaded until the process ends; it has threads.
  explicit Nccl(const std::vector<std::string>& libraries);

  // Why it cannot be used; empty: it can, and only then the calls below may be made.
  const std::string& why_not() const { return why_not_; }
  // Such as "2.32.3"; empty if there is none. It may be too old.
  const std::string& version() const { return version_; }

  // As in Device. The stream takes the exchanges. It must outlive the group, and its GPU be the current one of the
  // thread that joins. A group that could not even begin to form has failed.
  std::string new_group() const;
  std::unique_ptr<DeviceGroup> join(const std::string& group, int member, int members, void* stream) const;

 private:
  std::shared_ptr<const NcclFunctions> functions_;
  std::string why_not_;
  std::string version_;
};

}  // namespace hvd_backup::gpu
