// One thread that owns all communication of this process, and the calls by which the training thread hands over
// buffers and waits. The rules live in control/ (Member on every rank, Coordinator on rank 0); the engine carries
// their messages, runs the collectives that they ask for, keeps the journal, and reads the clock.
//
// Threads: every public function may be called from any thread but the engine's. `mutex_` guards the channels, the
// members and the coordinator; the transport belongs to the engine thread and is used without the mutex. Buffers: the
// caller's. A contribution stays unchanged, and both stay alive, from submit() until wait() has returned the outcome
// of that step, or close() or shutdown() has returned. Errors: the engine thread never throws. It stores the failure,
// and the next call of the training thread raises it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "collective/staging_pool.h"
#include "control/coordinator.h"
#include "engine/channel.h"
#include "engine/fetch.h"
#include "engine/idle.h"
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
  bool average = true;  // results are means weighted by samples (floating point); otherwise plain sums
  bool wait_for_all = false;
};

// Files that rank 0 writes; empty: none.
struct EngineFiles {
  std::string trace;     // see trace.h
  std::string timeline;  // see timeline.h
};

class Engine {
 public:
  Engine(std::unique_ptr<Transport> transport, const EngineFiles& files);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Asks the coordinator to open the channel; `opened` polls for the answer. The same name gives the same channel.
  Channel& open(const ChannelSpec& spec);
  bool opened(Channel& channel, TimeUs timeout_us);
  void set_layout(Channel& channel, const std::vector<BucketLayout>& buckets);
  void set_results(Channel& channel, const std::vector<void*>& results);
  // The first so many buckets hold gradients: if the coordinator wants them, their squared norms are put on record.
  void measure(Channel& channel, int buckets);

  void begin(Channel& channel, double samples, std::string metadata);
  void submit(Channel& channel, int bucket, const void* contribution, void* result);
  // True and the update when there is one within the timeout.
  bool wait(Channel& channel, TimeUs timeout_us, Update* update);
  void begin_round(Channel& channel, std::int64_t length, std::int64_t align_every);
  void away(Channel& channel);
  void leave(Channel& channel);

  struct View {
    Step step = 0;
    std::optional<Step> round_end;
    bool round_over = false;
    std::string proposal;
    Counters counters;
    std::size_t journal_bytes = 0;
  };
  View view(Channel& channel);

  // The buffers of this channel will not be touched any more once this has returned true.
  bool close(Channel& channel, TimeUs timeout_us);

  void pause();  // before a full collective
  void join();   // then joined() until it gives the last rank
  bool joined(TimeUs timeout_us, int* last_rank);

  // Rank 0 only, before any rank opens a channel: the decisions to be made again.
  void edit_script(const std::function<void(Script&)>& edit);

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
    bool empty() const { return messages.empty() && starts.empty() && fetches.empty(); }
  };

  void run();
  Expecting expecting() const;
  bool turn();
  void withdraw(Channel& channel, bool also_complete);
  void receive(int from, const Message& message, TimeUs now);
  void serve(int from, const Pull& pull);
  Work collect(TimeUs now);
  void collect(Channel& channel, Work& work);
  void carry_out(Work work, TimeUs now);
  void send(int to, const Message& message);
  void start_reduction(const Start& start);
  void bucket_reduced(Channel& channel, const Decision& decision, const SquaredNorms* norms);
  void retire(Channel& channel, Reduction& reduction);
  bool clear_retired(Reduction& reduction);
  void keep_in_journal(Channel& channel, const Decision& decision);
  void start_fetch(Channel& channel, const CatchUp& missed, TimeUs now);
  void tick_fetches(TimeUs now);
  void take_records();
  void fail(const std::string& reason);

  void check_usable(const Channel* channel) const;
  void mark_dirty(Channel& channel);
  void say(Message message);
  void wake();

  StagingPool staging_;  // outlives the transport, whose transfers may use its memory
  std::unique_ptr<Transport> transport_;
  const int rank_;
  const int size_;
  const std::int32_t tag_limit_;  // decisions use the tags below it, fetches those from it to twice as many
  std::int32_t next_fetch_tag_ = 0;
  const TraceHeader header_;
  Trace trace_;
  Timeline timeline_;
  Recording recording_;  // guarded by mutex_
  Ranks reported_gone_;
  std::vector<std::shared_ptr<Fetch>> fetches_;
  TimeUs fetch_us_ = 0;        // of the last fetch
  std::deque<Reply> to_self_;  // messages of this rank to itself; `to` is the sender

  std::mutex mutex_;
  std::unique_ptr<Coordinator> coordinator_;  // rank 0 only
  std::vector<std::unique_ptr<Channel>> channels_;
  int training_channels_ = 0;
  int waiting_ = 0;  // training threads in wait()
  std::vector<Channel*> dirty_;
  std::vector<Message> outgoing_;  // of the rank itself, to the coordinator
  std::string failure_;
  bool leaving_ = false;
  bool all_gone_ = false;
  std::optional<int> joined_;
  bool ended_ = false;
  std::condition_variable changed_;  // joined_, ended_
  std::condition_variable wake_up_;  // of the engine thread
  bool woken_ = false;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace hvd_backup
