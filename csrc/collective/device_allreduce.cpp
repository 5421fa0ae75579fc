#include "collective/device_allreduce.h"

#include <utility>

namespace hvd_backup {

namespace {
constexpr std::size_t slot_alignment = 256;  // of what arrives, so that the kernel can read it in wide words
}

DeviceAllreduce::DeviceAllreduce(Device& device, DeviceGroup& group, DeviceAllreduceOptions options,
                                 Device::Ready ready)
    : device_(device),
      group_(group),
      options_(std::move(options)),
      ready_(ready),
      element_bytes_(size_of(options_.dtype)) {}

bool DeviceAllreduce::go_on() {
  if (issued() || group_.state() != DeviceGroup::State::ready) return false;
  switch (stage_) {
    case Stage::fresh:
      device_.wait_for(ready_);
      exchange_contributions();
      stage_ = Stage::gathering;
      break;
    case Stage::gathering:
      sum();
      exchange_results();
      stage_ = Stage::scattering;
      break;
    case Stage::scattering:
      finish();
      stage_ = Stage::issued;
      break;
    case Stage::issued:
      break;
  }
  return true;
}

bool DeviceAllreduce::complete() {
  if (!issued() || !device_.reached(end_)) return false;
  if (norms_) {
    options_.norms->sources += norms_->sources;
    options_.norms->destination += norms_->destination;
    norms_.reset();
  }
  return true;
}

// Of this member's shard, rounded up.
std::size_t DeviceAllreduce::slot_bytes() const {
  const std::size_t bytes = shard(options_.self).size() * element_bytes_;
  return (bytes + slot_alignment - 1) / slot_alignment * slot_alignment;
}

void DeviceAllreduce::exchange_contributions() {
  scratch_ = device_.scratch(slot_bytes() * options_.members.size());
  auto* contribution = static_cast<std::byte*>(const_cast<void*>(options_.contribution));  // only read
  std::vector<DeviceGroup::Part> parts;
  for (std::size_t member = 0; member < options_.members.size(); ++member) {
    if (member == options_.self) continue;
    const Shard theirs = shard(member), own = shard(options_.self);
    const int peer = options_.members[member];
    if (theirs.size() > 0) {
      parts.push_back({peer, contribution + theirs.begin * element_bytes_, theirs.size() * element_bytes_, true});
    }
    if (own.size() > 0) parts.push_back({peer, scratch_ + member * slot_bytes(), own.size() * element_bytes_, false});
  }
  if (!parts.empty()) group_.exchange(parts);
}

void DeviceAllreduce::sum() {
  const Shard own = shard(options_.self);
  if (own.size() == 0) return;
  const std::size_t offset = own.begin * element_bytes_;
  std::vector<const void*> sources;
  for (std::size_t member = 0; member < options_.members.size(); ++member) {
    const bool is_own = member == options_.self;
    sources.push_back(is_own ? static_cast<const std::byte*>(options_.contribution) + offset
                             : scratch_ + member * slot_bytes());
  }
  norms_ = device_.sum(options_.dtype, static_cast<std::byte*>(options_.result) + offset, sources, options_.weights,
                       options_.scale, own.size(), options_.norms != nullptr);
}

void DeviceAllreduce::exchange_results() {
  auto* result = static_cast<std::byte*>(options_.result);
  std::vector<DeviceGroup::Part> parts;
  for (std::size_t member = 0; member < options_.members.size(); ++member) {
    if (member == options_.self) continue;
    const Shard theirs = shard(member), own = shard(options_.self);
    const int peer = options_.members[member];
    if (own.size() > 0) parts.push_back({peer, result + own.begin * element_bytes_, own.size() * element_bytes_, true});
    if (theirs.size() > 0) {
      parts.push_back({peer, result + theirs.begin * element_bytes_, theirs.size() * element_bytes_, false});
    }
  }
  if (!parts.empty()) group_.exchange(parts);
}

void DeviceAllreduce::finish() {
  for (const auto& [part, place, on_device] : options_.kept) {
    const auto* from = static_cast<const std::byte*>(options_.result) + part.begin * element_bytes_;
    const std::size_t bytes = part.size() * element_bytes_;
    if (on_device) {
      device_.copy(place.get(), from, bytes);
    } else {
      device_.copy_beside(place.get(), from, bytes);
    }
  }
  end_ = device_.mark();
}

}  // namespace hvd_backup
