#include "transport/mpi_finalize.h"

#include <mpi.h>

#include "base/error.h"

namespace hvd_backup {

namespace {

int run_at_finalize(MPI_Comm, int, void* attribute, void*) {
  auto* function = static_cast<std::function<void()>*>(attribute);
  (*function)();
  delete function;
  return MPI_SUCCESS;
}

}  // namespace

int call_before_mpi_finalize(std::function<void()> function) {
  int keyval = MPI_KEYVAL_INVALID;
  if (MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, run_at_finalize, &keyval, nullptr) != MPI_SUCCESS ||
      MPI_Comm_set_attr(MPI_COMM_SELF, keyval, new std::function<void()>(std::move(function))) != MPI_SUCCESS) {
    throw RuntimeFailure("MPI does not take an attribute on MPI_COMM_SELF");
  }
  return keyval;
}

void forget_mpi_finalize_call(int handle) {
  int finalized = 0;
  if (handle == -1 || MPI_Finalized(&finalized) != MPI_SUCCESS || finalized) return;
  void* attribute = nullptr;
  int found = 0;
  MPI_Comm_get_attr(MPI_COMM_SELF, handle, &attribute, &found);
  if (!found) return;
  auto* function = static_cast<std::function<void()>*>(attribute);
  *function = [] {};
  MPI_Comm_delete_attr(MPI_COMM_SELF, handle);  // runs the empty function and frees it
}

}  // namespace hvd_backup
