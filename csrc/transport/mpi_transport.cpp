#include "transport/mpi_transport.h"

#include <dlfcn.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "transport/mpi_device_transfers.h"
#include "transport/mpi_handle.h"
#include "transport/mpi_losses.h"
#include "transport/mpi_messages.h"
#include "transport/mpi_node.h"
#include "transport/mpi_parcels.h"
#include "transport/mpi_transfers.h"
#include "transport/node_exchange.h"

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
  MpiTransport(MPI_Comm original, const MpiTransportOptions& options)
      : messages_(original),
        comm_(Communicator::duplicate_of(original)),
        parcels_(original),
        losses_(comm_.get()),
        transfers_(options.piece_bytes) {
    check_mpi(MPI_Comm_rank(comm_.get(), &rank_), "asking for the rank");
    check_mpi(MPI_Comm_size(comm_.get(), &size_), "asking for the size");
    int* upper_bound = nullptr;
    int found = 0;
    check_mpi(MPI_Comm_get_attr(comm_.get(), MPI_TAG_UB, &upper_bound, &found), "asking for the largest tag");
    if (found != 0) max_tag_ = *upper_bound;
    if (options.share_memory) share_memory();
    if (all_agree(options.takes_device_memory.value_or(mpi_says_it_takes_device_memory()))) {
      device_ = std::make_unique<MpiDeviceTransfers>(original, options.piece_bytes);
    }
    has_peers_elsewhere_ = static_cast<int>(ranks_on_node_.size()) < size_;
  }

  ~MpiTransport() override {
    transfers_.close();  // before their communicators
  }
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::size_t pending() const override {
    return messages_.pending() + transfers_.pending() + parcels_.pending() + callbacks_.size() +
           (node_ ? node_->pending() : 0) + (device_ ? device_->pending() : 0);
  }

  bool survives_losses() const override { return losses_.are_survived(); }
  std::vector<int> take_lost() override {
    const std::vector<int> lost = losses_.take();
    for (const int peer : lost) {
      messages_.forget(peer);
      parcels_.forget(peer);
      if (node_ && is_on_node(peer)) node_->forget(index_on_node(peer));
    }
    return lost;
  }

  void send_message(int peer, Bytes message) override { messages_.send(peer, std::move(message)); }
  bool receive_message(int* from, Bytes* message) override { return messages_.receive(from, message); }

  void start_send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done, bool cancellable) override {
    if (losses_.includes(peer)) return;
    if (data.empty()) {  // on both sides, so there is nothing to match
      callbacks_.push_back(std::move(on_done));
    } else if (through_memory(peer, data.size())) {
      const std::size_t on_node = index_on_node(peer);
      if (node_->send({&on_node, 1}, tag, data, on_done)) return;
      node_->announce(on_node, tag);  // the shared memory is full
      parcels_.send(peer, on_the_long_way(tag), data, std::move(on_done));
    } else if (cancellable) {
      parcels_.send(peer, tag, data, std::move(on_done));
    } else {
      transfers_.start_send(comm_.get(), peer, mpi_tag(tag), data, std::move(on_done));
    }
  }

  void start_receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done, bool cancellable) override {
    if (losses_.includes(peer)) return;
    if (data.empty()) {
      callbacks_.push_back(std::move(on_done));
    } else if (through_memory(peer, data.size())) {
      node_->receive(index_on_node(peer), tag, data, std::move(on_done));
    } else if (cancellable) {
      parcels_.receive(peer, tag, data, std::move(on_done));
    } else {
      transfers_.start_receive(comm_.get(), peer, mpi_tag(tag), data, std::move(on_done));
    }
  }

  void start_send_to_all(std::span<const int> peers, Tag tag, std::span<const std::byte> data, OnDone on_done,
                         bool cancellable) override {
    const auto through = [&](int peer) { return through_memory(peer, data.size()); };
    if (!peers.empty() && std::all_of(peers.begin(), peers.end(), through)) {
      peers_on_node_.clear();
      for (const int peer : peers) peers_on_node_.push_back(index_on_node(peer));
      if (node_->send(peers_on_node_, tag, data, on_done)) return;
    }
    Transport::start_send_to_all(peers, tag, data, std::move(on_done), cancellable);
  }

  void cancel(Tag tag) override {
    if (node_) node_->cancel(tag);
    parcels_.cancel(tag);
    parcels_.cancel(on_the_long_way(tag));
    takes_parcels_ = true;  // what is on its way is still to be taken, and thrown away
  }

  bool takes_device_memory() const override { return device_ != nullptr; }
  void start_device_send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done) override {
    if (!losses_.includes(peer)) device().start_send(peer, mpi_tag(tag), data, std::move(on_done));
  }
  void start_device_receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done) override {
    if (!losses_.includes(peer)) device().start_receive(peer, mpi_tag(tag), data, std::move(on_done));
  }
  void give_up_device(Tag tag) override { device().give_up(mpi_tag(tag)); }

  bool progress() override {
    messages_.progress();
    transfers_.progress(&callbacks_);
    if (device_) device_->progress(&callbacks_);
    if (node_) node_->poll(&callbacks_);
    // To look for what nobody sends would cost as much as all the rest.
    takes_parcels_ = takes_parcels_ || has_peers_elsewhere_ || parcels_.pending() > 0;
    if (takes_parcels_) parcels_.progress(&callbacks_);
    // A callback may start transfers, and one that has finished already adds a callback: that runs in the next call.
    std::vector<OnDone> callbacks = std::exchange(callbacks_, {});
    for (const OnDone& on_done : callbacks) on_done();
    return !callbacks.empty();
  }

 private:
  bool all_agree(bool yes) const {
    int answer = yes ? 1 : 0;
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, &answer, 1, MPI_INT, MPI_MIN, comm_.get()), "asking all ranks");
    return answer != 0;
  }

  MpiDeviceTransfers& device() {
    if (!device_) throw UsageError("MPI does not take GPU memory on all ranks: see takes_device_memory()");
    return *device_;
  }

  void share_memory() {
    Node node = find_node(comm_.get());
    if (node.segments.empty()) return;
    ranks_on_node_ = std::move(node.ranks);
    node_ = std::make_unique<NodeExchange>(
        std::move(node.segments), node.self,
        [this](std::size_t peer, Tag tag, std::span<std::byte> data, OnDone on_done) {
          parcels_.receive(ranks_on_node_[peer], on_the_long_way(tag), data, std::move(on_done));
        });
  }

  std::size_t index_on_node(int peer) const {
    return static_cast<std::size_t>(std::lower_bound(ranks_on_node_.begin(), ranks_on_node_.end(), peer) -
                                    ranks_on_node_.begin());
  }
  bool is_on_node(int peer) const { return std::binary_search(ranks_on_node_.begin(), ranks_on_node_.end(), peer); }
  bool through_memory(int peer, std::size_t bytes) const {
    return node_ && NodeExchange::takes(bytes) && is_on_node(peer);
  }

  // Parcels that the receiver was told of apart from those that go this way by their size.
  static Tag on_the_long_way(Tag tag) { return -1 - tag; }

  // MPI's tags are used again when all have been used, long after their last transfer. An even number of them, so that
  // odd and even tags of ours never meet.
  int mpi_tag(Tag tag) const { return static_cast<int>(tag % ((static_cast<Tag>(max_tag_) + 1) / 2 * 2)); }

  MpiMessages messages_;
  Communicator comm_;
  MpiParcels parcels_;
  MpiLosses losses_;
  int rank_ = 0;
  int size_ = 0;
  int max_tag_ = 32767;
  bool has_peers_elsewhere_ = false;  // not on this node
  bool takes_parcels_ = false;
  MpiTransfers transfers_;
  std::vector<OnDone> callbacks_;           // of finished transfers
  std::vector<int> ranks_on_node_;          // ascending; empty: no memory is shared
  std::vector<std::size_t> peers_on_node_;  // kept for its memory
  std::unique_ptr<NodeExchange> node_;
  std::unique_ptr<MpiDeviceTransfers> device_;  // null: MPI does not take GPU memory
};

}  // namespace

