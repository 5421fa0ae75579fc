// What the tests of groups of GPUs (device/device.h) have in common, whoever implements them.
#pragma once

#include <cstddef>
#include <tuple>
#include <vector>

#include "bindings/gpu_arguments.h"
#include "device/device.h"

namespace hvd_backup {

using Described = std::tuple<int, gpu::Address, std::size_t>;  // a part of an exchange: peer, address, bytes

inline const char* name_of(DeviceGroup::State state) {
  switch (state) {
    case DeviceGroup::State::busy:
      return "busy";
    case DeviceGroup::State::ready:
      return "ready";
    case DeviceGroup::State::failed:
      return "failed";
  }
  return "";
}

inline void exchange(DeviceGroup& group, const std::vector<Described>& sends, const std::vector<Described>& receives) {
  std::vector<DeviceGroup::Part> parts;
  for (const auto& [peer, data, bytes] : sends) parts.push_back({peer, gpu::pointer<std::byte>(data), bytes, true});
  for (const auto& [peer, data, bytes] : receives) parts.push_back({peer, gpu::pointer<std::byte>(data), bytes, false});
  group.exchange(parts);
}

}  // namespace hvd_backup
