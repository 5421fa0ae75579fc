// Who contributes to what: the one place of decisions, on rank 0. Pure: it has no threads, no I/O and no clock.
// It owns a ChannelBook for each channel and keeps what concerns whole ranks: joining, and leaving for good.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "control/channel_book.h"
#include "control/script.h"

namespace hvd_backup {

class Coordinator {
 public:
  // measured: whether squared norms of gradients are wanted in the records. combine: what is made of small
  // contributions, which come with the arrivals. stall_check_us: after so long without progress a channel says on
  // record who waits for whom; 0: never.
  // survives_losses: lost() may be called.
  explicit Coordinator(int size, bool measured = false, Combine combine = {}, TimeUs stall_check_us = 0,
                       bool survives_losses = false);
  Coordinator(const Coordinator&) = delete;
  Coordinator& operator=(const Coordinator&) = delete;

  // What ranks need to form a group (control/device_groups.h). Without it none is formed.
  void set_name_group(NameGroup name) { out_.groups.set_name_group(std::move(name)); }
  std::vector<std::string> take_news() { return out_.groups.take_news(); }  // of groups, for people

  // The decisions to be made again. To be filled before ranks open the channels that it names.
  Script& script() { return script_; }

  // A message to the coordinator; others are a RuntimeFailure.
  void receive(int from, const Message& message, TimeUs now);

  // The process of a rank has died: it is late for ever, and everybody is told.
  void lost(int rank, TimeUs now);

  // Time has passed; to be called at next_deadline() at the latest.
  void tick(TimeUs now);
  std::optional<TimeUs> next_deadline() const;

  // A rank has arrived at a step that is not decided.
  bool anybody_waits() const;

  // What it had to say since the last call, in order.
  std::vector<Reply> take_replies() { return std::exchange(out_.replies, {}); }
  std::vector<Record> take_records() { return std::exchange(out_.records, {}); }

 private:
  ChannelBook& book(ChannelId id);
  void open(int from, const Open& message, TimeUs now);
  void untangle(TimeUs now);
  void end_deadlock(TimeUs now);
  void end_starvation(TimeUs now);
  void pause(int from, bool paused, TimeUs now);
  void join(int from, TimeUs now);
  void release_joined(TimeUs now);
  void release_met(TimeUs now);
  void settle_groups(TimeUs now);
  void exit(int from, const Exit& message, TimeUs now);
  void end_if_all_gone();

  const int size_;
  std::int64_t next_tag_ = 0;
  Script script_;
  std::vector<std::unique_ptr<ChannelBook>> books_;  // by ChannelId
  std::map<std::string, ChannelId> ids_;
  std::vector<bool> joined_, paused_, gone_, lost_;
  std::vector<std::string> failures_;  // with which ranks have left
  int last_joined_ = 0;
  Outbox out_;
};

}  // namespace hvd_backup
