// Everything that ranks say to each other, besides gradients. Members talk to the coordinator, the coordinator
// answers: it sends to a rank only in reply to something that rank has sent (one Verdict for each Arrive, one reply
// for each Sync and each Done), so nothing can pile up towards a rank that is stopped. The exceptions: Probe, of which
// at most one for each attempt waits for its answer; Decision of a next attempt and Late, to contributors of one that
// is given up; Offer, of which at most one waits for its Offered, and one Dismiss for each of those; Failed, Lost (of
// each rank) and AllGone, sent at most once; Form and Disband, once for each group.
//
// Pull goes from a late rank to a rank that keeps a shard in its journal, and is answered by a transfer or by
// Refused; PullState likewise to a rank that has offered its state, answered by a transfer or by NoState.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "base/wire.h"

namespace hvd_backup {

using Step = std::int64_t;
using ChannelId = std::uint32_t;
using Ranks = std::vector<std::int32_t>;  // ascending
using GroupId = std::int64_t;             // of a DeviceGroups; 0: none

enum class ChannelKind : std::uint8_t {
  training,   // one optimizer: a late rank applies what it missed and goes on with the newest step
  collective  // first_n_allreduce: the k-th call on each rank is the k-th collective
};
constexpr bool is_known(ChannelKind kind) { return kind <= ChannelKind::collective; }

struct ChannelOptions {
  std::int32_t required = 1;    // N
  std::int64_t grace_us = 0;    // after the N-th arrival
  std::int32_t max_misses = 0;  // 0: off
  std::int64_t max_lag = 64;    // updates that the journal holds
  bool automatic = false;       // N is chosen from step to step, never below `required`
  bool resync = false;          // a rank beyond the journal takes over another's state; otherwise the others wait
  template <class A>
  void fields(A& a) {
    a(required), a(grace_us), a(max_misses), a(max_lag), a(automatic), a(resync);
  }
};

// Squared norms over the elements of an update, for the gradient noise scale; zero: not measured.
struct Squares {
  double contributions = 0;  // summed over the contributors
  double mean = 0;           // of the result
  template <class A>
  void fields(A& a) {
    a(contributions), a(mean);
  }
  Squares& operator+=(const Squares& other) {
    contributions += other.contributions;
    mean += other.mean;
    return *this;
  }
};

// --- member to coordinator ---------------------------------------------------------------------------------------

struct Open {
  std::string name;
  ChannelKind kind = ChannelKind::training;
  std::string description;  // must be equal on all ranks, line by line
  std::string proposal;     // that of the first rank to open is everybody's
  ChannelOptions options;
  bool wait_for_all = false;
  bool on_device = false;  // of this rank's gradients some are on a GPU
  template <class A>
  void fields(A& a) {
    a(name), a(kind), a(description), a(proposal), a(options), a(wait_for_all), a(on_device);
  }
};

struct Arrive {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  Step base = 0;           // updates applied to the weights that the gradient was computed from
  std::int32_t round = 0;  // of the sender
  std::int32_t scopes = 1;
  std::int32_t buckets = 1;
  double samples = 1.0;
  bool finite = true;    // false: it holds NaN or infinity, and is to count as late
  std::string metadata;  // opaque; that of the lowest contributor to scope 0 is the update's
  std::string payload;   // opaque; of a small contribution, all of it: if all have sent theirs, see Decision::result
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(base), a(round), a(scopes), a(buckets), a(samples), a(finite), a(metadata);
    a(payload);
  }
};

// This rank has arrived but will not deliver its gradient after all (it is leaving in the middle of a backward pass).
struct Withdraw {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope);
  }
};

// The sender's training thread waits for the decision of this step, and does nothing else until it comes. Sent where
// ranks may wait for each other in different channels (two optimizers): see Coordinator::untangle.
struct Waiting {
  ChannelId channel = 0;
  Step step = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step);
  }
};

// This rank has the whole result of (step, scope). If the decision says so, it waits for Final before it applies it.
struct Done {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  std::int32_t attempt = 0;
  bool kept = false;  // it has put its shards into its journal; if not, Kept follows
  Squares squares;    // of the part that this rank has summed
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(attempt), a(kept), a(squares);
  }
};

struct Kept {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope);
  }
};

