/* The C API of the core, the only public header. Bindings of any language and framework stand on it.
 *
 * Every function returns HVDB_OK or another status, and leaves the reason in hvdb_last_error(), which belongs to the
 * calling thread. Handles are opaque. Functions that wait take a timeout in microseconds and return HVDB_TIMEOUT when
 * it has passed: call again (a binding looks for Ctrl-C in between). Strings are UTF-8 and end with 0; blobs have a
 * length.
 *
 * Threads: an engine may be called from any thread; one channel by one thread at a time. Buffers: the caller's. A
 * contribution stays unchanged, and contribution and result stay alive, from hvdb_submit() until hvdb_wait() has
 * returned the outcome of that step, or hvdb_close() or hvdb_shut_down() has returned HVDB_OK.
 */
#ifndef HVD_BACKUP_H
#define HVD_BACKUP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  HVDB_OK = 0,
  HVDB_TIMEOUT = 1,     /* not yet; nothing has changed */
  HVDB_USAGE_ERROR = 2, /* the caller did something wrong; nothing has changed */
  HVDB_FAILURE = 3      /* MPI, another rank, or this channel has failed for good */
} hvdb_status;

typedef enum {
  HVDB_FLOAT16 = 0,
  HVDB_BFLOAT16 = 1,
  HVDB_FLOAT32 = 2,
  HVDB_FLOAT64 = 3,
  HVDB_INT32 = 4,
  HVDB_INT64 = 5
} hvdb_dtype;

typedef enum { HVDB_TRAINING = 0, HVDB_COLLECTIVE = 1 } hvdb_kind;

typedef struct hvdb_hub hvdb_hub;         /* connects engines inside one process */
typedef struct hvdb_engine hvdb_engine;   /* one for each rank; owns one thread */
typedef struct hvdb_channel hvdb_channel; /* one stream of updates; owned by its engine */
typedef struct hvdb_update hvdb_update;

const char* hvdb_last_error(void);

/* --- engines --- */

/* takes_device_memory: 1 for tests in which host memory stands for a GPU's; otherwise 0. */
hvdb_status hvdb_hub_create(int size, int takes_device_memory, hvdb_hub** hub);
void hvdb_hub_destroy(hvdb_hub* hub);

/* What rank 0 does besides its work. */
typedef struct {
  const char* trace;      /* file for the coordinator's records as JSON lines (docs/trace.md); NULL or "": none */
  const char* timeline;   /* file for the same as a Chrome trace */
  int64_t stall_check_us; /* after so long without progress a warning says who waits for whom; 0: never */
  int host_for_device;    /* 1: for tests with MPI in which host memory stands for a GPU's; the same on all ranks */
} hvdb_settings;

/* mpi_comm: address of an MPI_Comm; it is duplicated (collective over it), never used. MPI must have been initialised
 * with MPI_THREAD_MULTIPLE; shut the engine down before MPI_Finalize. settings: NULL: none. */
hvdb_status hvdb_engine_create_mpi(const void* mpi_comm, const hvdb_settings* settings, hvdb_engine** engine);
hvdb_status hvdb_engine_create_in_process(hvdb_hub* hub, int rank, const hvdb_settings* settings, hvdb_engine** engine);
/* Ends the thread at once if it runs. The channels of the engine die with it. In a forked child: does nothing. */
void hvdb_engine_destroy(hvdb_engine* engine);
int hvdb_rank(const hvdb_engine* engine);
int hvdb_size(const hvdb_engine* engine);
/* Repeats a recorded run, on rank 0, before any rank opens a channel: its channels with their descriptions, and then of
 * each, in the order of the recording, decisions, gradients that were dropped, and ends of rounds. Channels that are
 * not named decide by themselves. */
hvdb_status hvdb_replay_channel(hvdb_engine* engine, const char* channel, const char* description);
hvdb_status hvdb_replay_decision(hvdb_engine* engine, const char* channel, int64_t step, int scope, int required,
                                 int contributors, const int32_t* ranks, const double* weights, const void* metadata,
                                 size_t metadata_size);
hvdb_status hvdb_replay_drop(hvdb_engine* engine, const char* channel, int64_t step, int scope, int rank);
hvdb_status hvdb_replay_round_end(hvdb_engine* engine, const char* channel, int64_t step);
/* What the coordinator has recorded of each channel's newest `last` steps, within a bound, as a trace file would have
 * it; on other ranks than 0 "". Valid until the next call with this engine. */
hvdb_status hvdb_recorded(hvdb_engine* engine, int64_t last, const char** text);

/* The GPU of this rank, once, before channels with buckets on it are opened. device: address of a hvd_backup::Device
 * (device/device.h) of the same build, which must outlive the engine. means: by which data go from GPU to GPU: "nccl",
 * or "mpi" where hvdb_takes_device_memory. journal_on_device: what was summed there is kept for late ranks on the GPU;
 * otherwise in page-locked host memory. */
hvdb_status hvdb_use_device(hvdb_engine* engine, void* device, const char* means, int journal_on_device);
/* Whether MPI has said on all ranks, when the engine was made, that it takes GPU memory (is CUDA-aware). */
int hvdb_takes_device_memory(const hvdb_engine* engine);

