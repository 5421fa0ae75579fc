#include "control/coordinator.h"

#include <algorithm>
#include <type_traits>

#include "control/message_check.h"

namespace hvd_backup {

Coordinator::Coordinator(int size, bool measured, Combine combine, TimeUs stall_check_us, bool survives_losses)
    : size_(size),
      joined_(static_cast<std::size_t>(size), false),
      paused_(static_cast<std::size_t>(size), false),
      gone_(static_cast<std::size_t>(size), false),
      lost_(static_cast<std::size_t>(size), false),
      failures_(static_cast<std::size_t>(size)),
      out_(size) {
  out_.measured = measured;
  out_.combine = std::move(combine);
  out_.stall_check_us = stall_check_us;
  out_.survives_losses = survives_losses;
}

ChannelBook& Coordinator::book(ChannelId id) {
  if (id >= books_.size()) throw RuntimeFailure("malformed message: unknown channel " + std::to_string(id));
  return *books_[id];
}

void Coordinator::receive(int from, const Message& message, TimeUs now) {
  if (lost_[static_cast<std::size_t>(from)]) return;  // said before it died
  std::visit(
      [&](const auto& body) {
        if constexpr (requires { body.channel; }) {
          if (body.channel < books_.size()) check_message(message, size_, books_[body.channel]->facts());
        } else {
          check_message(message, size_, {});
        }
        using Body = std::decay_t<decltype(body)>;
        if constexpr (std::is_same_v<Body, Open>) {
          open(from, body, now);
        } else if constexpr (std::is_same_v<Body, Arrive>) {
          ChannelBook& channel = book(body.channel);
          const bool is_back = channel.kind() == ChannelKind::collective && !channel.strict();
          if (is_back && paused_[static_cast<std::size_t>(from)]) pause(from, false, now);
          channel.arrive(from, body, now);
        } else if constexpr (std::is_same_v<Body, Withdraw>) {
          book(body.channel).withdraw(from, body, now);
        } else if constexpr (std::is_same_v<Body, Waiting>) {
          book(body.channel).waiting(from, body);
          untangle(now);
          end_deadlock(now);
          end_starvation(now);
        } else if constexpr (std::is_same_v<Body, Done>) {
          book(body.channel).done(from, body, now);
        } else if constexpr (std::is_same_v<Body, Kept>) {
          book(body.channel).kept(from, body, now);
        } else if constexpr (std::is_same_v<Body, Progress>) {
          book(body.channel).progress(from, body, now);
        } else if constexpr (std::is_same_v<Body, Sync>) {
          book(body.channel).sync(from, body, now);
        } else if constexpr (std::is_same_v<Body, Offered>) {
          book(body.channel).offered(from, body, now);
        } else if constexpr (std::is_same_v<Body, StateLost>) {
          book(body.channel).state_lost(from, body, now);
        } else if constexpr (std::is_same_v<Body, BeginRound>) {
          book(body.channel).begin_round(from, body, now);
        } else if constexpr (std::is_same_v<Body, Away>) {
          book(body.channel).away(from, body, now);
        } else if constexpr (std::is_same_v<Body, Leave>) {
          book(body.channel).leave(from, body.round, now);
        } else if constexpr (std::is_same_v<Body, Pause>) {
          pause(from, true, now);
        } else if constexpr (std::is_same_v<Body, Join>) {
          join(from, now);
        } else if constexpr (std::is_same_v<Body, CanGroup> || std::is_same_v<Body, Formed>) {
          out_.groups.receive(from, body, now);
        } else if constexpr (std::is_same_v<Body, Exit>) {
          exit(from, body, now);
        } else {
          throw RuntimeFailure("malformed message: this kind is not for the coordinator");
        }
      },
      message);
  release_met(now);
  settle_groups(now);
}

// Attempts that a group served which was broken up are begun anew, and a group that is not used any more goes.
void Coordinator::settle_groups(TimeUs now) {
  for (const GroupId group : out_.groups.take_broken()) {
    for (auto& channel : books_) channel->disbanded(group, now);
  }
  for (const GroupId group : std::set(out_.groups.retired())) {
    const auto is_used = [group](const auto& channel) { return channel->is_served_by(group); };
    if (std::none_of(books_.begin(), books_.end(), is_used)) out_.groups.dismiss(group);
  }
  for (auto& [rank, message] : out_.groups.take_replies()) out_.replies.push_back({rank, std::move(message)});
}

// A full collective that all have entered: they will be back, so whoever comes first does not go on without the
// others.
void Coordinator::release_met(TimeUs now) {
  while (!out_.met.empty()) {
    for (int rank : std::exchange(out_.met, {})) {
      if (paused_[static_cast<std::size_t>(rank)]) pause(rank, false, now);
    }
  }
}

void Coordinator::open(int from, const Open& message, TimeUs now) {
  const auto [entry, is_new] = ids_.try_emplace(message.name, static_cast<ChannelId>(books_.size()));
  if (is_new) {
    const auto script = script_.find(message.name);
    books_.push_back(std::make_unique<ChannelBook>(
        entry->second, message, size_,
        [this](std::int64_t count) { return std::exchange(next_tag_, next_tag_ + count); }, out_,
        script == script_.end() ? nullptr : &script->second));
    ChannelBook& created = *books_.back();
    for (int r = 0; r < size_; ++r) {
      const auto index = static_cast<std::size_t>(r);
      if (lost_[index]) {
        created.lost(r, now);
      } else if (gone_[index]) {
        created.gone(r, failures_[index], now);
      }
      if (joined_[index]) created.set_joined(r, true, now);
      if (paused_[index] && created.kind() == ChannelKind::collective) created.set_paused(r, true, now);
    }
  }
  book(entry->second).open(from, message, now);
}

// With two optimizers, a rank that was late comes back out of phase: it waits in the second one's step while the
// others wait in the first one's, and enough of them would wait for each other for ever. All ranks run the same
// program, so when some are blocked in one channel and some in another, without a gradient in the first, the fewer
// are out of phase: their gradients are dropped, and they go on to where the others are. An attempt that waits for
// another rank to stand in can't be dropped, so there the others are out of phase, however many they are. Nor can a
// gradient of a step that is decided in another scope, and waits for more that are finite in this one: if none can be
// dropped, such a step is made of what is there.
void Coordinator::untangle(TimeUs now) {
  ChannelBook* most = nullptr;
  std::vector<std::pair<ChannelBook*, Ranks>> blocked;
  for (auto& channel : books_) {
    if (channel->kind() != ChannelKind::training) continue;
    Ranks ranks = channel->blocked();
    if (ranks.empty()) continue;
    blocked.emplace_back(channel.get(), std::move(ranks));
  }
  if (blocked.size() < 2) return;
  std::size_t count = 0;
  for (const auto& [channel, ranks] : blocked) {
    const bool is_more = ranks.size() > count || (ranks.size() == count && channel->open_step() < most->open_step());
    if (most == nullptr || channel->is_short() > most->is_short() ||
        (channel->is_short() == most->is_short() && is_more)) {
      most = channel;
      count = ranks.size();
    }
  }
  bool goes_on = false;
  for (const auto& [channel, ranks] : blocked) {
    if (channel == most) continue;
    for (const int rank : ranks) {
      if (!most->has_arrived(rank)) goes_on = channel->turn_away(rank, now) || goes_on;
    }
  }
  for (auto each = blocked.begin(); !goes_on && each != blocked.end(); ++each) {
    Ranks elsewhere;
    for (const auto& [channel, ranks] : blocked) {
      if (channel != each->first) elsewhere.insert(elsewhere.end(), ranks.begin(), ranks.end());
    }
    std::sort(elsewhere.begin(), elsewhere.end());
    goes_on = each->first->decide_without(elsewhere, now);
  }
}

// Every rank that is left is blocked in a collective of all ranks, but not in the same one: they would wait for ever.
void Coordinator::end_deadlock(TimeUs now) {
  std::vector<ChannelBook*> stuck;
  std::vector<bool> goes_on(static_cast<std::size_t>(size_));
  for (std::size_t r = 0; r < goes_on.size(); ++r) goes_on[r] = !gone_[r] && !joined_[r];
  std::string told;
  for (auto& channel : books_) {
    if (!channel->strict()) continue;
    const Ranks ranks = channel->blocked();
    if (ranks.empty()) continue;
    stuck.push_back(channel.get());
    told += (told.empty() ? "" : "; ") + std::string(ranks.size() == 1 ? "rank" : "ranks");
    for (const int rank : ranks) {
      told += (rank == ranks.front() ? " " : ", ") + std::to_string(rank);
      goes_on[static_cast<std::size_t>(rank)] = false;
    }
    told += " in '" + channel->name() + "'";
  }
  if (stuck.size() < 2 || std::count(goes_on.begin(), goes_on.end(), true) > 0) return;
  for (ChannelBook* channel : stuck) {
    channel->fail(
        "the ranks wait for each other in different collectives, which must be called by all in the same "
        "order, with the same names: " +
            told,
        now);
  }
}

// Some rank needs the state of another one, and who could give it waits for that very rank in a collective of all.
void Coordinator::end_starvation(TimeUs now) {
  for (auto& channel : books_) {
    for (const int taker : channel->starving()) {
      const Ranks servers = channel->servers_of(taker);
      std::string where;
      const auto waits = [&](int server) {
        return std::any_of(books_.begin(), books_.end(), [&](const auto& each) {
          if (!each->strict() || each->has_arrived(taker)) return false;
          const Ranks blocked = each->blocked();
          where = each->name();
          return std::find(blocked.begin(), blocked.end(), server) != blocked.end();
        });
      };
      if (servers.empty() || !std::all_of(servers.begin(), servers.end(), waits)) continue;
      channel->fail("rank " + std::to_string(taker) + " needs the state of another rank, because whoever kept an " +
                        "update that it has missed has died, and all others wait for it in '" + where +
                        "': begin anew from a checkpoint",
                    now);
      break;
    }
  }
}

void Coordinator::pause(int from, bool paused, TimeUs now) {
  paused_[static_cast<std::size_t>(from)] = paused;
  for (auto& channel : books_) {
    if (channel->kind() == ChannelKind::collective) channel->set_paused(from, paused, now);
  }
}

void Coordinator::join(int from, TimeUs now) {
  joined_[static_cast<std::size_t>(from)] = true;
  last_joined_ = from;
  for (auto& channel : books_) channel->set_joined(from, true, now);
  release_joined(now);
  end_deadlock(now);
}

// When every rank that is left has joined, all go on.
void Coordinator::release_joined(TimeUs now) {
  bool anybody = false;
  for (int r = 0; r < size_; ++r) {
    const auto index = static_cast<std::size_t>(r);
    if (!gone_[index] && !joined_[index]) return;
    anybody = anybody || (!gone_[index] && joined_[index]);
  }
  if (!anybody) return;
  for (int r = 0; r < size_; ++r) {
    const auto index = static_cast<std::size_t>(r);
    if (!joined_[index]) continue;
    joined_[index] = false;
    for (auto& channel : books_) channel->set_joined(r, false, now);
    if (!gone_[index]) out_.replies.push_back({r, Joined{last_joined_}});
  }
}

void Coordinator::exit(int from, const Exit& message, TimeUs now) {
  if (gone_[static_cast<std::size_t>(from)]) return;
  gone_[static_cast<std::size_t>(from)] = true;
  failures_[static_cast<std::size_t>(from)] = message.failure;
  for (auto& channel : books_) channel->gone(from, message.failure, now);
  release_joined(now);
  end_if_all_gone();
}

void Coordinator::lost(int rank, TimeUs now) {
  const auto index = static_cast<std::size_t>(rank);
  const bool had_left = gone_[index];
  gone_[index] = lost_[index] = true;
  for (int r = 0; r < size_; ++r) {
    if (!lost_[static_cast<std::size_t>(r)]) out_.replies.push_back({r, Lost{rank}});
  }
  out_.groups.lost(rank, now);
  for (auto& channel : books_) channel->lost(rank, now);
  settle_groups(now);
  if (had_left) return;
  release_joined(now);
  release_met(now);
  untangle(now);
  end_deadlock(now);
  end_starvation(now);
  end_if_all_gone();
}

void Coordinator::end_if_all_gone() {
  if (!std::all_of(gone_.begin(), gone_.end(), [](bool gone) { return gone; })) return;
  for (int r = 0; r < size_; ++r) {
    if (!lost_[static_cast<std::size_t>(r)]) out_.replies.push_back({r, AllGone{}});
  }
}

void Coordinator::tick(TimeUs now) {
  for (auto& channel : books_) {
    if (channel->next_deadline() && *channel->next_deadline() <= now) channel->tick(now);
  }
  if (std::any_of(books_.begin(), books_.end(), [](const auto& channel) { return channel->is_short(); })) untangle(now);
  end_starvation(now);
  release_met(now);
  if (const auto deadline = out_.groups.next_deadline(); deadline && *deadline <= now) out_.groups.tick(now);
  settle_groups(now);
}

std::optional<TimeUs> Coordinator::next_deadline() const {
  std::optional<TimeUs> first = out_.groups.next_deadline();
  for (const auto& channel : books_) {
    const auto deadline = channel->next_deadline();
    if (deadline && (!first || *deadline < *first)) first = deadline;
  }
  return first;
}

bool Coordinator::anybody_waits() const {
  return std::any_of(books_.begin(), books_.end(), [](const auto& channel) { return channel->anybody_waits(); });
}

}  // namespace hvd_backup
