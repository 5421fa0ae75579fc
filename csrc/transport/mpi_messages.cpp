#include "transport/mpi_messages.h"

#include <limits>
#include <string>

namespace hvd_backup {

namespace {

constexpr int message_tag = 0;

}  // namespace

MpiMessages::MpiMessages(MPI_Comm original) : comm_(Communicator::duplicate_of(original)) {
  int size = 0;
  check_mpi(MPI_Comm_size(comm_.get(), &size), "asking for the size");
  arriving_.resize(static_cast<std::size_t>(size));
  lost_.resize(static_cast<std::size_t>(size));
}

void MpiMessages::send(int peer, Bytes message, OnDone on_done) {
  if (lost_[static_cast<std::size_t>(peer)]) return;
  if (message.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
    throw UsageError("a message of " + std::to_string(message.size()) + " bytes; send large data as a transfer");
  }
  Request request;
  try {
    check_mpi(MPI_Isend(message.data(), static_cast<int>(message.size()), MPI_BYTE, peer, message_tag, comm_.get(),
                        request.address()),
              "sending a message to", peer);
    // Small messages are buffered by MPI and have left already.
    if (request.finished("sending a message to", peer)) {
      if (on_done) on_done();
      return;
    }
  } catch (const PeerLost&) {
    return;
  }
  requests_.add(std::move(request), unfinished_.add({peer, false, false, std::move(message), std::move(on_done)}));
}

bool MpiMessages::receive(int* from, Bytes* message) {
  try {
    MatchedMessage matched;
    if (matched.probe(comm_.get())) accept(matched);
  } catch (const PeerLost&) {
    acknowledge_losses(comm_.get());
  }
  if (ready_.empty()) return false;
  *from = ready_.front().first;
  *message = std::move(ready_.front().second);
  ready_.pop_front();
  return true;
}

void MpiMessages::accept(MatchedMessage& matched) {
  const int peer = matched.source();
  Bytes content(matched.size());
  Request request = matched.start_receive(content);
  if (lost_[static_cast<std::size_t>(peer)]) return;
  const bool arrived = request.finished("receiving a message from", peer);
  auto& earlier = arriving_[static_cast<std::size_t>(peer)];
  if (arrived && earlier.empty()) {
    ready_.emplace_back(peer, std::move(content));
    return;
  }
  earlier.push_back(unfinished_.add({peer, true, arrived, std::move(content), {}}));
  if (!arrived) requests_.add(std::move(request), earlier.back());
}

void MpiMessages::progress() {
  for (const RequestSet::Finished& finished : requests_.take_finished()) {
    Unfinished& message = unfinished_[finished.number];
    if (is_loss(finished.code)) {
      unfinished_.remove(finished.number);
      continue;
    }
    check_mpi(finished.code, message.incoming ? "receiving a message from" : "sending a message to", message.peer);
    if (message.incoming && lost_[static_cast<std::size_t>(message.peer)]) {
      unfinished_.remove(finished.number);
    } else if (message.incoming) {
      message.arrived = true;
      release_arrived(message.peer);
    } else {
      const Unfinished sent = unfinished_.remove(finished.number);
      if (sent.on_done) sent.on_done();
    }
  }
}

void MpiMessages::forget(int peer) {
  lost_[static_cast<std::size_t>(peer)] = true;
  std::erase_if(ready_, [peer](const auto& message) { return message.first == peer; });
  std::deque<std::size_t>& arriving = arriving_[static_cast<std::size_t>(peer)];
  for (const std::size_t number : arriving) {
    if (unfinished_[number].arrived) unfinished_.remove(number);  // the others end with an error
  }
  arriving.clear();
}

// Messages from one peer are handed out in the order in which they were matched, also when a later one is complete
// before an earlier one.
void MpiMessages::release_arrived(int peer) {
  auto& arriving = arriving_[static_cast<std::size_t>(peer)];
  while (!arriving.empty() && unfinished_[arriving.front()].arrived) {
    ready_.emplace_back(peer, unfinished_.remove(arriving.front()).content);
    arriving.pop_front();
  }
}

void MpiMessages::close() noexcept {
  requests_.abandon([this](std::size_t number) { return unfinished_[number].incoming; });
  // MPI may still read a message that its peer has not taken, and write one that it has matched: that memory is given
  // up, because nobody will say when it is free.
  for (Unfinished& message : unfinished_.all()) {
    if (!message.content.empty()) new Bytes(std::move(message.content));
  }
  unfinished_ = {};
  comm_.free();
}

}  // namespace hvd_backup