std::unique_ptr<Transport> make_mpi_transport(const void* mpi_comm, const MpiTransportOptions& options) {
  require_thread_multiple();
  constexpr std::size_t most = MpiTransportOptions().piece_bytes;
  if (options.piece_bytes == 0 || options.piece_bytes > most) {
    throw UsageError("piece_bytes is " + std::to_string(options.piece_bytes) + "; expected 1 to " +
                     std::to_string(most));
  }
  return std::make_unique<MpiTransport>(*static_cast<const MPI_Comm*>(mpi_comm), options);
}

// Open MPI and MVAPICH have the first, MPICH since 4.0 the second. Looked up, so that one build does with each of them.
bool mpi_says_it_takes_device_memory() {
  using Ask = int (*)();
  using AskAbout = int (*)(int kind, int* is_supported);
  constexpr int cuda = 0;  // MPIX_GPU_SUPPORT_CUDA
  if (const auto ask = reinterpret_cast<Ask>(dlsym(RTLD_DEFAULT, "MPIX_Query_cuda_support"))) return ask() == 1;
  int is_supported = 0;
  const auto ask_about = reinterpret_cast<AskAbout>(dlsym(RTLD_DEFAULT, "MPIX_GPU_query_support"));
  return ask_about != nullptr && ask_about(cuda, &is_supported) == MPI_SUCCESS && is_supported != 0;
}

std::string mpi_library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  return std::string(text, static_cast<std::size_t>(length));
}

}  // namespace hvd_backup
