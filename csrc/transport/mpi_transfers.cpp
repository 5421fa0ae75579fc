#include "transport/mpi_transfers.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

namespace hvd_backup {

void MpiTransfers::start_send(MPI_Comm comm, int peer, int tag, std::span<const std::byte> data, OnDone on_done) {
  start({.peer = peer, .tag = tag, .expected = data.size(), .on_done = std::move(on_done)},
        [&](std::size_t offset, int bytes, MPI_Request* request) {
          return MPI_Isend(data.data() + offset, bytes, MPI_BYTE, peer, tag, comm, request);
        });
}

void MpiTransfers::start_receive(MPI_Comm comm, int peer, int tag, std::span<std::byte> data, OnDone on_done) {
  start({.receives = true, .peer = peer, .tag = tag, .expected = data.size(), .on_done = std::move(on_done)},
        [&](std::size_t offset, int bytes, MPI_Request* request) {
          return MPI_Irecv(data.data() + offset, bytes, MPI_BYTE, peer, tag, comm, request);
        });
}

template <class StartPiece>
void MpiTransfers::start(Operation operation, StartPiece start_piece) {
  const std::size_t bytes = operation.expected;
  const char* doing = operation.receives ? "receiving from" : "sending to";
  const int peer = operation.peer;
  operation.pieces = (bytes + piece_bytes_ - 1) / piece_bytes_;
  const std::size_t number = operations_.add(std::move(operation));
  for (std::size_t offset = 0; offset < bytes; offset += piece_bytes_) {
    Request request;
    try {
      check_mpi(start_piece(offset, static_cast<int>(std::min(piece_bytes_, bytes - offset)), request.address()), doing,
                peer);
      requests_.add(std::move(request), number);
    } catch (const PeerLost&) {
      operations_[number].lost = true;
      --operations_[number].pieces;
    }
  }
  if (operations_[number].pieces == 0) operations_.remove(number);
}

void MpiTransfers::progress(std::vector<OnDone>* finished) {
  for (const RequestSet::Finished& request : requests_.take_finished()) finish(request, finished);
}

void MpiTransfers::finish(const RequestSet::Finished& finished, std::vector<OnDone>* callbacks) {
  Operation& operation = operations_[finished.number];
  if (operation.given_up) {
    if (--operation.pieces > 0) return;
    operations_.remove(finished.number);
    --given_up_;
    return;
  }
  operation.lost = operation.lost || is_loss(finished.code);
  if (!operation.lost) check_mpi(finished.code, operation.receives ? "receiving from" : "sending to", operation.peer);
  operation.received += finished.bytes;
  if (--operation.pieces > 0) return;
  Operation ended = operations_.remove(finished.number);
  if (ended.lost) return;
  if (ended.receives && ended.received != ended.expected) {
    throw RuntimeFailure("a transfer from rank " + std::to_string(ended.peer) + " has " +
                         std::to_string(ended.received) + " bytes, " + std::to_string(ended.expected) +
                         " were expected");
  }
  callbacks->push_back(std::move(ended.on_done));
}

void MpiTransfers::give_up(int tag) {
  for (Operation& operation : operations_.all()) {
    if (operation.pieces == 0 || operation.tag != tag || operation.given_up) continue;
    operation.given_up = true;
    ++given_up_;
  }
  requests_.cancel([&](std::size_t number) {
    const Operation& operation = operations_[number];
    return operation.given_up && operation.receives && operation.tag == tag;
  });
}

void MpiTransfers::throw_away(MatchedMessage& matched) {
  const auto memory = std::make_shared<Bytes>(matched.size());
  Request request = matched.start_receive(*memory);
  requests_.add(std::move(request), operations_.add({.receives = true,
                                                     .peer = matched.source(),
                                                     .tag = -1,
                                                     .on_done = [memory] {},
                                                     .pieces = 1,
                                                     .given_up = true}));
  ++given_up_;
}

void MpiTransfers::close(Owned owned) noexcept {
  requests_.abandon([this](std::size_t number) { return operations_[number].receives; });
  if (owned == Owned::is_left) {
    for (Operation& operation : operations_.all()) {
      if (operation.pieces > 0) new OnDone(std::move(operation.on_done));
    }
  }
  operations_ = {};
  given_up_ = 0;
}

}  // namespace hvd_backup
