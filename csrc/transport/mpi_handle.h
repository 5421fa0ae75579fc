// The only owners of MPI_Comm, MPI_Request and MPI_Message, and the one place where an MPI error code becomes a
// RuntimeFailure. Moved, never copied. Destructors call nothing once MPI has been finalised, and never throw.
#pragma once

#include <mpi.h>
#if __has_include(<mpi-ext.h>)
#include <mpi-ext.h>  // Open MPI's, which has MPIX_*
#endif

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace hvd_backup {

// The process of a peer has died, and MPI goes on without it (ULFM: Open MPI 5, started with --with-ft ulfm).
class PeerLost : public RuntimeFailure {
  using RuntimeFailure::RuntimeFailure;
};

inline bool is_loss(int code) {
  if (code == MPI_SUCCESS) return false;
#ifdef MPIX_ERR_PROC_FAILED
  int error_class = 0;
  MPI_Error_class(code, &error_class);
  return error_class == MPIX_ERR_PROC_FAILED || error_class == MPIX_ERR_PROC_FAILED_PENDING;
#else
  return false;
#endif
}

// `doing`: what was tried, and with which peer if there is one: "sending to", 3.
inline void check_mpi(int code, const char* doing, int peer = -1) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  const std::string what = std::string("MPI error while ") + doing + (peer < 0 ? "" : " rank " + std::to_string(peer)) +
                           ": " + std::string(text, static_cast<std::size_t>(length));
  if (is_loss(code)) throw PeerLost(what);
  throw RuntimeFailure(what);
}

inline bool mpi_is_running() noexcept {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

// From now on MPI_ANY_SOURCE does without the processes that have died.
inline void acknowledge_losses([[maybe_unused]] MPI_Comm comm) {
#ifdef MPIX_ERR_PROC_FAILED
  check_mpi(MPIX_Comm_failure_ack(comm), "acknowledging that a process has died");
#endif
}

class Communicator {
 public:
  // Collective over `original`. Errors on the duplicate are returned, not fatal.
  static Communicator duplicate_of(MPI_Comm original) {
    Communicator copy;
    check_mpi(MPI_Comm_dup(original, &copy.comm_), "duplicating the communicator");
    check_mpi(MPI_Comm_set_errhandler(copy.comm_, MPI_ERRORS_RETURN), "setting the error handler");
    return copy;
  }

  // The ranks of `original` that can share memory, in the same order. Collective over it.
  static Communicator of_this_node(MPI_Comm original) {
    Communicator node;
    check_mpi(MPI_Comm_split_type(original, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node.comm_), "finding the node");
    check_mpi(MPI_Comm_set_errhandler(node.comm_, MPI_ERRORS_RETURN), "setting the error handler");
    return node;
  }

  Communicator() = default;
  Communicator(Communicator&& other) noexcept : comm_(std::exchange(other.comm_, MPI_COMM_NULL)) {}
  Communicator& operator=(Communicator&& other) noexcept {
    if (this != &other) {
      free();
      comm_ = std::exchange(other.comm_, MPI_COMM_NULL);
    }
    return *this;
  }
  ~Communicator() { free(); }

  MPI_Comm get() const { return comm_; }
  void free() noexcept {
    if (comm_ != MPI_COMM_NULL && mpi_is_running()) MPI_Comm_free(&comm_);
    comm_ = MPI_COMM_NULL;
  }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

// A request that has been started. Dropped unfinished, it is left to MPI to finish alone.
class Request {
 public:
  Request() = default;
  Request(Request&& other) noexcept : request_(other.release()) {}
  Request& operator=(Request&& other) noexcept {
    std::swap(request_, other.request_);
    return *this;
  }
  ~Request() {
    if (request_ != MPI_REQUEST_NULL && mpi_is_running()) MPI_Request_free(&request_);
  }

  MPI_Request* address() { return &request_; }  // for the MPI call that starts it
  MPI_Request release() noexcept { return std::exchange(request_, MPI_REQUEST_NULL); }

  bool finished(const char* doing, int peer) {
    int flag = 0;
    check_mpi(MPI_Test(&request_, &flag, MPI_STATUS_IGNORE), doing, peer);
    return flag != 0;
  }

 private:
  MPI_Request request_ = MPI_REQUEST_NULL;
};

// A message that has been matched and not yet received.
class MatchedMessage {
 public:
  // False when no message has arrived on `comm`.
  bool probe(MPI_Comm comm, int tag = MPI_ANY_TAG) {
    int found = 0;
    check_mpi(MPI_Improbe(MPI_ANY_SOURCE, tag, comm, &found, &message_, &status_), "looking for messages");
    return found != 0;
  }

  MatchedMessage() = default;
  MatchedMessage(const MatchedMessage&) = delete;
  MatchedMessage& operator=(const MatchedMessage&) = delete;

  int source() const { return status_.MPI_SOURCE; }
  std::size_t size() const {
    int count = 0;
    MPI_Get_count(&status_, MPI_BYTE, &count);
    return static_cast<std::size_t>(count);
  }
  Request start_receive(std::span<std::byte> data) {
    Request request;
    check_mpi(MPI_Imrecv(data.data(), static_cast<int>(data.size()), MPI_BYTE, &message_, request.address()),
              "receiving a message from", source());
    return request;
  }

 private:
  MPI_Message message_ = MPI_MESSAGE_NULL;
  MPI_Status status_{};
};

// Outstanding requests, packed as MPI_Testsome wants them, each with a number of the owner's choosing. To add or remove
// one costs the same however many there are.
class RequestSet {
 public:
  struct Finished {
    std::size_t number;
    int code;           // MPI_SUCCESS, or the error of this request
    std::size_t bytes;  // received
  };

  RequestSet() = default;
  RequestSet(const RequestSet&) = delete;
  RequestSet& operator=(const RequestSet&) = delete;
  ~RequestSet() { abandon({}); }

  void add(Request request, std::size_t number) {
    numbers_.push_back(number);
    requests_.push_back(request.release());
  }

  // Removes what has finished and returns it; valid until the next call.
  std::span<const Finished> take_finished();

  // Those for whose number `is_wanted` says so, which are receives: each finishes soon, unless its message has begun to
  // arrive; then it finishes with that.
  void cancel(const std::function<bool(std::size_t)>& is_wanted) noexcept;

  // Cancels the receives (those for whose number `is_receive` says so) and leaves the sends to MPI to finish.
  void abandon(const std::function<bool(std::size_t)>& is_receive) noexcept;

 private:
  std::vector<MPI_Request> requests_;
  std::vector<std::size_t> numbers_;  // of the request at the same index
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
  std::vector<Finished> finished_;
};

}  // namespace hvd_backup
