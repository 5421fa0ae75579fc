// A libnccl.so.2 for tests, as far as csrc/gpu/nccl.cpp uses one: ranks are threads of this process, memory is the
// host's, and a stream is any address. It moves the bytes, stream by stream in order, and it checks how it is used: the
// first wrong use is kept, for nccl_double_wrong_use(). Like the real one it takes its time: a communicator is in
// progress for a few questions, when it forms and with each exchange. Compiled by tests/test_nccl.py.
#include <algorithm>
#include <climits>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

enum Result {
  success = 0,
  system_error = 2,
  invalid_argument = 4,
  invalid_usage = 5,
  remote_error = 6,
  in_progress = 7
};

constexpr int polls_in_progress = 3;

struct Id {
  char bytes[128];
};

// ncclConfig_t as of NCCL 2.18.
struct Config {
  std::size_t size;
  unsigned magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char* net_name;
  int split_share;
};

struct Part {
  void* data;
  std::size_t bytes;
  int peer;
  bool is_send;
  bool has_ended = false;
};

struct Communicator {
  std::string id;
  int member, members;
  int polls = polls_in_progress;
  bool is_formed = false;
  bool is_aborted = false;
  Result failure = success;
  void* stream = nullptr;  // of its first exchange

  bool is_in_progress() const { return !is_formed || polls > 0; }
};

struct Exchange {
  Communicator* communicator;
  std::vector<Part> parts;
};

std::mutex mutex;  // for all that follows
int version = 0;
std::string fault, wrong_use;
int ids = 0;
std::map<std::string, std::set<int>> groups;  // who has joined, by id
std::deque<Communicator> communicators;       // kept when they are aborted, so that a later use is seen
std::map<void*, std::deque<Exchange>> streams;

// The group of calls that is open in this thread.
thread_local bool is_open = false;
thread_local Exchange open_exchange;

Result wrong(const std::string& text) {
  if (wrong_use.empty()) wrong_use = text;
  return invalid_usage;
}

bool has_ended(const Exchange& exchange) {
  return std::all_of(exchange.parts.begin(), exchange.parts.end(), [](const Part& part) { return part.has_ended; });
}

// Whether the receive for it has begun: then the bytes are moved.
bool deliver(const Communicator& sender, Part& send) {
  for (auto& [stream, queue] : streams) {
    if (queue.empty()) continue;
    const Communicator& receiver = *queue.front().communicator;
    if (receiver.id != sender.id || receiver.member != send.peer) continue;
    for (Part& part : queue.front().parts) {
      if (part.is_send || part.has_ended || part.peer != sender.member) continue;
      if (part.bytes == send.bytes) {
        std::memcpy(part.data, send.data, send.bytes);
      } else {
        wrong("a send of " + std::to_string(send.bytes) + " bytes and its receive of " + std::to_string(part.bytes));
      }
      return part.has_ended = send.has_ended = true;
    }
  }
  return false;
}

// As far as it goes: the first exchange of each stream is the one that has begun.
void run_streams() {
  for (bool has_moved = true; has_moved;) {
    has_moved = false;
    for (auto& [stream, queue] : streams) {
      while (!queue.empty() && has_ended(queue.front())) {
        queue.pop_front();
        has_moved = true;
      }
      if (queue.empty()) continue;
      for (Part& part : queue.front().parts) {
        if (part.is_send && !part.has_ended && deliver(*queue.front().communicator, part)) has_moved = true;
      }
    }
  }
}

Result add(Communicator* communicator, int type, void* stream, Part part) {
  const std::lock_guard lock(mutex);
  if (!is_open) return wrong("ncclSend or ncclRecv outside of a group of calls");
  if (communicator->is_aborted) return wrong("ncclSend or ncclRecv after ncclCommAbort");
  if (communicator->is_in_progress()) return wrong("ncclSend or ncclRecv while the communicator is in progress");
  if (communicator->failure != success) return wrong("ncclSend or ncclRecv after a failure");
  if (type != 0 && type != 1) return wrong("a type that is not one byte wide");
  if (part.peer < 0 || part.peer >= communicator->members || part.peer == communicator->member) {
    return wrong("member " + std::to_string(communicator->member) + " exchanges with " + std::to_string(part.peer));
  }
  if (communicator->stream != nullptr && communicator->stream != stream) return wrong("another stream than before");
  communicator->stream = stream;
  auto& open = open_exchange;
  if (open.communicator != nullptr && open.communicator != communicator) return wrong("two communicators in a group");
  open.communicator = communicator;
  if (fault == "send" && part.is_send) return system_error;
  open.parts.push_back(part);
  return success;
}

}  // namespace

