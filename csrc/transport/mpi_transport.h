// The transport over MPI. It duplicates the communicator that it is given, twice: messages and transfers cannot match
// each other, and nothing of ours can match anything of the user's.
//
// Messages are MPI_Isend, MPI_Improbe and MPI_Imrecv, so a receiver learns the size from the message. Transfers are
// MPI_Isend and MPI_Irecv in pieces of at most `piece_bytes`, because MPI counts are int. No call here waits for a
// peer. This header does without mpi.h.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "transport/transport.h"

namespace hvd_backup {

inline constexpr std::size_t mpi_piece_bytes = std::size_t{1} << 30;

// `mpi_comm` points to an MPI_Comm. Collective over it: returns when all of its ranks have called. MPI must be running
// with MPI_THREAD_MULTIPLE (UsageError otherwise).
//
// Destroy the transport before MPI_Finalize. Receives that are still pending are cancelled then, and sends to a peer
// that does not answer are left to MPI: their data must stay valid until MPI_Finalize. Once MPI has been finalised the
// destructor calls nothing.
std::unique_ptr<Transport> make_mpi_transport(const void* mpi_comm, std::size_t piece_bytes = mpi_piece_bytes);

// The version text of the MPI library that is loaded. May be called before MPI is initialised.
std::string mpi_library_version();

}  // namespace hvd_backup
