// The engine thread's side: reductions, what is kept for late ranks, and what this rank fetches as one.
#include <algorithm>
#include <cstring>

#include "collective/allreduce.h"
#include "collective/partition.h"
#include "engine/engine.h"
#include "engine/payload.h"

namespace hvd_backup {

namespace {

// A keeper that has not answered a fetch after this multiple of what the last fetch took is not waited for.
constexpr TimeUs patience_factor = 8;
constexpr TimeUs least_patience_us = 20'000;  // scheduling noise on a crowded machine

}  // namespace

// Of transfers that this rank asks for.
std::function<Tag()> Engine::next_tags() {
  return [this] { return std::exchange(next_fetch_tag_, next_fetch_tag_ + 2); };
}

// How far this rank is with an attempt that others wait for.
void Engine::answer(Channel& channel, const Probe& probe) {
  Progress progress;
  progress.channel = probe.channel;
  progress.step = probe.step;
  progress.scope = probe.scope;
  progress.attempt = probe.attempt;
  if (channel.member.contributing(probe.step, probe.scope, probe.attempt)) {
    progress.unsubmitted = channel.member.unsubmitted(probe.scope);
    Missing all;
    for (const auto& collective : channel.reductions[probe.scope].collectives) {
      if (!collective) continue;
      Missing missing = collective->missing();
      all.contributions.merge(missing.contributions);
      all.results.merge(missing.results);
    }
    progress.contributions_missing.assign(all.contributions.begin(), all.contributions.end());
    progress.results_missing.assign(all.results.begin(), all.results.end());
  }
  outgoing_.push_back(std::move(progress));
}

// Some contributors have stopped: what lies ready for them they will not read any more, but fetch like late ranks; and
// what they were to keep for others is kept here.
void Engine::stand_in_for(Channel& channel, const Final& message) {
  const auto found = channel.reductions.find(message.scope);
  if (message.stopped.empty() || found == channel.reductions.end()) return;
  Reduction& reduction = found->second;
  if (reduction.decision.step != message.step || reduction.decision.attempt != message.attempt) return;
  for (const auto& collective : reduction.collectives) {
    if (collective) collective->abandon();
  }
  reduction.keeps_all = true;
  if (channel.member.holds()) return;
  for (const Bucket& bucket : channel.buckets) {
    if (bucket.layout.scope != message.scope || !bucket.on_device || reduction.decision.group == 0) continue;
    device_->copy_now(bucket.result, bucket.on_device->result, bucket.bytes());  // only its own shards were kept
  }
  keep_for_late_ranks(channel, reduction.decision);
}

// A late rank asks for a shard that this rank keeps.
void Engine::serve(int from, const Pull& pull) {
  Journal::Block block;
  bool forgotten = false;
  {
    const std::scoped_lock lock(mutex_);
    if (Channel* channel = find(pull.channel)) {
      block = channel->journal.find(pull.step, pull.bucket, pull.shard);
      forgotten = pull.step < channel->member.all_have();
    }
  }
  if (!block.data) {
    send(from, Refused{pull, forgotten});
  } else if (block.on_device) {
    device_->read(block, [this, from, tag = pull.tag](const std::shared_ptr<const std::vector<std::byte>>& data) {
      transport_->start_send(from, tag, *data, [data] {});
    });
  } else {
    transport_->start_send(from, pull.tag, {block.data.get(), block.bytes}, [block] {});
  }
}

// A rank beyond the journal asks for a piece of the state that this rank has offered.
void Engine::serve(int from, const PullState& pull) {
  std::shared_ptr<const State> state;
  {
    const std::scoped_lock lock(mutex_);
    if (Channel* channel = find(pull.channel)) {
      if (const auto found = channel->offered.find(pull.step); found != channel->offered.end()) state = found->second;
    }
  }
  const auto begin = static_cast<std::size_t>(pull.begin), bytes = static_cast<std::size_t>(pull.bytes);
  if (!state) {
    send(from, NoState{pull.channel, pull.step});
  } else if (begin > state->size() || bytes > state->size() - begin) {
    throw RuntimeFailure("malformed message: a piece of a state that has " + std::to_string(state->size()) + " bytes");
  } else {
    transport_->start_send(from, pull.tag, {state->data() + begin, bytes}, [state] {});
  }
}

// With the mutex held. A keeper does not have what this rank fetches: it may get it yet, unless it has fallen out of
// the journal.
void Engine::refused(const Refused& message, TimeUs now) {
  for (const auto& fetch : fetches_) {
    if (fetch->ended() || !fetch->is_of(message.pull)) continue;
    const bool resyncs = known(fetch->channel()).resyncs;
    if (!(message.forgotten && resyncs) && fetch->refused(message.pull, now)) continue;
    if (!resyncs) throw RuntimeFailure(fetch->hopeless());
    give_up(*fetch);
  }
}

// With the mutex held. Nobody keeps the update any more: the state of another rank takes its place.
void Engine::give_up(Fetch& fetch) {
  Channel& channel = known(fetch.channel());
  fetch.give_up();
  --channel.running;
  channel.member.fetch_lost(fetch.step());
  mark_dirty(channel);
  channel.changed.notify_all();
}

void Engine::start_state_fetch(Channel& channel, const Resync& promised, TimeUs now) {
  const auto done = [this, &channel](const Resync& its, std::shared_ptr<const State> state) {
    const std::scoped_lock lock(mutex_);
    if (!channel.member.state_here(its)) return;
    channel.arrived = std::move(state);
    channel.changed.notify_all();
  };
  auto fetch = std::make_shared<StateFetch>(
      *transport_, [this](int server, const PullState& pull) { send(server, pull); }, next_tags(), promised, done);
  state_fetches_.emplace_back(&channel, fetch);
  fetch->start(now);
}

void Engine::watch_state_fetches(TimeUs now) {
  std::erase_if(state_fetches_, [](const auto& each) { return each.second->ended(); });
  for (const auto& [channel, fetch] : state_fetches_) {
    if (!fetch->is_overdue(now)) continue;
    const std::scoped_lock lock(mutex_);
    channel->member.state_lost(fetch->promised());
    mark_dirty(*channel);
  }
}

void Engine::start_reduction(const Start& start) {
  const Decision& decision = start.decision;
  const Bucket& bucket = start.channel->buckets[static_cast<std::size_t>(start.bucket)];
  if (!decision.result.empty()) {
    if (decision.result.size() != bucket.bytes()) throw RuntimeFailure("malformed message: a result of another size");
    std::memcpy(bucket.result, decision.result.data(), bucket.bytes());
    bucket_reduced(*start.channel, decision, nullptr);
    return;
  }
  const std::vector<int> ranks(decision.contributors.begin(), decision.contributors.end());
  const Tag tag = tag_of(decision, start.bucket);
  Factors factors = factors_of(decision, bucket.layout.dtype, start.channel->average);
  std::shared_ptr<SquaredNorms> norms;
  const bool is_gradient = start.bucket < start.channel->gradient_buckets && !is_integer(bucket.layout.dtype);
  if (start.channel->measured && is_gradient) norms = std::make_shared<SquaredNorms>();
  OnDone on_done = [this, channel = start.channel, decision, norms] {
    bucket_reduced(*channel, decision, norms.get());
  };
  std::shared_ptr<RunningAllreduce> running;
  if (bucket.on_device && decision.group != 0) {
    DeviceAllreduceOptions options;
    options.weights = std::move(factors.weights);
    options.scale = factors.scale;
    options.dtype = bucket.layout.dtype;
    options.count = bucket.layout.count;
    options.contribution = bucket.on_device->contribution;
    options.result = bucket.on_device->result;
    Places& places = start.channel->reductions[decision.scope].places;
    if (places.empty()) places = places_on_device(*start.channel, decision);
    for (const auto& [place, block] : places) {
      if (place.first != start.bucket) continue;
      const Shard part = shard_of(bucket.layout.count, ranks.size(), static_cast<std::size_t>(place.second));
      std::byte* const in_result = static_cast<std::byte*>(bucket.result) + part.begin * size_of(bucket.layout.dtype);
      auto to = block.data ? block.data : std::shared_ptr<std::byte>(block.data, in_result);
      options.kept.push_back({part, std::move(to), block.on_device});
    }
    options.norms = norms;
    running = device_->start_in_group(decision.group, tag, ranks, std::move(options), bucket.on_device->ready,
                                      std::move(on_done));
  } else {
    AllreduceOptions options;
    options.members = ranks;
    options.dtype = bucket.layout.dtype;
    options.count = bucket.layout.count;
    options.contribution = bucket.contribution;
    options.result = bucket.result;
    options.tag = tag;
    options.result_tag = tag + 2;
    options.cancellable = decision.votes;
    options.staging = &staging_;
    options.weights = std::move(factors.weights);
    options.scale = factors.scale;
    options.norms = norms;
    running = bucket.on_device
                  ? device_->start_through_host(*transport_, std::move(options), bucket.on_device->contribution,
                                                bucket.on_device->result, bucket.on_device->ready, std::move(on_done))
                  : start_allreduce(*transport_, std::move(options), std::move(on_done));
  }
  const std::scoped_lock lock(mutex_);
  Reduction& reduction = start.channel->reductions[decision.scope];
  if (reduction.decision.tag == decision.tag && !reduction.collectives.empty()) {
    reduction.collectives[static_cast<std::size_t>(start.bucket)] = std::move(running);
  }
}

void Engine::bucket_reduced(Channel& channel, const Decision& decision, const SquaredNorms* norms) {
  bool complete = false;
  {
    const std::scoped_lock lock(mutex_);
    Reduction& reduction = channel.reductions[decision.scope];
    if (!channel.member.contributing(decision.step, decision.scope, decision.attempt)) return;  // given up meanwhile
    --reduction.running;
    --channel.running;
    if (norms) reduction.squares += Squares{norms->sources, norms->destination};
    complete = --reduction.left == 0;
  }
  // Before anybody hears of it: the training thread may change the result once it has it.
  if (complete && !channel.member.holds()) keep_for_late_ranks(channel, decision);
  const std::scoped_lock lock(mutex_);
  if (complete) {
    const Squares& squares = channel.reductions[decision.scope].squares;
    channel.member.reduced(decision.step, decision.scope, decision.attempt, squares);
  }
  mark_dirty(channel);
  channel.changed.notify_all();
}

// On the engine thread. This rank does not contribute to this attempt any more, or there is another one, which writes
// the same results.
void Engine::abandon(Channel& channel, Reduction& reduction) {
  for (const auto& collective : reduction.collectives) {
    if (collective) collective->abandon();
  }
  channel.running -= reduction.running;
  reduction = {};
  channel.changed.notify_all();
}

void Engine::keep_for_late_ranks(Channel& channel, const Decision& decision) {
  if (static_cast<int>(decision.contributors.size()) == size_ && !decision.votes) return;
  Reduction& reduction = channel.reductions[decision.scope];
  keep_for_late_ranks(channel, decision.step, decision.scope, decision.contributors, reduction.keeps_all,
                      std::exchange(reduction.places, {}));
}

// Where an attempt in a group puts what this rank keeps of it. Of all buckets at once, before any has begun: then the
// GPU waits for nobody, and more memory can be taken.
Places Engine::places_on_device(const Channel& channel, const Decision& decision) {
  Places places;
  if (channel.member.holds()) return places;  // kept once it is committed
  const std::size_t k = decision.contributors.size();
  for (std::size_t b = 0; b < channel.buckets.size(); ++b) {
    const BucketLayout& layout = channel.buckets[b].layout;
    if (!layout.on_device || layout.scope != decision.scope) continue;
    for (const int shard : shards_kept(decision.contributors, false)) {
      const std::size_t elements = shard_of(layout.count, k, static_cast<std::size_t>(shard)).size();
      if (elements == 0) continue;
      places.emplace(std::pair(static_cast<int>(b), shard), device_->place_for(elements * size_of(layout.dtype)));
    }
  }
  return places;
}

// Which shards of the result this rank keeps, if it is among the contributors; or all.
std::vector<int> Engine::shards_kept(const Ranks& contributors, bool all) const {
  const int k = static_cast<int>(contributors.size());
  const auto self = std::find(contributors.begin(), contributors.end(), rank_);
  std::vector<int> kept;
  if (self == contributors.end()) return kept;
  const int own = static_cast<int>(self - contributors.begin());
  for (int shard = 0; shard < k; ++shard) {
    if (all || owner_of(shard) == own || neighbour_of(shard, k) == own) kept.push_back(shard);
  }
  return kept;
}

// Of the result that this rank has now: in host memory, if it has not been put elsewhere already.
void Engine::keep_for_late_ranks(Channel& channel, Step step, int scope, const Ranks& contributors, bool all,
                                 Places places) {
  const std::size_t k = contributors.size();
  const std::vector<int> kept = shards_kept(contributors, all);
  for (std::size_t b = 0; b < channel.buckets.size(); ++b) {
    const Bucket& bucket = channel.buckets[b];
    if (bucket.layout.scope != scope) continue;
    for (const int shard : kept) {
      const auto place = places.find({static_cast<int>(b), shard});
      if (place != places.end() && place->second.data) {
        channel.journal.keep(step, static_cast<int>(b), shard, std::move(place->second));
        continue;
      }
      const Shard cut = shard_of(bucket.layout.count, k, static_cast<std::size_t>(shard));
      const std::size_t size = size_of(bucket.layout.dtype);
      const auto* begin = static_cast<const std::byte*>(bucket.result) + cut.begin * size;
      channel.journal.keep(step, static_cast<int>(b), shard, {begin, cut.size() * size});
    }
  }
}

void Engine::start_fetch(Channel& channel, const CatchUp& missed, TimeUs now) {
  const TimeUs patience = std::max(least_patience_us, patience_factor * fetch_us_);
  if (missed.update.step != newest_fetched_ + 1) silent_keepers_.clear();
  newest_fetched_ = missed.update.step;
  const Ranks lost_by_now = lost();
  silent_keepers_.insert(lost_by_now.begin(), lost_by_now.end());
  const auto done = [this, &channel, missed](TimeUs asked_at) {
    fetch_us_ = monotonic_us() - asked_at;
    const Step step = missed.update.step;
    for (const int scope :
         missed.scopes) {  // it may have contributed before it stopped; now it has what it owes others
      keep_for_late_ranks(channel, step, scope, missed.update.contributors[static_cast<std::size_t>(scope)], false);
    }
    const std::scoped_lock lock(mutex_);
    --channel.running;
    channel.member.fetched(step);
    mark_dirty(channel);
    channel.changed.notify_all();
  };
  auto fetch = std::make_shared<Fetch>(
      *transport_, [this](int keeper, const Pull& pull) { send(keeper, pull); }, next_tags(), channel.id, missed,
      channel.buckets, silent_keepers_, patience, done);
  fetches_.push_back(fetch);
  fetch->start(now);
}

void Engine::tick_fetches(TimeUs now) {
  std::erase_if(fetches_, [](const auto& fetch) { return fetch->ended(); });
  for (const auto& fetch : fetches_) fetch->tick(now);
  const std::scoped_lock lock(mutex_);
  for (const auto& fetch : fetches_) {
    const bool hopeless = !lost_.empty() && !fetch->ended() && fetch->is_hopeless(lost_);
    if (hopeless && known(fetch->channel()).resyncs) give_up(*fetch);
  }
}

}  // namespace hvd_backup
