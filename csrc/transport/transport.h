// Bytes between two ranks, in two kinds that never overtake their own kind between the same pair:
//
//   messages   small, self-contained, any size known only to the sender (arrivals, decisions, requests)
//   transfers  large, into a buffer that the receiver has named, matched by (peer, tag)
//
// Nothing here blocks. A transport is used by one thread, the engine's. A peer that does not answer (stopped process)
// leaves its transfers pending and costs nobody else anything; a message towards it is buffered.
// What it is not: it knows no steps and no gradients.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace hvd_backup {

using Bytes = std::vector<std::byte>;
using Tag = std::int64_t;  // of a transfer, at least 0
using OnDone = std::function<void()>;

class Transport {
 public:
  virtual ~Transport() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Takes the message; a message to one's own rank is allowed. Order between the same pair is kept.
  virtual void send_message(int peer, Bytes message) = 0;

  // The next message, if one has arrived. Returns false when there is none.
  virtual bool receive_message(int* from, Bytes* message) = 0;

  // Starts a transfer of `data` (any size, above 2^31 bytes too, zero too). `data` must stay valid, and for a send
  // unchanged, until `on_done` has run. Two transfers between the same pair with the same tag match in the order in
  // which they were started, and must have equal sizes. Never to one's own rank.
  //
  // cancellable: cancel() can end it, which may cost a copy. The same on both sides, and for all with this tag.
  virtual void start_send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done,
                          bool cancellable = false) = 0;
  virtual void start_receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done,
                             bool cancellable = false) = 0;

  // Sends the same data to each of `peers`, which may cost less than one by one. `on_done` runs once, after all.
  virtual void start_send_to_all(std::span<const int> peers, Tag tag, std::span<const std::byte> data, OnDone on_done,
                                 bool cancellable = false);

  // Ends the transfers with this tag, to and from whichever peer, for good: when it returns, nothing of theirs is
  // touched any more, and what peers send with this tag from now on is thrown away. Peers that do not cancel it, too,
  // may wait in vain. A callback of what had finished before may still run. Not from inside a callback.
  virtual void cancel(Tag tag) = 0;

  // Whether the transfers below can be used: then their memory may be a GPU's. The same on all ranks.
  virtual bool takes_device_memory() const = 0;

  // As start_send and start_receive, of at least one byte. They match each other alone, and end together with all that
  // have their tag: what `on_done` owns lives until the memory is not touched any more, given up or not.
  virtual void start_device_send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done) = 0;
  virtual void start_device_receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done) = 0;

  // Ends the device transfers with this tag, as far as they are ours: they do not count as pending any more, and their
  // callbacks do not run, but for what had finished before. What is received may still be written, and what is sent be
  // read and delivered, for as long as a peer has stopped. What peers send with this tag from now on is taken and
  // thrown away, so that theirs end, too.
  virtual void give_up_device(Tag tag) = 0;

  // Whether the others can go on when a process dies: then take_lost() says whose has.
  virtual bool survives_losses() const { return false; }

  // The ranks whose processes have died since the last call. What was on its way to and from them has ended, without
  // callbacks, and what is started towards them from now on does nothing; so do transfers that they are part of.
  virtual std::vector<int> take_lost() { return {}; }

  // Completes what can be completed and runs the callbacks, which may start new transfers. Returns whether anything
  // was completed.
  virtual bool progress() = 0;

  // Transfers and messages that have been started and are not complete.
  virtual std::size_t pending() const = 0;
};

}  // namespace hvd_backup
