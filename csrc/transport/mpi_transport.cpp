#include "transport/mpi_transport.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <utility>

#include "transport/mpi_handle.h"

namespace hvd_backup {

namespace {

void require_thread_multiple() {
  if (!mpi_is_running()) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    throw UsageError(initialized == 0
                         ? "MPI is not initialised; import mpi4py.MPI (or call MPI_Init_thread) before init()"
                         : "MPI has been finalised already; call init() before MPI_Finalize");
  }
  int provided = MPI_THREAD_SINGLE;
  check_mpi(MPI_Query_thread(&provided), "asking for the thread level");
  if (provided == MPI_THREAD_MULTIPLE) return;
  const char* names[] = {"MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED"};
  const int levels[] = {MPI_THREAD_SINGLE, MPI_THREAD_FUNNELED, MPI_THREAD_SERIALIZED};
  const auto level = static_cast<std::size_t>(std::find(levels, levels + 3, provided) - levels);
  throw UsageError("MPI was initialised with " + std::string(level < 3 ? names[level] : "an unknown thread level") +
                   ", but a communication thread of ours runs beside the program's own: initialise MPI with "
                   "MPI_Init_thread(..., MPI_THREAD_MULTIPLE); with mpi4py leave mpi4py.rc.thread_level at "
                   "\"multiple\"; with Horovod set HOROVOD_MPI_THREADS_DISABLE=0");
}

class MpiTransport final : public Transport {
 public:
  MpiTransport(MPI_Comm original, std::size_t piece_bytes) : piece_bytes_(piece_bytes) {
    require_thread_multiple();
    if (piece_bytes == 0 || piece_bytes > mpi_piece_bytes) {
      throw UsageError("piece_bytes is " + std::to_string(piece_bytes) + "; expected 1 to " +
                       std::to_string(mpi_piece_bytes));
    }
    messages_ = Communicator::duplicate_of(original);
    transfers_ = Communicator::duplicate_of(original);
    check_mpi(MPI_Comm_rank(transfers_.get(), &rank_), "asking for the rank");
    check_mpi(MPI_Comm_size(transfers_.get(), &size_), "asking for the size");
    int* upper_bound = nullptr;
    int found = 0;
    check_mpi(MPI_Comm_get_attr(transfers_.get(), MPI_TAG_UB, &upper_bound, &found), "asking for the largest tag");
    if (found != 0) max_tag_ = *upper_bound;
    arriving_.resize(static_cast<std::size_t>(size_));
  }

  ~MpiTransport() override { close(); }
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int max_tag() const override { return max_tag_; }
  std::size_t pending() const override { return operations_.size() - free_.size() + callbacks_.size(); }

  void send_message(int peer, Bytes message) override {
    if (peer == rank_) {
      ready_.emplace_back(peer, std::move(message));
      return;
    }
    if (message.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
      throw UsageError("a message of " + std::to_string(message.size()) + " bytes; send large data as a transfer");
    }
    Request request;
    check_mpi(MPI_Isend(message.data(), static_cast<int>(message.size()), MPI_BYTE, peer, message_tag, messages_.get(),
                        request.address()),
              "sending a message to", peer);
    // Small messages are buffered by MPI and have left already.
    if (request.finished("sending a message to", peer)) return;
    const std::size_t number = take_operation();
    operations_[number] = {Kind::send_message, peer, 1, 0, 0, nullptr, std::move(message), message_tag};
    requests_.add(std::move(request), number);
  }

  bool receive_message(int* from, Bytes* message) override {
    MatchedMessage matched;
    if (matched.probe(messages_.get())) accept(matched);
    if (ready_.empty()) return false;
    *from = ready_.front().first;
    *message = std::move(ready_.front().second);
    ready_.pop_front();
    return true;
  }

  void start_send(int peer, int tag, std::span<const std::byte> data, OnDone on_done) override {
    start(Kind::send, peer, tag, data.size(), std::move(on_done),
          [&](std::size_t offset, int bytes, MPI_Request* request) {
            return MPI_Isend(data.data() + offset, bytes, MPI_BYTE, peer, tag, transfers_.get(), request);
          });
  }

  void start_receive(int peer, int tag, std::span<std::byte> data, OnDone on_done) override {
    start(Kind::receive, peer, tag, data.size(), std::move(on_done),
          [&](std::size_t offset, int bytes, MPI_Request* request) {
            return MPI_Irecv(data.data() + offset, bytes, MPI_BYTE, peer, tag, transfers_.get(), request);
          });
  }

  bool cancel_receives(int tag) override {
    bool none_left = true;
    for (Operation& operation : operations_) {
      if (operation.kind == Kind::receive && operation.tag == tag && operation.pieces > 0) none_left = false;
    }
    if (none_left) return true;
    requests_.cancel([&](std::size_t number) {
      Operation& operation = operations_[number];
      return operation.kind == Kind::receive && operation.tag == tag;
    });
    return false;  // until MPI has told what became of them
  }

  bool progress() override {
    for (const RequestSet::Finished& finished : requests_.take_finished()) finish(finished);
    // A callback may start transfers, and one of zero bytes adds a callback: that one runs in the next call.
    std::vector<OnDone> callbacks = std::exchange(callbacks_, {});
    for (const OnDone& on_done : callbacks) on_done();
    return !callbacks.empty();
  }

