// The transfers of the MPI transport: MPI_Isend and MPI_Irecv in pieces, because MPI counts are int. No call waits for
// a peer.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <span>
#include <vector>

#include "transport/mpi_handle.h"
#include "transport/slots.h"
#include "transport/transport.h"

namespace hvd_backup {

class MpiTransfers {
 public:
  // Pieces have at most `piece_bytes`, which fits into an int.
  explicit MpiTransfers(std::size_t piece_bytes) : piece_bytes_(piece_bytes) {}
  ~MpiTransfers() { close(); }

  // At least one byte.
  void start_send(MPI_Comm comm, int peer, int tag, std::span<const std::byte> data, OnDone on_done);
  void start_receive(MPI_Comm comm, int peer, int tag, std::span<std::byte> data, OnDone on_done);

  // Callbacks of what has finished are appended to `finished`, not run.
  void progress(std::vector<OnDone>* finished);
  std::size_t pending() const { return operations_.size() - given_up_; }

  // Those with this tag end without callbacks: receives are cancelled, sends left to finish. What the callbacks own
  // lives until MPI has done with it.
  void give_up(int tag);
  // Receives what has arrived and nobody wants.
  void throw_away(MatchedMessage& matched);

  // Cancels the receives and leaves the sends to MPI to finish. What the callbacks own is freed, or, because nobody
  // will say when MPI has done with it, left for good. Idempotent.
  enum class Owned { is_freed, is_left };
  void close(Owned owned = Owned::is_freed) noexcept;

 private:
  struct Operation {
    bool receives = false;
    int peer = 0;
    int tag = 0;
    std::size_t expected = 0;
    OnDone on_done;
    std::size_t pieces = 0;  // that are not finished
    std::size_t received = 0;
    bool lost = false;  // the peer has died
    bool given_up = false;
  };

  template <class StartPiece>
  void start(Operation operation, StartPiece start_piece);
  void finish(const RequestSet::Finished& finished, std::vector<OnDone>* callbacks);

  const std::size_t piece_bytes_;
  Slots<Operation> operations_;
  std::size_t given_up_ = 0;  // of them
  RequestSet requests_;       // numbered as in operations_
};

}  // namespace hvd_backup
