// What we use of NCCL's interface, declared here and looked up by name; and a group, an NCCL communicator.
//
// Communicators are non-blocking: to form one, and to put the first exchange with a peer into the stream, takes talking
// to the others, and one of them may be stopped. NCCL does that in a thread of its own. It says ncclInProgress, and
// until it says otherwise nothing else may be asked of the communicator but how it is, and to abort.
#include "gpu/nccl.h"

#include <dlfcn.h>

#include <climits>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace hvd_backup::gpu {

namespace {

using Result = int;  // ncclResult_t
constexpr Result success = 0;
constexpr Result in_progress = 7;
constexpr int bytes = 0;  // ncclInt8

struct UniqueId {
  char internal[128];
};

// PyTorch 2.1, the oldest that hvd_backup works with, comes with this one. It has all that is used here.
constexpr int oldest_version = 21800;

constexpr int unset = INT_MIN;

// ncclConfig_t as it was in the oldest version: later ones have more at its end, and leave what `version` did not know
// of as it is by default.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = oldest_version;
  int blocking = 0;
  int cga_cluster_size = unset;
  int min_ctas = unset;
  int max_ctas = unset;
  const char* net_name = nullptr;
  int split_share = unset;
};

std::string text_of(int version) {  // 23203 is 2.32.3, and before 2.9, 2804 is 2.8.4
  const int major = version < 10000 ? version / 1000 : version / 10000;
  const int minor = version < 10000 ? version / 100 % 10 : version / 100 % 100;
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(version % 100);
}

}  // namespace

struct NcclFunctions {
  Result (*get_version)(int* version);
  Result (*get_unique_id)(UniqueId* id);
  Result (*comm_init_rank_config)(void** comm, int members, UniqueId id, int member, Config* config);
  Result (*comm_get_async_error)(void* comm, Result* state);
  Result (*comm_abort)(void* comm);
  Result (*group_start)();
  Result (*group_end)();
  Result (*send)(const void* data, std::size_t count, int type, int peer, void* comm, void* stream);
  Result (*receive)(void* data, std::size_t count, int type, int peer, void* comm, void* stream);
  const char* (*get_error_string)(Result result);
  const char* (*get_last_error)(void* comm);

  // NCCL's words for a result, with what it has noted besides, which says more.
  std::string words(Result result, void* comm) const {
    std::string text = get_error_string(result);
    const char* more = get_last_error(comm);
    if (more != nullptr && *more != '\0') text.append(": ").append(more);
    return text;
  }
};

namespace {

bool has_begun(Result result) { return result == success || result == in_progress; }

class NcclGroup final : public DeviceGroup {
 public:
  NcclGroup(std::shared_ptr<const NcclFunctions> nccl, const std::string& group, int member, int members, void* stream)
      : nccl_(std::move(nccl)), stream_(stream) {
    UniqueId id;
    if (group.size() != sizeof id.internal) {
      throw UsageError("a group is named by " + std::to_string(sizeof id.internal) +
                       " bytes from new_group(), not by " + std::to_string(group.size()));
    }
    std::memcpy(id.internal, group.data(), sizeof id.internal);
    Config config;
    const Result result = nccl_->comm_init_rank_config(&comm_, members, id, member, &config);
    if (!has_begun(result)) fail(result);
  }
  ~NcclGroup() override { abort(); }
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  State state() override {
    if (state_ == State::failed) return state_;
    Result now = success;
    const Result asked = nccl_->comm_get_async_error(comm_, &now);
    if (asked != success) {
      fail(asked);
    } else if (!has_begun(now)) {
      fail(now);
    } else {
      state_ = now == success ? State::ready : State::busy;
      is_formed_ = is_formed_ || now == success;
    }
    return state_;
  }

  std::string reason() const override { return reason_; }