/* Whether the others can go on when a process dies (MPI with ULFM). */
int hvdb_survives_losses(const hvdb_engine* engine);
/* Whose process has died so far, in the order in which rank 0 has noticed: the first `most` of them. Every rank knows
 * of a loss before it sees anything that was decided without the lost rank. */
hvdb_status hvdb_lost(hvdb_engine* engine, int most, int32_t* ranks, int* count);

/* This rank enters a full collective: until its next submission, it is not counted on by collective channels that need
 * fewer than all ranks. */
hvdb_status hvdb_pause(hvdb_engine* engine);
/* Contributes nothing more until all ranks have joined; then hvdb_joined gives the last to join. */
hvdb_status hvdb_join(hvdb_engine* engine);
hvdb_status hvdb_joined(hvdb_engine* engine, int64_t timeout_us, int* last_rank);
/* This rank leaves for good, and goes on serving the others until all have left: then hvdb_shut_down returns HVDB_OK.
 * failure: why, if because of an error; NULL or "" otherwise. */
hvdb_status hvdb_leave_for_good(hvdb_engine* engine, const char* failure);
hvdb_status hvdb_shut_down(hvdb_engine* engine, int64_t timeout_us);

/* --- channels --- */

typedef struct {
  const char* name; /* the same on all ranks */
  hvdb_kind kind;
  const char* description; /* must be equal on all ranks, line by line */
  const void* proposal;    /* of the first rank to open it: see hvdb_proposal */
  size_t proposal_size;
  int required;       /* N: contributors waited for */
  int64_t grace_us;   /* who comes within this time after the N-th still counts */
  int max_misses;     /* a rank left out so many times in a row is waited for; 0: off */
  int64_t max_lag;    /* updates that the journal holds for ranks that are behind */
  int resync;         /* beyond that a rank takes over the state of another one; otherwise the others wait for it */
  int automatic;      /* N is chosen from step to step (gradient noise, computing times), never below `required` */
  int arrive_first;   /* arrive with the first bucket of a scope that is ready; otherwise with the last */
  int drop_nonfinite; /* gradients (hvdb_measure) with NaN or infinity count as late; not with arrive_first */
  int wait_for_all;   /* open only when all ranks have asked */
  int average;        /* results are means weighted by samples; otherwise sums. Integers: sums */
  int on_device;      /* some buckets are on the GPU, see hvdb_use_device */
} hvdb_channel_spec;

hvdb_status hvdb_open(hvdb_engine* engine, const hvdb_channel_spec* spec, hvdb_channel** channel);
hvdb_status hvdb_opened(hvdb_channel* channel, int64_t timeout_us);
/* Valid once opened, as long as the engine lives. */
hvdb_status hvdb_proposal(hvdb_channel* channel, const void** data, size_t* size);
/* Once, before the first begin. scopes: for each bucket, its unit of decision, numbered from 0. on_device: whether it
 * is on the GPU; NULL: none is. */
hvdb_status hvdb_set_layout(hvdb_channel* channel, int buckets, const uint64_t* counts, const int* dtypes,
                            const int* scopes, const int* on_device);
/* Where missed updates go when nothing is submitted: one buffer for each bucket. */
hvdb_status hvdb_set_results(hvdb_channel* channel, int buckets, void* const* results);
/* The first so many buckets hold gradients. While rank 0 writes a trace, the squared norms of the contributions to them
 * and of the results are put on record, computed in the pass that sums. The same on all ranks. */
hvdb_status hvdb_measure(hvdb_channel* channel, int buckets);

hvdb_status hvdb_begin(hvdb_channel* channel, double samples, const void* metadata, size_t metadata_size);
/* wait_follows: this thread calls hvdb_wait at once, so that nobody else need be told. */
hvdb_status hvdb_submit(hvdb_channel* channel, int bucket, const void* contribution, void* result, int wait_follows);
/* The same for a bucket on the GPU, whose contribution is made by what was begun on `stream` until now. contribution
 * and result, in host memory (page-locked), are what it goes through where GPUs cannot exchange data directly. The
 * result of an update that this rank has contributed to (hvdb_update_contributed) is on the GPU, that of others in host
 * memory. finite: with drop_nonfinite, whether the contribution holds neither NaN nor infinity. */
hvdb_status hvdb_submit_on_device(hvdb_channel* channel, int bucket, const void* contribution, void* result,
                                  const void* device_contribution, void* device_result, void* stream, int finite,
                                  int wait_follows);
/* update may be NULL: then HVDB_OK says that there is one to take. */
hvdb_status hvdb_wait(hvdb_channel* channel, int64_t timeout_us, hvdb_update** update);
/* To be called between two hvdb_wait of one step by a thread that does nothing else, once it has waited for long: when
 * all ranks wait, but in different collectives, these fail on all of them. */
hvdb_status hvdb_announce_waiting(hvdb_channel* channel);
/* After hvdb_hold, updates that this rank has contributed to may be changed in the result buffers, in the same way by
 * all contributors, until hvdb_commit; late ranks get what is there then. Before the first begin, on all ranks alike;
 * not with more than one scope. */
