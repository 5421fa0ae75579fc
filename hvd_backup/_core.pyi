"""The native core: one engine thread per process, channels of updates. Typed face of csrc/bindings/python.cpp.

Every blocking call here releases the GIL, answers Ctrl-C, and raises `CoreError` once the engine has failed (the text
names rank, step and peer). Wrong use raises `CoreUsageError` at once. Both derive from `RuntimeError`.
"""

from typing import Any

class CoreError(RuntimeError): ...
class CoreUsageError(CoreError): ...

class Hub:
    """Connects `size` engines inside one process, each run by its own thread (tests, and trying things out)."""

    def __init__(self, size: int, takes_device_memory: bool = False) -> None:
        """takes_device_memory: host memory stands for a GPU's."""

class Engine:
    @staticmethod
    def over_mpi(
        comm: int, trace: str = "", timeline: str = "", stall_check_us: int = 0, host_for_device: bool = False
    ) -> Engine:
        """Collective over the MPI communicator whose `MPI_Comm` lies at address `comm`; it is duplicated, never used.

        trace, timeline: files to which rank 0 writes what its coordinator records: as JSON lines (docs/trace.md), and
        as a Chrome trace; empty: none. stall_check_us: after so many microseconds without progress rank 0 says who
        waits for whom; 0: never. host_for_device: for tests in which host memory stands for a GPU's, the same on all
        ranks.
        """

    @staticmethod
    def in_process(hub: Hub, rank: int, trace: str = "", timeline: str = "", stall_check_us: int = 0) -> Engine: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def survives_losses(self) -> bool:
        """Whether the others can go on when a process dies (MPI with ULFM)."""
    @property
    def lost(self) -> list[int]:
        """The ranks whose processes have died, in the order in which rank 0 has noticed."""
    def open(
        self,
        name: str,
        kind: str,
        description: str,
        proposal: bytes,
        required: int,
        grace_us: int = 0,
        max_misses: int = 0,
        max_lag: int = 64,
        arrive: str = "first",
        wait_for_all: bool = False,
        average: bool = True,
        automatic: bool = False,
        drop_nonfinite: bool = False,
        resync: bool = False,
        on_device: bool = False,
    ) -> Channel:
        """Opens the channel `name`, the same on all ranks.

        kind: "training" (a late rank skips to the newest step) or "collective" (the k-th call is the k-th collective).
        description: lines that must be equal on all ranks; the first difference is the error, raised on every rank.
        proposal: any bytes; the channel keeps those of the lowest rank among the first to open (see Channel.proposal).
        required: N, contributors waited for. grace_us, max_misses (0: off), max_lag: as in the design.
        arrive: "first" or "last" bucket of a scope.
        average: results are means over the contributors, weighted by samples; otherwise sums. Integers: sums.
        automatic: N is chosen from step to step (csrc/control/required_chooser.h), and never below `required`.
        drop_nonfinite: with arrive="last": gradients (Channel.measure) that hold NaN or infinity count as late.
        resync: beyond max_lag a rank takes over the state of another one; otherwise the others wait for it.
        on_device: some buckets are on the GPU that the engine uses; not with drop_nonfinite.
        wait_for_all: return only when all ranks have opened it (so that differences are found before the first step).
        """

    def use_device(self, device: Any, means: str = "nccl", journal_on_device: bool = False) -> None:
        """The GPU of this rank (a `_gpu.Device`), once, before a channel with buckets on it is opened.

        means: by which data go from GPU to GPU: "nccl", or "mpi" where takes_device_memory.
        journal_on_device: what was summed there is kept for late ranks there; otherwise in page-locked memory.
        """

    @property
    def takes_device_memory(self) -> bool:
        """Whether MPI says on all ranks that it takes GPU memory (is CUDA-aware)."""

    @property
    def device(self) -> Any:
        """The one in use, or None."""

    def replay_channel(self, channel: str, description: str) -> None:
        """Rank 0 only, before any rank opens a channel: `channel` is to repeat the decisions given below, in order."""

    def replay_decision(
        self,
        channel: str,
        step: int,
        scope: int,
        required: int,
        ranks: list[int],
        weights: list[float],
        metadata: bytes,
    ) -> None: ...
    def replay_drop(self, channel: str, step: int, scope: int, rank: int) -> None:
        """The gradient of `rank` for this step was not used."""

    def replay_round_end(self, channel: str, step: int) -> None: ...
    def recorded(self, last: int) -> str:
        """What was recorded of each channel's newest `last` steps, as a trace has it; on other ranks than 0 empty."""

    def away(self) -> None:
        """This rank enters a full collective: until its next submission it does not count as able to contribute to
        channels of kind "collective" with required < size. Returns at once."""

    def join(self) -> None:
        """Contributes nothing more until every rank has joined; says so and returns."""
    def joined(self) -> int:
        """Waits until every rank has joined; returns the last one."""

    def shutdown(self, failure: str = "") -> None:
        """Says that this rank leaves for good, goes on serving the others, and returns when all have left.

        failure: why, when it leaves because of an error; channels with required == size then fail on the others.
        """