// The answer to Probe, by the engine, whatever the training thread does.
struct Progress {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  std::int32_t attempt = 0;
  std::int32_t unsubmitted = 0;  // buckets that the training thread has not handed over yet
  Ranks contributions_missing;   // from whom something to be summed here has not come
  Ranks results_missing;         // from whom a part of the result has not come
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(attempt), a(unsubmitted), a(contributions_missing), a(results_missing);
  }
};

// "I have applied `have` updates: what next?" Answered by History, Resume, Resync or Over, perhaps later.
struct Sync {
  ChannelId channel = 0;
  Step have = 0;
  std::int32_t round = 0;
  bool lost = false;  // the next update is not kept by anybody any more
  template <class A>
  void fields(A& a) {
    a(channel), a(have), a(round), a(lost);
  }
};

// The sender has made a copy of its state after `step` updates, and keeps it until Dismiss.
struct Offered {
  ChannelId channel = 0;
  Step step = 0;
  std::int64_t bytes = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(bytes);
  }
};

// The state that Resync has promised does not come: is there another one? Answered by Resync, if there ever is.
struct StateLost {
  ChannelId channel = 0;
  std::int32_t server = 0;
  Step step = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(server), a(step);
  }
};

struct BeginRound {
  ChannelId channel = 0;
  std::int32_t round = 0;
  std::int64_t length = -1;      // steps; -1: unknown
  std::int64_t align_every = 0;  // 0: never
  template <class A>
  void fields(A& a) {
    a(channel), a(round), a(length), a(align_every);
  }
};

// The sender's data for this round has ended.
struct Away {
  ChannelId channel = 0;
  std::int32_t round = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(round);
  }
};

// The sender enters a full collective: the round ends for all.
struct Leave {
  ChannelId channel = 0;
  std::int32_t round = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(round);
  }
};

// The sender enters a full collective: it cannot contribute to channels of kind `collective` until it arrives again.
struct Pause {
  template <class A>
  void fields(A&) {}
};

struct Join {
  template <class A>
  void fields(A&) {}
};

// Whether the sender can exchange data with others' GPUs directly: see DeviceGroups.
struct CanGroup {
  std::string why_not;  // empty: it can
  std::string means;    // "nccl" or "mpi" (CUDA-aware)
  template <class A>
  void fields(A& a) {
    a(why_not), a(means);
  }
};

// The answer to Form. Later, too, when the group has failed here.
struct Formed {
  GroupId group = 0;
  std::string failure;  // empty: it is there
  template <class A>
  void fields(A& a) {
    a(group), a(failure);
  }
};

// The sender's program ends; its engine goes on serving until AllGone. failure: empty when it ends as planned.
struct Exit {
  std::string failure;
  template <class A>
  void fields(A& a) {
    a(failure);
  }
};

// --- coordinator to member ---------------------------------------------------------------------------------------

struct Opened {
  std::string name;
  ChannelId channel = 0;
  std::string proposal;
  bool measured = false;  // squared norms are wanted
  template <class A>
  void fields(A& a) {
    a(name), a(channel), a(proposal), a(measured);
  }
};

struct Failed {  // of one channel, for good
  std::string name;
  std::string reason;
  template <class A>
  void fields(A& a) {
    a(name), a(reason);
  }
};

// What every answer tells besides.
struct Outlook {
  Step round_end = -1;  // of the receiver's round; -1: not known
  Step all_have = 0;    // the updates before are wanted by nobody any more
  bool beyond = false;  // some rank is beyond the journal, and will want the state of another one
  template <class A>
  void fields(A& a) {
    a(round_end), a(all_have), a(beyond);
  }
};

struct Decision {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  std::int32_t attempt = 0;
  std::int64_t tag = 0;  // the first of 2 * buckets tags that nobody else uses, before or after
  bool votes = false;    // the update may be applied only when Final says so: until then, another attempt may follow
  GroupId group = 0;     // in which the contributors' GPUs exchange data
  Ranks contributors;
  std::vector<double> weights;  // one for each contributor
  double samples = 0;           // their sum
  std::int32_t required = 0;    // N
  std::string metadata;
  std::string result;  // opaque; what the payloads of the contributors make: nothing is exchanged any more
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(attempt), a(tag), a(votes), a(group), a(contributors), a(weights), a(samples);
    a(required), a(metadata), a(result), a(outlook);
  }
};

// Every contributor has the whole result, or all but those that have stopped: this is the update.
struct Final {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  std::int32_t attempt = 0;
  Ranks stopped;  // will fetch it like late ranks
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(attempt), a(stopped), a(outlook);
  }
};

