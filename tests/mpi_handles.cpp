// Counts the MPI handles that hvd_backup's core holds: a library that tests put in front of MPI's functions (LD_PRELOAD;
// MPI's profiling interface: each MPI_X calls PMPI_X). Only calls that come from the core count; those of mpi4py or
// Horovod pass through. It counts at MPI itself, so a handle that escapes csrc/transport/mpi_handle.h is seen, too.
// Compiled by tests/test_mpi_handles.py with the mpicxx in use.
#include <dlfcn.h>
#include <mpi.h>

#include <atomic>
#include <cstring>

namespace {

std::atomic<long> communicators{0}, requests{0}, messages{0};
std::atomic<long> ever_communicators{0}, ever_requests{0}, ever_messages{0};

bool is_core(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) != 0 && info.dli_fname && std::strstr(info.dli_fname, "/_core.");
}

int made(int code, bool counts, std::atomic<long>& now, std::atomic<long>& ever) {
  if (code == MPI_SUCCESS && counts) ++now, ++ever;
  return code;
}

}  // namespace

#define IS_CORE is_core(__builtin_return_address(0))

extern "C" {

// Communicators, requests and matched messages that the core holds now, and how many it has ever had.
void mpi_handles(long out[6]) {
  const std::atomic<long>* all[] = {&communicators,      &requests,      &messages,
                                    &ever_communicators, &ever_requests, &ever_messages};
  for (int i = 0; i < 6; ++i) out[i] = *all[i];
}

int MPI_Comm_dup(MPI_Comm comm, MPI_Comm* copy) {
  return made(PMPI_Comm_dup(comm, copy), IS_CORE, communicators, ever_communicators);
}
int MPI_Comm_split_type(MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm* part) {
  return made(PMPI_Comm_split_type(comm, type, key, info, part), IS_CORE, communicators, ever_communicators);
}
int MPI_Comm_free(MPI_Comm* comm) {
  if (IS_CORE) --communicators;
  return PMPI_Comm_free(comm);
}

int MPI_Isend(const void* data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm, MPI_Request* request) {
  return made(PMPI_Isend(data, count, type, to, tag, comm, request), IS_CORE, requests, ever_requests);
}
int MPI_Irecv(void* data, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm, MPI_Request* request) {
  return made(PMPI_Irecv(data, count, type, from, tag, comm, request), IS_CORE, requests, ever_requests);
}
int MPI_Improbe(int from, int tag, MPI_Comm comm, int* flag, MPI_Message* message, MPI_Status* status) {
  const int code = PMPI_Improbe(from, tag, comm, flag, message, status);
  return made(code, *flag != 0 && IS_CORE, messages, ever_messages);
}
int MPI_Imrecv(void* data, int count, MPI_Datatype type, MPI_Message* message, MPI_Request* request) {
  const bool counts = IS_CORE;
  if (counts) --messages;
  return made(PMPI_Imrecv(data, count, type, message, request), counts, requests, ever_requests);
}
int MPI_Test(MPI_Request* request, int* flag, MPI_Status* status) {
  const bool counts = *request != MPI_REQUEST_NULL && IS_CORE;
  const int code = PMPI_Test(request, flag, status);
  if (counts && *request == MPI_REQUEST_NULL) --requests;
  return code;
}
int MPI_Testsome(int count, MPI_Request* some, int* finished, int* indices, MPI_Status* statuses) {
  const int code = PMPI_Testsome(count, some, finished, indices, statuses);
  if (*finished != MPI_UNDEFINED && IS_CORE) requests -= *finished;
  return code;
}
int MPI_Request_free(MPI_Request* request) {
  if (IS_CORE) --requests;
  return PMPI_Request_free(request);
}

}  // extern "C"