hvdb_status hvdb_hold(hvdb_channel* channel);
hvdb_status hvdb_commit(hvdb_channel* channel);
hvdb_status hvdb_begin_round(hvdb_channel* channel, int64_t length, int64_t align_every);
hvdb_status hvdb_away(hvdb_channel* channel);
hvdb_status hvdb_leave(hvdb_channel* channel);
/* Between two updates of this channel: keeps a copy of this rank's state, which is these parts one after the other, for
 * ranks beyond the journal. To be called after hvdb_wait has given HVDB_OFFER, for each channel of this thread of whose
 * hvdb_view says that it is wanted. */
hvdb_status hvdb_offer_state(hvdb_channel* channel, int parts, const void* const* data, const uint64_t* sizes);
/* After hvdb_wait has given HVDB_RESYNC: what another rank has offered; valid until the next hvdb_wait. */
hvdb_status hvdb_state(hvdb_channel* channel, const void** data, uint64_t* size);
/* HVDB_OK: the buffers of this channel are not touched any more. */
hvdb_status hvdb_close(hvdb_channel* channel, int64_t timeout_us);

typedef struct {
  int64_t step;      /* updates taken */
  int64_t round_end; /* -1: not known */
  int round_over;
  int64_t contributed, dropped, caught_up, resynced; /* updates so far */
  uint64_t journal_bytes;
  int64_t round_start;      /* the step at which this rank's round has begun */
  int state_wanted;         /* this rank's state: see hvdb_offer_state */
  int state_wanted_at_exit; /* the same, if this rank leaves for good now */
} hvdb_channel_view;
hvdb_status hvdb_view(hvdb_channel* channel, hvdb_channel_view* view);

/* --- updates --- */

/* HVDB_OFFER: nothing has changed, but the state of this rank is wanted, see hvdb_offer_state; call hvdb_wait again.
 * HVDB_RESYNC: this rank is beyond the journal, and hvdb_state gives what to take over; then hvdb_update_step updates
 * are applied; call hvdb_wait again. Both only with hvdb_channel_spec.resync. */
typedef enum { HVDB_UPDATE = 0, HVDB_RESUME = 1, HVDB_OVER = 2, HVDB_OFFER = 3, HVDB_RESYNC = 4 } hvdb_update_kind;
hvdb_update_kind hvdb_update_get_kind(const hvdb_update* update);
int64_t hvdb_update_step(const hvdb_update* update);
int hvdb_update_contributed(const hvdb_update* update);
double hvdb_update_samples(const hvdb_update* update);
int hvdb_update_required(const hvdb_update* update); /* N, when it was decided */
int hvdb_update_scopes(const hvdb_update* update);
/* The contributors of a scope, ascending; valid as long as the update. */
const int32_t* hvdb_update_contributors(const hvdb_update* update, int scope, int* count);
const void* hvdb_update_metadata(const hvdb_update* update, size_t* size);
void hvdb_update_destroy(hvdb_update* update);

/* --- for checks and tests --- */

hvdb_status hvdb_weighted_sum(int dtype, void* destination, int sources, const void* const* source,
                              const double* weights, double scale, uint64_t count);
/* How long an update would take with `required` contributors, given how long each rank computes each step (us: ranks
 * side by side, step after step). contributed: by rank, the share of updates that it is part of. */
hvdb_status hvdb_forecast(const double* us, uint64_t steps, int ranks, int required, double tail_us, double catch_up_us,
                          int carry_over, double* update_us, double* contributed);
const char* hvdb_kernel_instruction_set(void);
const char* hvdb_mpi_library_version(void);
const char* hvdb_mpi_built_with(void);

/* --- for bindings in libraries of their own --- */

/* What a step needs, by pointer: a library that is loaded beside the one with the core (TensorFlow's ops) gets this
 * table from it and so links no second core. abi: HVDB_FUNCTIONS_ABI of the core; it changes with this struct. */
#define HVDB_FUNCTIONS_ABI 2
typedef struct {
  int abi;
  const char* (*last_error)(void);
  hvdb_status (*begin)(hvdb_channel*, double, const void*, size_t);
  hvdb_status (*submit)(hvdb_channel*, int, const void*, void*, int);
  hvdb_status (*submit_on_device)(hvdb_channel*, int, const void*, void*, const void*, void*, void*, int, int);
  hvdb_status (*wait)(hvdb_channel*, int64_t, hvdb_update**);
  hvdb_update_kind (*update_get_kind)(const hvdb_update*);
  int64_t (*update_step)(const hvdb_update*);
  int (*update_contributed)(const hvdb_update*);
  double (*update_samples)(const hvdb_update*);
  int (*update_required)(const hvdb_update*);
  int (*update_scopes)(const hvdb_update*);
  const int32_t* (*update_contributors)(const hvdb_update*, int, int*);
  const void* (*update_metadata)(const hvdb_update*, size_t*);
  void (*update_destroy)(hvdb_update*);
} hvdb_functions;
const hvdb_functions* hvdb_function_table(void);

#ifdef __cplusplus
}
#endif

#endif