 private:
  enum class Kind { send, receive, send_message, receive_message };

  struct Operation {
    Kind kind = Kind::send;
    int peer = 0;
    std::size_t pieces = 0;  // that are not finished
    std::size_t expected = 0;
    std::size_t received = 0;
    OnDone on_done;
    Bytes message;
    int tag = 0;             // of a transfer
    bool cancelled = false;  // a piece of it was
  };

  static constexpr int message_tag = 0;

  std::size_t take_operation() {
    if (free_.empty()) {
      operations_.emplace_back();
      return operations_.size() - 1;
    }
    const std::size_t number = free_.back();
    free_.pop_back();
    return number;
  }

  template <class StartPiece>
  void start(Kind kind, int peer, int tag, std::size_t bytes, OnDone on_done, StartPiece start_piece) {
    if (bytes == 0) {  // on both sides, so there is nothing to match
      callbacks_.push_back(std::move(on_done));
      return;
    }
    const std::size_t number = take_operation();
    operations_[number] = {kind, peer, (bytes + piece_bytes_ - 1) / piece_bytes_, bytes, 0, std::move(on_done),
                           {},   tag};
    for (std::size_t offset = 0; offset < bytes; offset += piece_bytes_) {
      Request request;
      check_mpi(start_piece(offset, static_cast<int>(std::min(piece_bytes_, bytes - offset)), request.address()),
                kind == Kind::send ? "sending to" : "receiving from", peer);
      requests_.add(std::move(request), number);
    }
  }

  void accept(MatchedMessage& matched) {
    const int peer = matched.source();
    Bytes message(matched.size());
    Request request = matched.start_receive(message);
    auto& earlier = arriving_[static_cast<std::size_t>(peer)];
    if (request.finished("receiving a message from", peer) && earlier.empty()) {
      ready_.emplace_back(peer, std::move(message));
      return;
    }
    const std::size_t number = take_operation();
    const bool arrived = *request.address() == MPI_REQUEST_NULL;
    operations_[number] = {Kind::receive_message, peer,       arrived ? 0u : 1u, 0, 0, nullptr,
                           std::move(message),    message_tag};
    earlier.push_back(number);
    if (!arrived) requests_.add(std::move(request), number);
  }

  // Messages from one peer are handed out in the order in which they were matched, also when a later one is complete
  // before an earlier one.
  void release_arrived(int peer) {
    auto& arriving = arriving_[static_cast<std::size_t>(peer)];
    while (!arriving.empty() && operations_[arriving.front()].pieces == 0) {
      ready_.emplace_back(peer, std::move(operations_[arriving.front()].message));
      give_back(arriving.front());
      arriving.pop_front();
    }
  }

  void give_back(std::size_t number) {
    operations_[number] = {};
    free_.push_back(number);
  }

  void finish(const RequestSet::Finished& finished) {
    Operation& operation = operations_[finished.number];
    const bool receives = operation.kind == Kind::receive || operation.kind == Kind::receive_message;
    check_mpi(finished.code, receives ? "receiving from" : "sending to", operation.peer);
    operation.received += finished.bytes;
    operation.cancelled = operation.cancelled || finished.cancelled;
    if (--operation.pieces > 0) return;
    switch (operation.kind) {
      case Kind::receive:
        if (operation.cancelled) {
          give_back(finished.number);
          break;
        }
        if (operation.received != operation.expected) {
          throw RuntimeFailure("a transfer from rank " + std::to_string(operation.peer) + " has " +
                               std::to_string(operation.received) + " bytes, " + std::to_string(operation.expected) +
                               " were expected");
        }
        [[fallthrough]];
      case Kind::send:
        callbacks_.push_back(std::move(operation.on_done));
        [[fallthrough]];
      case Kind::send_message:
        give_back(finished.number);
        break;
      case Kind::receive_message:
        release_arrived(operation.peer);
        break;
    }
  }

  void close() noexcept {
    requests_.abandon([this](std::size_t number) {
      return operations_[number].kind == Kind::receive || operations_[number].kind == Kind::receive_message;
    });
    // MPI may still read a message that its peer has not taken, and write one that it has matched: that memory is given
    // up, because nobody will say when it is free.
    for (Operation& operation : operations_) {
      if (operation.pieces > 0 && !operation.message.empty()) new Bytes(std::move(operation.message));
    }
    operations_.clear();
    free_.clear();
    transfers_.free();
    messages_.free();
  }

  Communicator messages_;
  Communicator transfers_;
  int rank_ = 0;
  int size_ = 0;
  int max_tag_ = 32767;
  std::size_t piece_bytes_;
  RequestSet requests_;  // numbered by their operation
  std::vector<Operation> operations_;
  std::vector<std::size_t> free_;                  // numbers of operations that are not in use
  std::vector<OnDone> callbacks_;                  // of finished transfers
  std::vector<std::deque<std::size_t>> arriving_;  // for each peer, messages that are matched and not handed out
  std::deque<std::pair<int, Bytes>> ready_;
};

}  // namespace

std::unique_ptr<Transport> make_mpi_transport(const void* mpi_comm, std::size_t piece_bytes) {
  return std::make_unique<MpiTransport>(*static_cast<const MPI_Comm*>(mpi_comm), piece_bytes);
}

std::string mpi_library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  return std::string(text, static_cast<std::size_t>(length));
}

}  // namespace hvd_backup
