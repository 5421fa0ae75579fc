// The messages of the MPI transport: MPI_Isend, MPI_Improbe and MPI_Imrecv, so that a receiver learns the size from the
// message, on a communicator of their own. No call waits for a peer.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <deque>
#include <utility>
#include <vector>

#include "transport/mpi_handle.h"
#include "transport/slots.h"
#include "transport/transport.h"

namespace hvd_backup {

class MpiMessages {
 public:
  explicit MpiMessages(MPI_Comm original);  // collective: duplicates it
  ~MpiMessages() { close(); }

  // As in transport.h. on_done: once the message has left; perhaps in the call.
  void send(int peer, Bytes message, OnDone on_done = {});
  bool receive(int* from, Bytes* message);

  // Its process has died: nothing goes to it any more, and nothing that it had sent is handed out.
  void forget(int peer);

  void progress();  // runs the callbacks
  std::size_t pending() const { return unfinished_.size(); }

  // Cancels what has not arrived and leaves to MPI what has not been taken. Idempotent.
  void close() noexcept;

 private:
  struct Unfinished {
    int peer = 0;
    bool incoming = false;
    bool arrived = false;
    Bytes content;
    OnDone on_done;
  };

  void accept(MatchedMessage& matched);
  void release_arrived(int peer);

  Communicator comm_;
  Slots<Unfinished> unfinished_;
  RequestSet requests_;                            // numbered as in unfinished_
  std::vector<std::deque<std::size_t>> arriving_;  // for each peer, messages that are matched and not handed out
  std::deque<std::pair<int, Bytes>> ready_;
  std::vector<bool> lost_;  // by peer
};

}  // namespace hvd_backup
