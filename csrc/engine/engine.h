// One loop that owns all communication of this process, and the calls by which the training thread hands over
// buffers and waits. The rules live in control/ (Member on every rank, Coordinator on rank 0); the engine carries
// their messages, runs the collectives that they ask for, keeps the journal, and reads the clock.
//
// Threads: every public function may be called from any thread but the engine's. `mutex_` guards the channels, the
// members and the coordinator. A turn of the loop is taken with `turn_mutex_` (first of the two), without which nobody
// touches the transport. The engine thread takes the turns while the training thread computes. A training thread that
// waits takes them itself: what it waits for then does not have to pass through another thread, which is half the time
// of a small allreduce where ranks share cores. "On the engine thread" means: by whoever has the turn. Buffers: the
// caller's. A contribution stays unchanged, and both stay alive, from submit() until wait() has returned the outcome
// of that step, or close() or shutdown() has returned. Errors: a turn never throws. It stores the failure, and the next
// call of the training thread raises it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "collective/staging_pool.h"
#include "control/coordinator.h"
#include "engine/channel.h"
#include "engine/device_work.h"
#include "engine/fetch.h"
#include "engine/idle.h"
#include "engine/state_fetch.h"
#include "engine/timeline.h"
#include "engine/trace.h"
#include "kernels/weighted_sum.h"
#include "transport/transport.h"

namespace hvd_backup {

struct ChannelSpec {
  std::string name;
  ChannelKind kind = ChannelKind::training;
  std::string description;
  std::string proposal;
  ChannelOptions options;
  bool arrive_first = true;
  // Gradients that hold NaN or infinity count as late; not with arrive_first. On the GPU the caller has looked.
  bool drop_nonfinite = false;
  bool average = true;  // results are means weighted by samples (floating point); otherwise plain sums
  bool wait_for_all = false;
  bool on_device = false;  // some buckets are on the GPU; see use_device()
};

// What rank 0 writes besides its work.
struct EngineSettings {
  std::string trace;          // a file, see trace.h; empty: none
  std::string timeline;       // a file, see timeline.h; empty: none
  TimeUs stall_check_us = 0;  // after so long without progress a warning says who waits for whom; 0: never
};

class Engine {
 public:
  Engine(std::unique_ptr<Transport> transport, const EngineSettings& settings);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Then nothing here can be used or destroyed: there are none of our threads, and what they hold is held for ever.
  bool in_forked_child() const;
  int rank() const { return rank_; }
  int size() const { return size_; }

  // Asks the coordinator to open the channel; `opened` polls for the answer. The same name gives the same channel.
  Channel& open(const ChannelSpec& spec);
  bool opened(Channel& channel, TimeUs timeout_us);
  void set_layout(Channel& channel, const std::vector<BucketLayout>& buckets);
  void set_results(Channel& channel, const std::vector<void*>& results);
  // The first so many buckets hold gradients: if the coordinator wants them, their squared norms are put on record; and
  // with drop_nonfinite they are looked at.
  void measure(Channel& channel, int buckets);

  void begin(Channel& channel, double samples, std::string metadata);
  // wait_follows: the engine thread need not be woken, because this thread calls wait() at once.
  void submit(Channel& channel, int bucket, const void* contribution, void* result, bool wait_follows);
  // The same for a bucket whose contribution is on the GPU, made by what was begun on `stream` until now, and whose
  // result is to be there. Contribution and result in host memory are given besides, see Bucket. Needs use_device().
  void submit(Channel& channel, int bucket, const void* contribution, void* result, OnDevice on_device, void* stream,
              bool wait_follows);
  // The GPU of this rank, once. It must outlive this. means: by which it exchanges data with others directly, "nccl" or
  // "mpi"; the latter needs takes_device_memory(). journal_on_device: see DeviceWork.
  void use_device(Device& device, const std::string& means, bool journal_on_device);
  bool takes_device_memory() const { return takes_device_memory_; }
  // True and the update when there is one within the timeout.
  bool wait(Channel& channel, TimeUs timeout_us, Update* update);
  // The thread that waits does nothing else until this channel's outcome is there, and has waited for long: the
  // coordinator finds out whether ranks wait for each other.
  void announce_waiting(Channel& channel);
  // After hold(), updates that this rank contributes to may be changed in the result buffers, the same on all
  // contributors, until commit(); late ranks fetch what is there then. Before the first begin(); one scope.
  void hold(Channel& channel);
  void commit(Channel& channel);
  void begin_round(Channel& channel, std::int64_t length, std::int64_t align_every);
  void away(Channel& channel);
  void leave(Channel& channel);