  void exchange(std::span<const Part> parts) override {
    if (state_ != State::ready) {
      throw RuntimeFailure("an exchange between GPUs in a group that " +
                           (state_ == State::failed ? "has failed: " + reason_ : "is busy: wait for state() first"));
    }
    state_ = State::busy;
    Result result = nccl_->group_start();
    if (result != success) return fail(result);
    for (const Part& part : parts) {
      result = part.is_send ? nccl_->send(part.data, part.bytes, bytes, part.peer, comm_, stream_)
                            : nccl_->receive(part.data, part.bytes, bytes, part.peer, comm_, stream_);
      if (!has_begun(result)) break;
    }
    const Result ended = nccl_->group_end();  // also after an error: NCCL has one group open for this thread
    if (!has_begun(result)) return fail(result);
    if (!has_begun(ended)) fail(ended);
  }

  void abort() override {
    // NCCL ends what is in progress, too. Its answer would change nothing.
    if (comm_ != nullptr) nccl_->comm_abort(std::exchange(comm_, nullptr));
    if (state_ == State::failed) return;
    state_ = State::failed;
    reason_ = "the group was ended on this rank";
  }

 private:
  void fail(Result result) {
    state_ = State::failed;
    reason_ = std::string("NCCL: ") + (is_formed_ ? "exchanging data" : "forming a group") + ": " +
              nccl_->words(result, comm_);
  }

  std::shared_ptr<const NcclFunctions> nccl_;
  void* stream_;
  void* comm_ = nullptr;
  State state_ = State::busy;
  bool is_formed_ = false;
  std::string reason_;
};

// The functions of a library by their names; then, whether all were there.
class Lookup {
 public:
  explicit Lookup(void* library) : library_(library) {}

  template <class Function>
  void find(const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library_, name));
    if (function == nullptr && missing_.empty()) missing_ = name;
  }
  const std::string& missing() const { return missing_; }  // the first one

 private:
  void* library_;
  std::string missing_;
};

}  // namespace

Nccl::Nccl(const std::vector<std::string>& libraries) {
  void* library = nullptr;
  std::string from, tried;
  for (const std::string& name : libraries) {
    from = name;
    if ((library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) != nullptr) break;
    tried.append(tried.empty() ? ": " : "; ").append(dlerror());
  }
  if (library == nullptr) {
    why_not_ = "NCCL cannot be loaded" + tried;
    return;
  }
  const std::string needed = "NCCL " + text_of(oldest_version) + " or later is needed";
  auto nccl = std::make_shared<NcclFunctions>();
  Lookup lookup(library);
  lookup.find("ncclGetVersion", nccl->get_version);
  if (lookup.missing().empty()) {
    int version = 0;
    if (nccl->get_version(&version) == success) version_ = text_of(version);
    if (version < oldest_version) {
      why_not_ = from + " is NCCL " + text_of(version) + ": " + needed;
      return;
    }
  }
  lookup.find("ncclGetUniqueId", nccl->get_unique_id);
  lookup.find("ncclCommInitRankConfig", nccl->comm_init_rank_config);
  lookup.find("ncclCommGetAsyncError", nccl->comm_get_async_error);
  lookup.find("ncclCommAbort", nccl->comm_abort);
  lookup.find("ncclGroupStart", nccl->group_start);
  lookup.find("ncclGroupEnd", nccl->group_end);
  lookup.find("ncclSend", nccl->send);
  lookup.find("ncclRecv", nccl->receive);
  lookup.find("ncclGetErrorString", nccl->get_error_string);
  lookup.find("ncclGetLastError", nccl->get_last_error);
  if (!lookup.missing().empty()) {
    why_not_ = from + " has no function " + lookup.missing() + ": " + needed;
    return;
  }
  functions_ = std::move(nccl);
}

std::string Nccl::new_group() const {
  UniqueId id;
  const Result result = functions_->get_unique_id(&id);
  if (result != success) throw RuntimeFailure("NCCL: naming a group: " + functions_->words(result, nullptr));
  return std::string(id.internal, sizeof id.internal);
}

std::unique_ptr<DeviceGroup> Nccl::join(const std::string& group, int member, int members, void* stream) const {
  return std::make_unique<NcclGroup>(functions_, group, member, members, stream);
}

}  // namespace hvd_backup::gpu
