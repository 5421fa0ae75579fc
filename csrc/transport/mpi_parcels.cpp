#include "transport/mpi_parcels.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "base/error.h"

namespace hvd_backup {

void MpiParcels::send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done) {
  Bytes parcel(sizeof tag + data.size());
  std::memcpy(parcel.data(), &tag, sizeof tag);
  if (!data.empty()) std::memcpy(parcel.data() + sizeof tag, data.data(), data.size());
  messages_.send(peer, std::move(parcel),
                 [this, on_done = std::move(on_done)]() mutable { finished_.push_back(std::move(on_done)); });
}

void MpiParcels::receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done) {
  deliver(peer, tag, lanes_.requested(peer, tag, {data, std::move(on_done)}));
}

void MpiParcels::cancel(Tag tag) {
  lanes_.cancel(tag, [](int, const Bytes&) {});
}

void MpiParcels::forget(int peer) {
  messages_.forget(peer);
  lanes_.forget(peer);
}

void MpiParcels::progress(std::vector<OnDone>* finished) {
  messages_.progress();
  int peer = 0;
  Bytes parcel;
  while (messages_.receive(&peer, &parcel)) {
    Tag tag = 0;
    if (parcel.size() < sizeof tag) throw RuntimeFailure("malformed transfer from rank " + std::to_string(peer));
    std::memcpy(&tag, parcel.data(), sizeof tag);
    if (!lanes_.is_cancelled(tag)) deliver(peer, tag, lanes_.arrived(peer, tag, std::move(parcel)));
  }
  std::move(finished_.begin(), finished_.end(), std::back_inserter(*finished));
  finished_.clear();
}

void MpiParcels::deliver(int peer, Tag tag, std::optional<ParcelLanes::Match> match) {
  if (!match) return;
  auto& [parcel, receive] = *match;
  if (parcel.size() - sizeof tag != receive.data.size()) {
    throw RuntimeFailure("a transfer from rank " + std::to_string(peer) + " with tag " + std::to_string(tag) + " has " +
                         std::to_string(parcel.size() - sizeof tag) + " bytes, " + std::to_string(receive.data.size()) +
                         " were expected");
  }
  if (!receive.data.empty()) std::memcpy(receive.data.data(), parcel.data() + sizeof tag, receive.data.size());
  finished_.push_back(std::move(receive.on_done));
}

}  // namespace hvd_backup