// How far is the receiver with this attempt? Answered by Progress at once.
struct Probe {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  std::int32_t attempt = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(attempt);
  }
};

// Also to a contributor that had stopped, and without which the others have gone on.
struct Late {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t scope = 0;
  Step newest = 0;
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(scope), a(newest), a(outlook);
  }
};

struct PastUpdate {
  Step step = 0;
  std::vector<Ranks> contributors;  // of each scope
  double samples = 0;
  std::int32_t required = 0;
  std::string metadata;
  template <class A>
  void fields(A& a) {
    a(step), a(contributors), a(samples), a(required), a(metadata);
  }
};

struct History {
  ChannelId channel = 0;
  std::vector<PastUpdate> updates;  // consecutive, from Sync::have; all final
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(updates), a(outlook);
  }
};

struct Resume {
  ChannelId channel = 0;
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(outlook);
  }
};

struct Over {
  ChannelId channel = 0;
  std::int32_t round = 0;  // that is over; a rank that has joined hears only of the last one
  Step end = 0;            // where it has ended, and the next one begins
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(round), a(end), a(outlook);
  }
};

// Make a copy of your state, as soon as all updates that you have taken are applied. Answered by Offered.
struct Offer {
  ChannelId channel = 0;
  template <class A>
  void fields(A& a) {
    a(channel);
  }
};

// Nobody needs the state after `step` updates that the receiver has offered.
struct Dismiss {
  ChannelId channel = 0;
  Step step = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step);
  }
};

// The receiver is beyond the journal: it is to take over the state that `server` has offered.
struct Resync {
  ChannelId channel = 0;
  std::int32_t server = 0;
  Step step = 0;
  std::int64_t bytes = 0;
  bool contributed = false;  // the receiver's last gradient has become part of an update, after it had stopped
  bool instead = false;      // of another state, which is lost
  Outlook outlook;
  template <class A>
  void fields(A& a) {
    a(channel), a(server), a(step), a(bytes), a(contributed), a(instead), a(outlook);
  }
};

struct Joined {
  std::int32_t last = 0;
  template <class A>
  void fields(A& a) {
    a(last);
  }
};

// A process has died: it will never be heard of again.
struct Lost {
  std::int32_t rank = 0;
  template <class A>
  void fields(A& a) {
    a(rank);
  }
};

// Form a group of these ranks. Answered by Formed, perhaps much later.
struct Form {
  GroupId group = 0;
  Ranks members;
  std::string name;  // see Device::new_group
  template <class A>
  void fields(A& a) {
    a(group), a(members), a(name);
  }
};

// The group is not used any more. What goes on in it will not end.
struct Disband {
  GroupId group = 0;
  template <class A>
  void fields(A& a) {
    a(group);
  }
};

struct AllGone {
  template <class A>
  void fields(A&) {}
};

// --- late rank to keeper of a shard ------------------------------------------------------------------------------

struct Pull {
  ChannelId channel = 0;
  Step step = 0;
  std::int32_t bucket = 0;
  std::int32_t shard = 0;
  std::int64_t tag = 0;  // of the transfer that answers
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(bucket), a(shard), a(tag);
  }
};

struct Refused {
  Pull pull;
  bool forgotten = false;  // it is beyond the journal
  template <class A>
  void fields(A& a) {
    a(pull), a(forgotten);
  }
};

// A part of the state that the receiver has offered.
struct PullState {
  ChannelId channel = 0;
  Step step = 0;
  std::int64_t begin = 0;
  std::int64_t bytes = 0;
  std::int64_t tag = 0;  // of the transfer that answers
  template <class A>
  void fields(A& a) {
    a(channel), a(step), a(begin), a(bytes), a(tag);
  }
};

struct NoState {
  ChannelId channel = 0;
  Step step = 0;
  template <class A>
  void fields(A& a) {
    a(channel), a(step);
  }
};

using Message = std::variant<Open, Arrive, Withdraw, Waiting, Done, Kept, Progress, Sync, Offered, StateLost,
                             BeginRound, Away, Leave, Pause, Join, CanGroup, Exit, Formed, Opened, Failed, Decision,
                             Final, Probe, Late, History, Resume, Over, Offer, Dismiss, Resync, Joined, Lost, Form,
                             Disband, AllGone, Pull, Refused, PullState, NoState>;

std::vector<std::byte> encode(const Message& message);
Message decode(const std::vector<std::byte>& bytes);  // RuntimeFailure when malformed

}  // namespace hvd_backup