class Channel:
    @property
    def address(self) -> int:
        """Of the hvdb_channel, for bindings in libraries of their own; valid as long as this object lives."""

    @property
    def proposal(self) -> bytes: ...
    def set_layout(self, buckets: list[tuple[int, str]], scopes: list[int], on_device: list[bool] = ...) -> None:
        """buckets: (elements, dtype name) of each. scopes: for each bucket its scope, ascending from 0.

        dtype: "float16", "bfloat16", "float32", "float64", "int32", "int64". Once, before the first begin().
        """

    @property
    def step(self) -> int:
        """The number of updates that this rank has taken: the step whose gradient it computes now."""

    @property
    def round_start(self) -> int:
        """The step at which this rank's round has begun."""

    @property
    def round_end(self) -> int | None:
        """The step at which the current round ends, as far as this rank knows; None when unknown."""

    @property
    def round_over(self) -> bool:
        """This rank has been told that its round is over (gradients are dropped until the next round begins)."""

    def begin(self, samples: float, metadata: bytes) -> None:
        """Opens this rank's contribution to update `step`. metadata travels with the decision (hyperparameters)."""

    def submit(self, bucket: int, contribution: int, result: int, wait_follows: bool = False) -> None:
        """Hands over a bucket by address.

        contribution: unchanged until wait() has returned; result: another buffer; wait_follows: this thread calls
        wait() at once, so the engine thread need not be woken.
        """

    def submit_on_device(
        self,
        bucket: int,
        contribution: int,
        result: int,
        device_contribution: int,
        device_result: int,
        stream: int,
        finite: bool = True,
    ) -> None:
        """The same for a bucket on the GPU, made by what was begun on `stream` (a cudaStream_t) until now.

        finite: with drop_nonfinite, whether the contribution holds neither NaN nor infinity.
        contribution, result: page-locked host memory, through which it goes where GPUs cannot exchange data directly,
        and where missed updates come. In an update that this rank has contributed to, the result is on the GPU.
        """

    def hold(self) -> None:
        """From now on result buffers may be changed between wait() and commit(), by all contributors alike.

        Late ranks get what is there at commit(). Before the first begin(), on all ranks; not with several scopes.
        """

    def commit(self) -> None:
        """After hold(): the update that wait() gave stays as it is now."""

    def set_results(self, results: list[int]) -> None:
        """Addresses into which missed updates are written when this rank has nothing submitted; one per bucket."""

    def measure(self, buckets: int) -> None:
        """The first `buckets` buckets hold gradients: while there is a trace, their squared norms are put on record.

        The same on all ranks.
        """

    def wait(self) -> Update:
        """The next thing to do; blocks. See Update.kind. Taking an update acknowledges the one before."""

    def poll(self) -> bool:
        """Whether wait() would return at once."""

    @property
    def state_wanted(self) -> bool:
        """A rank beyond the journal needs the state of this one: `offer_state`, as soon as no update is half applied.

        When wait() says "offer", it may be that of another channel.
        """

    @property
    def state_wanted_at_exit(self) -> bool:
        """The same; or some rank will need it when this one has left."""

    def offer_state(self, parts: list[tuple[int, int]]) -> None:
        """Keeps a copy of this rank's state for others.

        parts: (address, bytes), one after the other; read before this returns. No update may be half applied.
        """

    def state(self) -> tuple[int, int]:
        """Address and size of what another rank has offered, after wait() has said "resync"; until the next wait()."""

    def begin_round(self, length: int, align_every: int) -> None:
        """Starts a followed round of `length` steps from here (-1: unknown). align_every: 0 or k."""

    def away(self) -> None:
        """This rank's data has ended: it will not contribute until the round is over; it must go on calling wait()."""

    def leave(self) -> None:
        """Ends the round (the first to do so) or joins its end; then call wait() until it says "over"."""

    def counters(self) -> dict[str, int]:
        """contributed, dropped, caught_up, resynced: updates of this channel on this rank so far."""

    def journal_bytes(self) -> int:
        """Memory that is kept here for ranks that are behind."""

class Update:
    @property
    def kind(self) -> str:
        """What wait() has found.

        "update": update `step` lies in the result buffers: apply it. If not `contributed`, call wait() again.
        "resume": nothing more is missing here: compute the next gradient.
        "over": the round is over and this rank has all of its updates; a submitted gradient was dropped.
        "offer": nothing has changed, but a rank beyond the journal needs the state of this one: offer it
            (`Channel.state_wanted`), and call wait() again.
        "resync": this rank is beyond the journal: take over `Channel.state()`, after which `step` updates are applied,
            and call wait() again. These two only with `resync`.
        """

    @property
    def step(self) -> int: ...
    @property
    def contributors(self) -> list[list[int]]:
        """For each scope, the ranks whose gradients it holds, ascending."""

    @property
    def contributed(self) -> bool:
        """This rank is a contributor of every scope."""

    @property
    def samples(self) -> float:
        """Sum of the contributors' samples, in scope 0."""

    @property
    def required(self) -> int:
        """N, when the update was decided."""

    @property
    def metadata(self) -> bytes:
        """Of the lowest contributor, in scope 0."""

def weighted_sum(
    dtype: str, destination: int, sources: list[int], weights: list[float], scale: float, count: int
) -> None: ...
def forecast(
    computing_us: int,
    steps: int,
    ranks: int,
    required: int,
    tail_us: float = 0.0,
    catch_up_us: float = 0.0,
    carry_over: bool = True,
) -> tuple[float, list[float]]:
    """What an update would take with `required` contributors: csrc/control/forecast.h.

    computing_us: address of a float64 array [steps, ranks].

    Returns (microseconds per update, share of the updates that each rank is part of).
    """

def kernel_instruction_set() -> str: ...
def mpi_library_version() -> str:
    """The version text of the MPI library that this module runs with."""

def mpi_built_with() -> str:
    """The version text of the MPI library that this module was built with, its first line."""

def function_table() -> int:
    """Address of the hvdb_functions of csrc/api/hvd_backup.h, for bindings in libraries of their own."""