extern "C" {

// Begins anew. fault: "join", "send", "exchange": that call fails; "forming", "exchanging": it fails in the background.
void nccl_double_begin(int its_version, const char* its_fault) {
  const std::lock_guard lock(mutex);
  version = its_version;
  fault = its_fault;
  wrong_use.clear();
  streams.clear();
}

// Valid until the next call of anything here.
const char* nccl_double_wrong_use() { return wrong_use.c_str(); }

// Exchanges in this stream that have not ended.
int nccl_double_pending(void* stream) {
  const std::lock_guard lock(mutex);
  return static_cast<int>(streams[stream].size());
}

// Communicators that have not been aborted.
int nccl_double_alive() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(std::count_if(communicators.begin(), communicators.end(),
                                        [](const Communicator& each) { return !each.is_aborted; }));
}

Result ncclGetVersion(int* out) {
  *out = version;
  return success;
}

Result ncclGetUniqueId(Id* out) {
  const std::lock_guard lock(mutex);
  std::memset(out, 0, sizeof *out);  // a zero is a byte of an id as any other
  std::memcpy(out->bytes + 64, &++ids, sizeof ids);
  groups[std::string(out->bytes, sizeof out->bytes)];
  return success;
}

Result ncclCommInitRankConfig(Communicator** out, int members, Id id, int member, const Config* config) {
  const std::lock_guard lock(mutex);
  *out = nullptr;
  if (config->size != sizeof *config || config->magic != 0xcafebeef || config->version != 21800) {
    return wrong("a configuration that does not say of which NCCL it is");
  }
  if (config->blocking != 0) return wrong("a communicator that blocks");
  for (const int other : {config->cga_cluster_size, config->min_ctas, config->max_ctas, config->split_share}) {
    if (other != INT_MIN) return wrong("a configuration that says more than that");
  }
  const std::string name(id.bytes, sizeof id.bytes);
  const auto group = groups.find(name);
  if (group == groups.end()) return wrong("an id that ncclGetUniqueId has not given");
  if (is_open) return wrong("ncclCommInitRankConfig inside a group of calls");
  if (member < 0 || member >= members) return wrong("member " + std::to_string(member));
  if (!group->second.insert(member).second) return wrong("a member that has joined already");
  if (fault == "join") return invalid_argument;
  *out = &communicators.emplace_back(Communicator{name, member, members});
  return in_progress;
}

Result ncclCommGetAsyncError(Communicator* communicator, Result* out) {
  const std::lock_guard lock(mutex);
  if (communicator->is_aborted) return wrong("ncclCommGetAsyncError after ncclCommAbort");
  const bool is_complete = static_cast<int>(groups[communicator->id].size()) == communicator->members;
  if (communicator->failure == success && communicator->is_in_progress()) {
    if (is_complete && communicator->polls > 0) --communicator->polls;
    if (is_complete && communicator->polls == 0) {
      if (fault == (communicator->is_formed ? "exchanging" : "forming")) {
        communicator->failure = communicator->is_formed ? remote_error : system_error;
      }
      communicator->is_formed = true;
    } else {
      *out = in_progress;
      return success;
    }
  }
  *out = communicator->failure;
  return success;
}

Result ncclCommAbort(Communicator* communicator) {
  const std::lock_guard lock(mutex);
  if (communicator->is_aborted) return wrong("ncclCommAbort twice");
  if (is_open) return wrong("ncclCommAbort inside a group of calls");
  communicator->is_aborted = true;
  for (auto& [stream, queue] : streams) {
    std::erase_if(queue, [&](const Exchange& exchange) { return exchange.communicator == communicator; });
  }
  run_streams();
  return success;
}

Result ncclGroupStart() {
  const std::lock_guard lock(mutex);
  if (is_open) return wrong("ncclGroupStart twice");
  is_open = true;
  open_exchange = {};
  return success;
}

Result ncclGroupEnd() {
  const std::lock_guard lock(mutex);
  if (!is_open) return wrong("ncclGroupEnd without ncclGroupStart");
  is_open = false;
  if (fault == "send" || fault == "exchange") return system_error;
  if (open_exchange.parts.empty()) return wrong("a group without calls");
  Communicator* communicator = open_exchange.communicator;
  communicator->polls = polls_in_progress;
  if (fault == "exchanging") return in_progress;
  streams[communicator->stream].push_back(open_exchange);
  run_streams();
  return in_progress;
}

Result ncclSend(void* data, std::size_t bytes, int type, int peer, Communicator* communicator, void* stream) {
  return add(communicator, type, stream, Part{data, bytes, peer, true});
}

Result ncclRecv(void* data, std::size_t bytes, int type, int peer, Communicator* communicator, void* stream) {
  return add(communicator, type, stream, Part{data, bytes, peer, false});
}

const char* ncclGetErrorString(Result result) {
  if (result == system_error) return "unhandled system error";
  if (result == remote_error) return "remote process exited or there was a network error";
  return result == invalid_argument ? "invalid argument" : "invalid usage";
}

const char* ncclGetLastError(Communicator*) { return "noted by the double"; }

}  // extern "C"
