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
}

void MpiMessages::send(int peer, Bytes message, OnDone on_done) {
  if (message.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
    throw UsageError("a message of " + std::to_string(message.size()) + " bytes; send large data as a transfer");
  }
  Request request;
  check_mpi(MPI_Isend(message.data(), static_cast<int>(message.size()), MPI_BYTE, peer, message_tag, comm_.get(),
                      request.address()),
            "sending a message to", peer);
  // Small messages are buffered by MPI and have left already.
  if (request.finished("sending a message to", peer)) {
    if (on_done) on_done();
    return;
  }
  requests_.add(std::move(request), unfinished_.add({peer, false, false, std::move(message), std::move(on_done)}));
}

bool MpiMessages::receive(int* from, Bytes* message) {
  MatchedMessage matched;
  if (matched.probe(comm_.get())) accept(matched);
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
    check_mpi(finished.code, message.incoming ? "receiving a message from" : "sending a message to", message.peer);
    if (message.incoming) {
      message.arrived = true;
      release_arrived(message.peer);
    } else {
      const Unfinished sent = unfinished_.remove(finished.number);
      if (sent.on_done) sent.on_done();
    }
  }
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