  // Between two updates: keeps a copy of this rank's state for ranks beyond the journal. To be called when wait() says
  // `offer`, and before leave_for_good() if view() says so; for other channels, too, that this thread has.
  void offer_state(Channel& channel, const std::vector<std::span<const std::byte>>& parts);
  // Of another rank, when wait() has said `resync`; until the next wait().
  std::span<const std::byte> state_taken_over(Channel& channel);

  struct View {
    Step step = 0;
    Step round_start = 0;
    std::optional<Step> round_end;
    bool round_over = false;
    std::string proposal;
    Counters counters;
    std::size_t journal_bytes = 0;
    bool state_wanted = false;  // see offer_state
    bool state_wanted_at_exit = false;
  };
  View view(Channel& channel);

  // The buffers of this channel will not be touched any more once this has returned true.
  bool close(Channel& channel, TimeUs timeout_us);

  void pause();  // before a full collective, which this thread then waits for
  void join();   // then joined() until it gives the last rank
  bool joined(TimeUs timeout_us, int* last_rank);

  // Rank 0 only, before any rank opens a channel: the decisions to be made again.
  void edit_script(const std::function<void(Script&)>& edit);

  bool survives_losses() const { return survives_losses_; }
  // The ranks whose processes have died, as rank 0 has said: before what is decided without them.
  Ranks lost();

  // What was recorded of the newest `last` steps (Recording::text); empty on other ranks than 0.
  std::string recorded(Step last);

  // Says that this rank leaves for good; shut_down() is true once all have left and the thread has ended.
  void leave_for_good(const std::string& failure);
  bool shut_down(TimeUs timeout_us);

  // Ends the thread without asking anybody: MPI is about to be finalised. Idempotent.
  void stop();

 private:
  // What a round of the loop has found to do, carried out without the mutex.
  struct Start {
    Channel* channel = nullptr;
    Decision decision;
    int bucket = 0;
  };
  struct Work {
    std::vector<Reply> messages;
    std::vector<Start> starts;
    std::vector<std::pair<Channel*, CatchUp>> fetches;
    std::vector<std::pair<Channel*, Resync>> resyncs;
    bool empty() const { return messages.empty() && starts.empty() && fetches.empty() && resyncs.empty(); }
  };

  // What the last turn has left: how long it is since there was something to do, and transfers that are on their way.
  struct Pace {
    TimeUs idle_since = 0;
    TimeUs now = 0;
    bool worked = false;
    std::size_t pending = 0;
  };

