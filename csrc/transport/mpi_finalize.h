// Runs a function at the beginning of MPI_Finalize, whoever calls it and when (the MPI standard deletes the attributes of
// MPI_COMM_SELF first, for this purpose). For programs that finalise MPI before they shut us down.
#pragma once

#include <functional>

namespace hvd_backup {

// Returns a handle for forget_mpi_finalize_call.
int call_before_mpi_finalize(std::function<void()> function);
void forget_mpi_finalize_call(int handle);  // -1: nothing to forget

}  // namespace hvd_backup
