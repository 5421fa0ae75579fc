// The transport over MPI. It duplicates the communicator that it is given, once for each kind of traffic: messages and
// transfers cannot match each other, and nothing of ours can match anything of the user's.
//
// Transfers of some size between ranks of one node go through memory that they share (node_exchange.h), where the
// system lets them; MPI takes everything else, those that may be cancelled as parcels (mpi_parcels.h). No call here
// waits for a peer. This header does without mpi.h.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "transport/transport.h"

namespace hvd_backup {

struct MpiTransportOptions {
  std::size_t piece_bytes = std::size_t{1} << 30;  // larger transfers are cut: MPI counts are int
  bool share_memory = true;                        // with the other ranks of the node; the same on all ranks
  std::optional<bool> takes_device_memory;         // for tests, with host memory in its place; none: MPI is asked
};

// `mpi_comm` points to an MPI_Comm. Collective over it: returns when all of its ranks have called. MPI must be running
// with MPI_THREAD_MULTIPLE (UsageError otherwise).
//
// Destroy the transport before MPI_Finalize. Receives that are still pending are cancelled then, and sends to a peer
// that does not answer are left to MPI: their data must stay valid until MPI_Finalize. Once MPI has been finalised the
// destructor calls nothing.
std::unique_ptr<Transport> make_mpi_transport(const void* mpi_comm, const MpiTransportOptions& options = {});

// Whether MPI says in this process that it takes GPU memory (is CUDA-aware). MPI must be running.
bool mpi_says_it_takes_device_memory();

// The version text of the MPI library that is loaded. May be called before MPI is initialised.
std::string mpi_library_version();

}  // namespace hvd_backup
