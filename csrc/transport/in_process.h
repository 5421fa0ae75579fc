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
  // At least 1. takes_device_memory: for stand-ins of GPUs whose memory is the host's.
  explicit Hub(int size, bool takes_device_memory = false);
  ~Hub();
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;

  int size() const;
  bool takes_device_memory() const { return takes_device_memory_; }

 private:
  friend class InProcessTransport;
  struct Mailbox;
  std::vector<std::unique_ptr<Mailbox>> mailboxes_;
  const bool takes_device_memory_;
};

// The endpoint of `rank`; one for each rank, each used by one thread. Destroying it withdraws its transfers: memory
// that they named is not touched afterwards, and what its peers have started with it stays pending.
std::unique_ptr<Transport> make_in_process_transport(std::shared_ptr<Hub> hub, int rank);

}  // namespace hvd_backup
