#include "transport/in_process.h"

#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "base/error.h"
#include "transport/lanes.h"

namespace hvd_backup {

namespace {

// A send that waits for its receiver. The lock is held while the receiver copies, so that the sender's memory is not
// read after the sender has gone.
struct Offer {
  std::mutex lock;
  std::span<const std::byte> data;
  bool on_device = false;  // a device transfer
  bool withdrawn = false;
};

struct OfferArrived {
  int from;
  Tag tag;
  std::shared_ptr<Offer> offer;
};
struct OfferTaken {
  std::shared_ptr<Offer> offer;
};
struct MessageArrived {
  int from;
  Bytes message;
};
using Letter = std::variant<OfferArrived, OfferTaken, MessageArrived>;

}  // namespace

struct Hub::Mailbox {
  std::mutex lock;
  std::vector<Letter> letters;
  bool in_use = false;  // an endpoint has been made for it

  void post(Letter letter) {
    const std::lock_guard guard(lock);
    letters.push_back(std::move(letter));
  }
  void take_all(std::vector<Letter>* into) {
    const std::lock_guard guard(lock);
    std::swap(letters, *into);
  }
};

Hub::Hub(int size, bool takes_device_memory) : takes_device_memory_(takes_device_memory) {
  if (size < 1) throw UsageError("a hub of " + std::to_string(size) + " ranks; expected at least 1");
  for (int rank = 0; rank < size; ++rank) mailboxes_.push_back(std::make_unique<Mailbox>());
}
Hub::~Hub() = default;
int Hub::size() const { return static_cast<int>(mailboxes_.size()); }

class InProcessTransport final : public Transport {
 public:
  InProcessTransport(std::shared_ptr<Hub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {
    if (rank < 0 || rank >= hub_->size()) {
      throw UsageError("rank " + std::to_string(rank) + " of a hub of " + std::to_string(hub_->size()) + " ranks");
    }
    const std::lock_guard guard(mailbox(rank).lock);
    if (std::exchange(mailbox(rank).in_use, true)) {
      throw UsageError("rank " + std::to_string(rank) +
                       " of this hub has an endpoint already; make a hub for each run");
    }
  }

  ~InProcessTransport() override {
    for (auto& [offer, sent] : offered_) withdraw(*offer);
    for (auto& [offer, sent] : given_up_) withdraw(*offer);
  }
  InProcessTransport(const InProcessTransport&) = delete;
  InProcessTransport& operator=(const InProcessTransport&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return hub_->size(); }
  std::size_t pending() const override {
    return offered_.size() + lanes_.request_count() + device_lanes_.request_count() + callbacks_.size();
  }

  void send_message(int peer, Bytes message) override {
    if (peer == rank_) {
      ready_.push_back({rank_, std::move(message)});
    } else {
      mailbox(peer).post(MessageArrived{rank_, std::move(message)});
    }
  }

  bool receive_message(int* from, Bytes* message) override {
    read_mail();
    if (ready_.empty()) return false;
    *from = ready_.front().from;
    *message = std::move(ready_.front().message);
    ready_.pop_front();
    return true;
  }

  void start_send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done, bool) override {
    post_offer(peer, tag, data, std::move(on_done), false);
  }

  void start_receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done, bool) override {
    deliver(lanes_, peer, tag, lanes_.requested(peer, tag, {data, std::move(on_done)}));
  }

  bool takes_device_memory() const override { return hub_->takes_device_memory(); }

