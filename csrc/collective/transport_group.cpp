#include "collective/transport_group.h"

#include <sched.h>

#include <utility>

#include "base/error.h"

namespace hvd_backup {

namespace {
constexpr std::size_t place_alignment = 256;  // of each part, as of memory that CUDA gives out
}

TransportGroup::TransportGroup(Device& device, Transport& transport, Tag tag, std::vector<int> members)
    : device_(device), transport_(transport), tag_(tag), members_(std::move(members)) {}

DeviceGroup::State TransportGroup::state() {
  if (failed_) return State::failed;
  if (!exchange_) return State::ready;
  if (!transferring_) {
    if (!device_.reached(exchange_->copied)) return State::busy;
    try {
      start_transfers();
    } catch (const RuntimeFailure& error) {
      fail(error.what());
      return State::failed;
    }
  }
  if (exchange_->left > 0) return State::busy;
  copy_received();
  return State::ready;
}

void TransportGroup::exchange(std::span<const Part> parts) {
  if (failed_ || exchange_) {
    throw RuntimeFailure("an exchange between GPUs in a group that " +
                         (failed_ ? "has failed: " + reason_ : "is busy: wait for state() first"));
  }
  try {
    copy_sent(parts);
  } catch (const RuntimeFailure& error) {  // no memory is left, most likely
    fail(error.what());
  }
}

void TransportGroup::copy_sent(std::span<const Part> parts) {
  exchange_ = std::make_shared<Exchange>();
  std::vector<std::size_t> offsets;
  std::size_t bytes = 0;
  for (const Part& part : parts) {
    offsets.push_back(bytes);
    bytes += (part.bytes + place_alignment - 1) / place_alignment * place_alignment;
  }
  exchange_->parts.assign(parts.begin(), parts.end());
  exchange_->memory = device_.memory(bytes);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    exchange_->places.push_back(exchange_->memory.get() + offsets[i]);
    if (parts[i].is_send) device_.copy(exchange_->places[i], parts[i].data, parts[i].bytes);
  }
  exchange_->copied = device_.mark();  // after memory(): what used it before has ended by then, too
}

// What arrives finds its place waiting: so receives come first.
void TransportGroup::start_transfers() {
  transferring_ = true;
  exchange_->left = exchange_->parts.size();
  device_.as_current([this] {
    for (const bool sends : {false, true}) {
      for (std::size_t i = 0; i < exchange_->parts.size(); ++i) {
        const Part& part = exchange_->parts[i];
        if (part.is_send != sends) continue;
        const std::span<std::byte> data(exchange_->places[i], part.bytes);
        const int peer = members_[static_cast<std::size_t>(part.peer)];
        const auto on_done = [own = exchange_] { --own->left; };
        if (part.is_send) {
          transport_.start_device_send(peer, tag_, data, on_done);
        } else {
          transport_.start_device_receive(peer, tag_, data, on_done);
        }
      }
    }
  });
}

void TransportGroup::copy_received() {
  for (std::size_t i = 0; i < exchange_->parts.size(); ++i) {
    const Part& part = exchange_->parts[i];
    if (!part.is_send) device_.copy(part.data, exchange_->places[i], part.bytes);
  }
  exchange_.reset();
  transferring_ = false;
}

void TransportGroup::fail(std::string reason) {
  failed_ = true;
  reason_ = std::move(reason);
  exchange_.reset();
  transport_.give_up_device(tag_);
}

void TransportGroup::abort() {
  if (std::exchange(aborted_, true)) return;
  if (!failed_) fail("the group was ended on this rank");
  // Only this GPU's own work is waited for: what goes on between GPUs is not in the queue.
  try {
    const Device::Mark end = device_.mark();
    while (!device_.reached(end)) sched_yield();
  } catch (const RuntimeFailure&) {
    // A GPU that has failed does nothing any more; whoever uses it next is told.
  }
}

}  // namespace hvd_backup
