// The device transfers of the MPI transport (transport.h), by CUDA-aware MPI: MPI_Isend and MPI_Irecv on a communicator
// of their own, because shared memory and parcels copy with memcpy, which knows no GPU memory.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <deque>
#include <span>
#include <utility>
#include <vector>

#include "transport/mpi_handle.h"
#include "transport/mpi_transfers.h"
#include "transport/transport.h"

namespace hvd_backup {

class MpiDeviceTransfers {
 public:
  // Collective: duplicates `original`.
  MpiDeviceTransfers(MPI_Comm original, std::size_t piece_bytes)
      : comm_(Communicator::duplicate_of(original)), transfers_(piece_bytes) {}
  ~MpiDeviceTransfers() { transfers_.close(MpiTransfers::Owned::is_left); }  // before its communicator
  MpiDeviceTransfers(const MpiDeviceTransfers&) = delete;
  MpiDeviceTransfers& operator=(const MpiDeviceTransfers&) = delete;

  // As in transport.h, with MPI's tags.
  void start_send(int peer, int tag, std::span<const std::byte> data, OnDone on_done) {
    transfers_.start_send(comm_.get(), peer, tag, data, std::move(on_done));
  }
  void start_receive(int peer, int tag, std::span<std::byte> data, OnDone on_done) {
    transfers_.start_receive(comm_.get(), peer, tag, data, std::move(on_done));
  }
  void give_up(int tag);

  void progress(std::vector<OnDone>* finished);
  std::size_t pending() const { return transfers_.pending(); }

 private:
  // A peer that has stopped belongs to one of the last groups; each look for what it sends costs as much as a test of
  // all transfers, so one tag has its turn at a time.
  static constexpr std::size_t most_given_up = 16;

  Communicator comm_;
  MpiTransfers transfers_;
  std::deque<int> given_up_;  // tags: what is sent with them is thrown away
};

}  // namespace hvd_backup