  void run();
  void drive(std::unique_lock<std::mutex>& lock, Channel& channel, TimeUs deadline);
  void take_turn(Pace& pace);
  bool turn();
  void rest(std::unique_lock<std::mutex>& lock, std::condition_variable& called, const Pace& pace, TimeUs spins_us);
  void submit(Channel& channel, int bucket, const void* contribution, void* result, std::optional<OnDevice> on_device,
              bool finite, bool wait_follows);
  static bool may_count(const Channel& channel, int bucket, const void* contribution);
  void withdraw(Channel& channel, bool also_complete);
  void lose(int rank, TimeUs now);
  void receive(int from, const Message& message, TimeUs now);
  void serve(int from, const Pull& pull);
  void serve(int from, const PullState& pull);
  void refused(const Refused& message, TimeUs now);
  Channel* find(ChannelId id);
  Channel& known(ChannelId id);
  std::function<Tag()> next_tags();
  void give_up(Fetch& fetch);
  bool asks_for_state(const Channel& channel) const;
  static bool uses_what_is_given_up(const Channel& channel);
  static bool is_given_up(const Channel& channel, int scope, const Reduction& reduction);
  void start_state_fetch(Channel& channel, const Resync& promised, TimeUs now);
  void watch_state_fetches(TimeUs now);
  Work collect(TimeUs now);
  void collect(Channel& channel, Work& work);
  void carry_out(Work work, TimeUs now);
  void send(int to, const Message& message);
  std::vector<Message> take_messages(Channel& channel);
  static Tag tag_of(const Decision& decision, int bucket) { return 2 * (decision.tag + 2 * bucket); }
  void start_reduction(const Start& start);
  void bucket_reduced(Channel& channel, const Decision& decision, const SquaredNorms* norms);
  void abandon(Channel& channel, Reduction& reduction);
  void answer(Channel& channel, const Probe& probe);
  void stand_in_for(Channel& channel, const Final& message);
  std::vector<int> shards_kept(const Ranks& contributors, bool all) const;
  Places places_on_device(const Channel& channel, const Decision& decision);
  void keep_for_late_ranks(Channel& channel, const Decision& decision);
  void keep_for_late_ranks(Channel& channel, Step step, int scope, const Ranks& contributors, bool all,
                           Places places = {});
  void start_fetch(Channel& channel, const CatchUp& missed, TimeUs now);
  void tick_fetches(TimeUs now);
  void take_records();
  void fail(const std::string& reason);

  void check_usable(const Channel* channel) const;
  void mark_dirty(Channel& channel);
  void say(Message message);
  void wake();

  std::unique_ptr<DeviceWork> device_;               // outlives the transport, too, as copies may
  std::atomic<DeviceWork*> device_in_use_{nullptr};  // the same, without the mutex
  StagingPool staging_;                              // outlives the transport, whose transfers may use its memory
  std::unique_ptr<Transport> transport_;
  const int process_;  // its number
  const int rank_;
  const int size_;
  const bool survives_losses_;
  const bool takes_device_memory_;
  Tag next_fetch_tag_ = 1;  // odd; collectives use even ones
  const TraceHeader header_;
  Trace trace_;
  Timeline timeline_;
  Recording recording_;  // guarded by mutex_
  std::set<int> reported_gone_;
  std::set<int> reported_nonfinite_;  // ranks
  std::vector<std::shared_ptr<Fetch>> fetches_;
  TimeUs fetch_us_ = 0;  // that the last fetch took, from the request that was answered
  Step newest_fetched_ = -1;
  std::set<int> silent_keepers_;  // of the catch-up that goes on
  std::vector<std::pair<Channel*, std::shared_ptr<StateFetch>>> state_fetches_;
  std::deque<Reply> to_self_;  // messages of this rank to itself; `to` is the sender

  std::mutex mutex_;
  std::unique_ptr<Coordinator> coordinator_;  // rank 0 only
  std::vector<std::unique_ptr<Channel>> channels_;
  int training_channels_ = 0;
  int first_n_collectives_ = 0;  // channels
  int waiting_ = 0;              // training threads in wait()
  std::vector<Channel*> dirty_;
  std::vector<Message> outgoing_;  // of the rank itself, to the coordinator
  std::string failure_;
  Ranks lost_;
  bool leaving_ = false;
  bool all_gone_ = false;
  std::optional<int> joined_;
  bool ended_ = false;
  std::condition_variable changed_;      // joined_, ended_
  std::condition_variable wake_engine_;  // of the engine thread
  std::condition_variable wake_driver_;  // of the thread that drives
  bool woken_ = false;
  bool driven_ = false;      // a training thread takes the turns
  bool asleep_ = false;      // the engine thread will not look again by itself
  TimeUs driven_since_ = 0;  // when the last one began
  TimeUs driven_until_ = 0;  // when the last one ceased to
  std::mutex turn_mutex_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace hvd_backup
