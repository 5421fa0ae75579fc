#include "engine/timeline.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace hvd_backup {

namespace {

std::string field(const char* name, std::int64_t value) {
  return std::string(", \"") + name + "\": " + std::to_string(value);
}

std::string naming(const char* what, int process, int thread, const std::string& name) {
  return std::string("{\"ph\": \"M\", \"name\": \"") + what + "\"" + field("pid", process) + field("tid", thread) +
         ", \"args\": {\"name\": \"" + name + "\"}}";
}

}  // namespace

Timeline::Timeline(const std::string& path, int size, TimeUs began_us) : size_(size), began_us_(began_us) {
  if (path.empty()) return;
  file_.reset(std::fopen(path.c_str(), "we"));
  if (!file_) throw UsageError("the timeline can't be written to '" + path + "': " + std::strerror(errno));
  lines_ = "[\n";
}

void Timeline::write(const std::vector<Record>& records) {
  if (!file_) return;
  for (const Record& record : records) {
    if (record.event == Record::Event::opened && record.kind == ChannelKind::training) open(record);
    const auto channel = channels_.find(record.channel);
    if (channel != channels_.end()) take(channel->second, record);
  }
  if (lines_.empty()) return;
  const bool all = std::fwrite(lines_.data(), 1, lines_.size(), file_.get()) == lines_.size();
  if (!all || std::fflush(file_.get()) != 0) {
    std::fprintf(stderr, "[hvd_backup rank 0] warning: the timeline ends here: %s\n", std::strerror(errno));
    file_.reset();
  }
  lines_.clear();
}

void Timeline::open(const Record& record) {
  const auto [entry, is_new] = channels_.try_emplace(record.channel);
  if (!is_new) return;
  Channel& channel = entry->second;
  channel.process = static_cast<int>(channels_.size()) - 1;
  channel.tracks.resize(static_cast<std::size_t>(size_));
  line(naming("process_name", channel.process, 0, record.channel));
  for (int rank = 0; rank < size_; ++rank) {
    line(naming("thread_name", channel.process, rank, "rank " + std::to_string(rank)));
  }
}

// When a rank began with a step is known once the update before is final, and updates become final in order.
void Timeline::take(Channel& channel, const Record& record) {
  using Event = Record::Event;
  switch (record.event) {
    case Event::decision:
      if (record.scope == 0) channel.waiting[record.step].push_back(record);
      return;
    case Event::dropped:
      if (record.scope == 0 && record.step > channel.next_final) {
        channel.waiting[record.step].push_back(record);
      } else {
        dropped(channel, record);
      }
      return;
    case Event::final_:
      final_update(channel, record);
      return;
    case Event::resumed: {
      Track& track = channel.tracks[static_cast<std::size_t>(record.ranks.front())];
      if (track.catching_up) {
        slice(channel.process, record.ranks.front(), "catch-up", *track.catching_up, record.at, record.step);
      }
      track = {record.at, std::nullopt};
      return;
    }
    case Event::round_over:
      for (Track& track : channel.tracks) track = {};  // what ranks do between rounds is not known here
      return;
    case Event::gone:
      mark(channel.process, record.ranks.front(), "gone", record.at, record.step);
      return;
    default:
      return;
  }
}

void Timeline::final_update(Channel& channel, const Record& record) {
  for (const Record& earlier : std::exchange(channel.waiting[record.step], {})) {
    if (earlier.event == Record::Event::dropped) {
      dropped(channel, earlier);
      continue;
    }
    for (std::size_t i = 0; i < earlier.ranks.size(); ++i) {
      const int rank = earlier.ranks[i];
      const Track& track = channel.tracks[static_cast<std::size_t>(rank)];
      slice(channel.process, rank, "compute", track.began.value_or(earlier.opened_at), earlier.arrivals[i],
            record.step);
      mark(channel.process, rank, "arrive", earlier.arrivals[i], record.step);
      slice(channel.process, rank, "wait", earlier.arrivals[i], earlier.at, record.step);
      const auto done = std::find(record.ranks.begin(), record.ranks.end(), rank);
      if (done == record.ranks.end()) continue;
      const TimeUs at = record.arrivals[static_cast<std::size_t>(done - record.ranks.begin())];
      slice(channel.process, rank, "reduce", earlier.at, at, record.step);
      channel.tracks[static_cast<std::size_t>(rank)] = {at, std::nullopt};
    }
  }
  channel.waiting.erase(record.step);
  channel.next_final = record.step + 1;
  const auto next = channel.waiting.find(channel.next_final);
  if (next == channel.waiting.end()) return;
  std::erase_if(next->second, [&](const Record& waiting) {
    if (waiting.event != Record::Event::dropped) return false;
    dropped(channel, waiting);
    return true;
  });
}

void Timeline::dropped(Channel& channel, const Record& record) {
  const int rank = record.ranks.front();
  const TimeUs arrived = record.arrivals.front();
  Track& track = channel.tracks[static_cast<std::size_t>(rank)];
  mark(channel.process, rank, "dropped", record.at, record.step);
  if (record.scope != 0) return;
  if (track.began) slice(channel.process, rank, "compute (dropped)", *track.began, arrived, record.step);
  track = {std::nullopt, arrived};
}

void Timeline::slice(int process, int rank, const char* name, TimeUs from, TimeUs to, Step step) {
  line(std::string("{\"ph\": \"X\", \"name\": \"") + name + "\"" + field("pid", process) + field("tid", rank) +
       field("ts", from - began_us_) + field("dur", std::max<TimeUs>(to - from, 0)) +
       ", \"args\": {\"step\": " + std::to_string(step) + "}}");
}

void Timeline::mark(int process, int rank, const char* name, TimeUs at, Step step) {
  line(std::string("{\"ph\": \"i\", \"s\": \"t\", \"name\": \"") + name + "\"" + field("pid", process) +
       field("tid", rank) + field("ts", at - began_us_) + ", \"args\": {\"step\": " + std::to_string(step) + "}}");
}

void Timeline::line(const std::string& event) {
  lines_ += event;
  lines_ += ",\n";
}

}  // namespace hvd_backup
