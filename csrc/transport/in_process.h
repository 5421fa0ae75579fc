// A transport between threads of one process: for tests of everything above it, and for trying things out.
//
// It keeps the promises of transport.h and no more: a transfer completes only when both sides have called in, the
// receiver copies, and nothing moves while either side does not call progress(), like a peer that has been stopped.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace hvd_backup {

// What the endpoints share: a locked mailbox for each rank.
class Hub {
 public:
  explicit Hub(int size);  // at least 1
  ~Hub();
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;

  int size() const;

 private:
  friend class InProcessTransport;
  struct Mailbox;
  std::vector<std::unique_ptr<Mailbox>> mailboxes_;
};

// The endpoint of `rank`; one for each rank, each used by one thread. Destroying it withdraws its transfers: memory
// that they named is not touched afterwards, and what its peers have started with it stays pending.
std::unique_ptr<Transport> make_in_process_transport(std::shared_ptr<Hub> hub, int rank);

}  // namespace hvd_backup