  void start_device_send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done) override {
    post_offer(peer, tag, data, std::move(on_done), true);
  }

  void start_device_receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done) override {
    deliver(device_lanes_, peer, tag, device_lanes_.requested(peer, tag, {data, std::move(on_done)}));
  }

  // As with MPI, what has been offered stays so, until its receiver takes it.
  void give_up_device(Tag tag) override {
    device_lanes_.cancel(tag, [this](int peer, const auto& offer) { mailbox(peer).post(OfferTaken{offer}); });
    for (auto entry = offered_.begin(); entry != offered_.end();) {
      const auto found = entry++;
      if (found->first->on_device && found->second.tag == tag) given_up_.insert(offered_.extract(found));
    }
  }

  void cancel(Tag tag) override {
    lanes_.cancel(tag, [](int, const auto&) {});
    std::erase_if(offered_, [tag](const auto& entry) {
      if (entry.first->on_device || entry.second.tag != tag) return false;
      withdraw(*entry.first);
      return true;
    });
  }

  bool progress() override {
    read_mail();
    std::vector<OnDone> callbacks = std::exchange(callbacks_, {});
    for (const OnDone& on_done : callbacks) on_done();
    return !callbacks.empty();
  }

 private:
  struct Receive {
    std::span<std::byte> data;
    OnDone on_done;
  };
  struct Sent {
    Tag tag;
    OnDone on_done;
  };
  using TransferLanes = Lanes<std::shared_ptr<Offer>, Receive>;

  void post_offer(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done, bool on_device) {
    auto offer = std::make_shared<Offer>();
    offer->data = data;
    offer->on_device = on_device;
    offered_.emplace(offer, Sent{tag, std::move(on_done)});
    mailbox(peer).post(OfferArrived{rank_, tag, std::move(offer)});
  }

  static void withdraw(Offer& offer) {
    const std::lock_guard guard(offer.lock);
    offer.withdrawn = true;
  }

  Hub::Mailbox& mailbox(int rank) { return *hub_->mailboxes_.at(static_cast<std::size_t>(rank)); }

  void read_mail() {
    mail_.clear();
    mailbox(rank_).take_all(&mail_);
    for (Letter& letter : mail_) std::visit([this](auto& content) { handle(content); }, letter);
  }

  void handle(OfferArrived& arrived) {
    const bool on_device = arrived.offer->on_device;
    TransferLanes& lanes = on_device ? device_lanes_ : lanes_;
    if (!lanes.is_cancelled(arrived.tag)) {
      deliver(lanes, arrived.from, arrived.tag, lanes.arrived(arrived.from, arrived.tag, std::move(arrived.offer)));
    } else if (on_device) {
      mailbox(arrived.from).post(OfferTaken{std::move(arrived.offer)});
    }
  }

  void handle(OfferTaken& taken) {
    if (given_up_.erase(taken.offer) > 0) return;
    const auto offered = offered_.find(taken.offer);
    if (offered == offered_.end()) return;  // cancelled meanwhile
    callbacks_.push_back(std::move(offered->second.on_done));
    offered_.erase(offered);
  }

  void handle(MessageArrived& arrived) { ready_.push_back(std::move(arrived)); }

  void deliver(TransferLanes& lanes, int peer, Tag tag, std::optional<TransferLanes::Match> match) {
    while (match) {
      auto& [offer, receive] = *match;
      if (copy(peer, tag, *offer, receive.data)) {
        mailbox(peer).post(OfferTaken{std::move(offer)});
        callbacks_.push_back(std::move(receive.on_done));
        return;
      }
      match = lanes.requested_again(peer, tag, std::move(receive));
    }
  }

  // False when the sender has gone.
  static bool copy(int peer, Tag tag, Offer& offer, std::span<std::byte> into) {
    const std::lock_guard guard(offer.lock);
    if (offer.withdrawn) return false;
    if (offer.data.size() != into.size()) {
      throw RuntimeFailure("a transfer from rank " + std::to_string(peer) + " with tag " + std::to_string(tag) +
                           " has " + std::to_string(offer.data.size()) + " bytes, " + std::to_string(into.size()) +
                           " were expected");
    }
    if (!into.empty()) std::memcpy(into.data(), offer.data.data(), into.size());
    return true;
  }

  std::shared_ptr<Hub> hub_;
  int rank_;
  TransferLanes lanes_;
  TransferLanes device_lanes_;
  std::map<std::shared_ptr<Offer>, Sent> offered_;
  std::map<std::shared_ptr<Offer>, Sent> given_up_;  // device transfers of which a peer has not taken its part
  std::vector<OnDone> callbacks_;
  std::deque<MessageArrived> ready_;
  std::vector<Letter> mail_;
};

std::unique_ptr<Transport> make_in_process_transport(std::shared_ptr<Hub> hub, int rank) {
  return std::make_unique<InProcessTransport>(std::move(hub), rank);
}

}  // namespace hvd_backup
