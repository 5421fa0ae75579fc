"""The process-wide context: what init() makes and shutdown() ends. Everything else asks `current()` for it.

It owns the engine, a communicator of our own for the collectives of the training thread, the configuration, and the
list of optimizers that have to be asked before all ranks meet. MPI comes from mpi4py; the user's communicator is
duplicated and never used. However the program ends, the engine leaves before MPI is finalised: by shutdown(), at the
exit of the interpreter, or when somebody else ends MPI (through an attribute of MPI.COMM_SELF, which MPI deletes first
of all). Meant for one thread, the training thread, with one exception: a Horovod that has initialised MPI finalises it
in a thread of its own, on all ranks, as soon as one rank has shut it down. Hence the care in `Context.close`.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hvd_backup import _core, faults, launch_check, replay, stragglers, trace
from hvd_backup.config import Config
from hvd_backup.errors import ConfigError, HvdBackupError, NotInitializedError, UsageError
from hvd_backup.first_n import Collectives
from hvd_backup.policy import Policy
from hvd_backup.rendezvous import Rendezvous
from hvd_backup.survivors import Survivors

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Context", "Participant", "current", "init", "is_initialized", "shutdown", "straggler_report"]

MOST_REPORTED = 1 << 62  # steps: all that there are
MOST_SUMMARISED = 5000  # updates: a fraction of a second at the end of a run
LEAST_SUMMARISED = 10  # what is shorter was only tried out
POLL_S = 0.0005  # while others train and this rank has joined
PATIENCE_S = 10.0  # for ranks that have left and have nothing to do any more but say so

_log = logging.getLogger("hvd_backup")


class Participant(Protocol):
    """An optimizer, as the collectives of all ranks see it."""

    backup_workers: int
    number: int  # in the order in which all ranks have made them

    def usable(self) -> bool:
        """Whether no exception has torn it."""

    def in_followed_round(self) -> bool:
        """Whether `follow` ties this rank's place in the data to the optimizer's steps right now."""

    def aligned(self) -> bool:
        """Whether all ranks meet at this step (`follow(..., align_every=k)`)."""

    def leave_round(self, what: str) -> None:
        """Ends the optimizer's round, because this rank enters `what`. Not called within a followed round."""

    def begin_join(self) -> None:
        """This rank is about to join: it contributes nothing more until all ranks have joined."""

    def serve(self, leaving: bool = False) -> None:
        """Makes a copy of the state for ranks beyond the journal, if it is wanted."""

    def finish_round(self, wait: bool) -> bool:
        """Applies the updates of the others; whether the round is over, as it is when all have joined."""


class Context:
    """One init()'s worth of everything. Use `current()`; do not construct it.

    Attributes:
        rank, size: of this process, among all.
        local_rank, local_size: among the processes that share its memory (its node).
        cross_rank, cross_size: among the processes with the same local rank, one for each node.
        is_homogeneous: whether all nodes have as many processes.
        comm: communicator of our own, of all ranks that have begun; see `full_collective` for those that are left.
        engine: the native engine.
        collectives: first_n_allreduce and allreduce, on addresses.
        config: the options, as the environment gave them.
        requested_comm: what init() was given, for Horovod's init().
        before_close: called before this rank leaves: what runs beside the engine is ended first.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        config: Config,
        requested_comm: Any = None,
        recorded: trace.Recording | None = None,
    ) -> None:
        """recorded: on rank 0, the run whose decisions are to be made again."""
        from mpi4py import MPI

        self.requested_comm = requested_comm
        self.before_close: list[Callable[[], object]] = []
        self.comm = comm
        self.config = config
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        local = comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        cross = comm.Split(color=self.local_rank, key=self.rank)
        self.cross_rank, self.cross_size = cross.Get_rank(), cross.Get_size()
        cross.Free()
        local.Free()
        self.is_homogeneous = len(set(comm.allgather(self.local_size))) == 1
        self.engine = _core.Engine.over_mpi(
            MPI._addressof(comm), config.trace, config.timeline, round(config.stall_check * 1e6)
        )
        if recorded is not None:
            replay.instruct(self.engine, recorded)
        comm.Barrier()  # nobody opens a channel before rank 0 knows what to decide
        self.collectives = Collectives(self.engine, config.journal_bytes, self.check_process)
        self._survivors = Survivors(comm, self.engine.survives_losses)
        self._rendezvous = Rendezvous(self.collectives, self._survivors, lambda: self.engine.lost)
        self._participants: weakref.WeakSet[Any] = weakref.WeakSet()
        self._process = os.getpid()

    @property
    def default_backup_workers(self) -> int:
        """What the environment says about backup workers, as a number of ranks."""
        policy = Policy.resolve(self.config, self.size)
        return 0 if policy.automatic else policy.backup_workers  # "auto" is for training

    def register(self, participant: Participant) -> None:
        """From now on `participant` is asked before all ranks meet. Only a weak reference is kept."""
        self._participants.add(participant)

    def any_backup_workers(self) -> bool:
        """Whether an optimizer of this program has backup workers."""
        return any(participant.backup_workers > 0 for participant in list(self._participants))

    def before_full_collective(self, what: str) -> None:
        """Ends the rounds of all optimizers, because this rank enters `what`, in which all ranks must take part.

        Raises:
            UsageError: an optimizer with backup workers is inside a followed loop, where ranks skip batches and so
                would call `what` unequally often.
        """
        if not self._participants:
            return
        self._refuse_within_loop(what)
        participants: list[Participant] = list(self._participants)
        for participant in participants:
            if not participant.in_followed_round():
                participant.leave_round(what)

    def _refuse_within_loop(self, what: str) -> None:
        participants: list[Participant] = list(self._participants)
        for participant in participants:
            if participant.in_followed_round() and participant.backup_workers > 0 and not participant.aligned():
                raise UsageError(
                    f"{what} inside a loop over follow() with backup workers: a rank that is late skips batches, so "
                    "the ranks would call it unequally often and hang. For values of every step use "
                    "optimizer.metrics(...) before step(); to meet at every k-th step (evaluation, checkpoints) use "
                    "follow(..., align_every=k), and call it only there; or call it after the loop"
                )

    def full_collective(self, what: str) -> Survivors:
        """To be called at the start of every collective of MPI: returns when all ranks are in the same one.

            with here.full_collective(f"allgather({...})") as left:
                left.comm.allgather(...)

        Args:
            what: names the collective with all that must be equal on all ranks, as "barrier()".

        Returns:
            The ranks that are left: where MPI survives the death of a process, not always all.

        Raises:
            UsageError: on every rank, when the ranks do not mean the same collective; or as `before_full_collective`.
            HvdBackupError: a rank has left the program.
        """
        self.check_process()
        self.before_full_collective(what)
        return self._rendezvous.meet(what)

    def check_process(self) -> None:
        """Raises UsageError in a forked child: there is no engine thread, so whatever waits for it waits for ever."""
        if self._process != os.getpid():
            raise UsageError(
                "hvd_backup was used in a process that was forked after init(): it has no part in the training. Use it "
                "in the process that called init() alone; data loaders and other helpers must not call it"
            )

    def root(self, root_rank: Any) -> int:
        """`root_rank` of a broadcast, checked."""
        try:
            root = operator.index(root_rank)
        except TypeError:
            root = -1
        if not 0 <= root < self.size:
            raise UsageError(f"root_rank={root_rank!r}: expected 0 to {self.size - 1}, there are {self.size} ranks")
        return root

    def join(self) -> int:
        """See `hvd_backup.mpi.join`."""
        self.begin_join()
        return self.end_join()

    def begin_join(self) -> None:
        """This rank contributes nothing more until all have joined."""
        self._refuse_within_loop("join()")
        if self.collectives.under_way():
            raise UsageError("join() while a collective is under way: synchronize() all handles first")
        for participant in self._in_order():
            participant.begin_join()
        self.engine.join()

    def end_join(self) -> int:
        """Applies the updates of the others until all have joined; returns the last to do so."""
        running = self._in_order()
        while running := [each for each in running if not each.finish_round(wait=False)]:
            time.sleep(POLL_S)
        last = self.engine.joined()
        self.collectives.start_afresh()
        return last

    def _in_order(self) -> list[Participant]:
        """As all ranks have made them, without those that cannot go on."""
        return sorted((each for each in self._participants if each.usable()), key=lambda each: each.number)

    def close(self, failure: str, *, finalizing: bool) -> None:
        """Leaves for good: returns when all ranks have left.

        Args:
            failure: the exception that ends this rank, or empty.
            finalizing: within MPI_Finalize.
        """
        if self._process != os.getpid():  # a forked child has no engine thread, and must not end its parent's part
            return
        if self.rank == 0:
            self._say_summary()
        if not finalizing:  # within MPI_Finalize they are on their way out themselves
            if not failure:
                self._serve_before_leaving()
            for end in self.before_close:
                end()
        self.engine.shutdown(failure)
        if not finalizing:
            # A rank that returns from here may have MPI finalised on all of them, so everything but this is done by
            # then; the communicator is freed by the next init(), or with MPI.
            if not self.engine.lost:
                met, deadline = self.comm.Ibarrier(), time.monotonic() + PATIENCE_S
                while not met.Test() and time.monotonic() < deadline:
                    time.sleep(0.0002)
            _retired.extend(self._survivors.communicators())

    def _serve_before_leaving(self) -> None:
        """Nobody else may be left for a rank that is far behind."""
        for participant in self._in_order():
            try:
                participant.serve(leaving=True)
            except Exception as error:
                _log.error("while leaving, the state for a rank that is far behind could not be kept: %s", error)

    def straggler_report(self, channel: str | None = None, last: int | None = None) -> stragglers.StragglerReport:
        """See `hvd_backup.stragglers.report`; empty on other ranks than 0."""
        text = self.engine.recorded(MOST_REPORTED if last is None else last)
        if not text:
            return stragglers.StragglerReport()
        return stragglers.report(trace.parse(text, "what this run has recorded"), channel, last)

    def _say_summary(self) -> None:
        report = self.straggler_report(last=MOST_SUMMARISED)
        if report.updates >= LEAST_SUMMARISED and self.config.log_level not in ("error", "fatal"):
            print(f"[hvd_backup] {report.summary()}", file=sys.stderr, flush=True)


_current: Context | None = None
_why_not = "hvd_backup is not initialised: call hvd.init() first"
_closing = threading.RLock()  # held while a context is closed: MPI's end waits for that
_retired: list[MPI.Intracomm] = []  # the communicators of closed contexts
_sees_finalize = False  # whether _on_finalize is set up


def init(comm: MPI.Comm | Sequence[int] | None = None) -> None:
    """Starts the engine: collective over `comm`. A second call does nothing.

    Args:
        comm: mpi4py communicator of the ranks that take part, or their numbers in MPI.COMM_WORLD; None:
            MPI.COMM_WORLD. It is duplicated, never used.

    Raises:
        ConfigError: the environment of this rank or of another one has an option that cannot be used.
        UsageError: MPI is missing, finalised, of a thread level below MPI_THREAD_MULTIPLE, another one than
            hvd_backup was built with, or not started for several processes although a launcher has started them.
    """
    global _current
    MPI = launch_check.usable_mpi()  # noqa: N806
    comm = _communicator(MPI, comm)
    if comm is not None and (not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL):
        raise UsageError(
            f"init(comm={comm!r}): expected an mpi4py intracommunicator that contains this process, or None for "
            "MPI.COMM_WORLD; for some of the ranks: MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.group.Incl([0, 1, ...]))"
        )
    if _current is not None:
        if comm is not None and MPI.Comm.Compare(comm, _current.comm) not in (MPI.IDENT, MPI.CONGRUENT):
            raise UsageError("init() was called before with another communicator: on all ranks, call shutdown() first")
        return
    _see_finalize(MPI)
    while _retired:
        _retired.pop().Free()
    original: Any = MPI.COMM_WORLD if comm is None else comm
    own = original.Dup()  # before anything that may fail on some ranks only
    complaint, config, recorded = "", Config(), None
    try:
        config = Config.from_environment()
        launch_check.check(MPI)
        if own.Get_rank() == 0:
            _check_writable(HVD_BACKUP_TRACE=config.trace, HVD_BACKUP_TIMELINE=config.timeline)
        if config.replay and own.Get_rank() == 0:
            recorded = replay.load(config.replay, own.Get_size())
    except HvdBackupError as error:
        complaint = str(error)
    complaints = own.allgather(complaint)  # so that no rank goes on and waits for one that has given up
    if any(complaints):
        own.Free()
        raise _worst(complaints, original.Get_rank())
    _set_up_log(config.log_level)
    context = Context(own, config, comm, recorded)
    if config.delay and not faults.injected().delays:
        faults.inject(*faults.parse(config.delay))
        for delay in faults.injected().without_effect(context.size) if context.rank == 0 else ():
            _log.warning("HVD_BACKUP_DELAY: no rank of %d is delayed by %s", context.size, delay)
    _current = context
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def _check_writable(**paths: str) -> None:
    """Raises ConfigError for a file of rank 0 that cannot be written."""
    for variable, path in paths.items():
        try:
            if path:
                open(path, "a").close()
        except OSError as error:
            raise ConfigError(f"{variable}={path!r} cannot be written: {error.strerror}") from None


def _communicator(MPI: Any, comm: Any) -> Any:  # noqa: N803
    """A list of ranks as a communicator; anything else as it is."""
    if not isinstance(comm, (list, tuple, range)):
        return comm
    ranks, world = list(comm), MPI.COMM_WORLD
    if not ranks or ranks == list(range(world.Get_size())):
        return None
    valid = all(isinstance(rank, int) and 0 <= rank < world.Get_size() for rank in ranks)
    if not valid or len(set(ranks)) < len(ranks) or world.Get_rank() not in ranks:
        raise UsageError(
            f"init(comm={ranks}) on rank {world.Get_rank()} of {world.Get_size()}: expected different ranks of "
            "MPI.COMM_WORLD, this one among them; ranks that are not in the list must not call init() with it"
        )
    return world.Create_group(world.group.Incl(ranks))


def shutdown() -> None:
    """Leaves: this rank takes part in nothing more. Returns when all ranks have left; a second call does nothing.

    init() may be called again afterwards, on all ranks. Runs by itself when the program ends.
    """
    _end("hvd_backup was used after shutdown(): call hvd.init() again first")


def is_initialized() -> bool:
    """Whether the engine runs: after init(), before shutdown()."""
    return _current is not None


def current() -> Context:
    """The context.

    Raises:
        NotInitializedError: before init(), after shutdown(), or after MPI.Finalize().
    """
    if _current is None:
        raise NotInitializedError(_why_not)
    return _current


def straggler_report(channel: str | None = None, last: int | None = None) -> stragglers.StragglerReport:
    """Who is late, how often and by how much, as far as it is recorded: `print(hvd.straggler_report())` on rank 0.

    Memory for the recording is bounded, so a long run is reported from its newest updates (16 MiB of them: some 50 000
    with 4 ranks). Other ranks than 0 get an empty report. Not a collective: call it where you like.

    Args:
        channel: "optimizer.<k>" for the k-th optimizer; None: the one with the most updates.
        last: only the newest so many updates.
    """
    return current().straggler_report(channel, last)


def _end(why_not: str, failure: str = "", *, finalizing: bool = False) -> None:
    global _current, _why_not
    with _closing:
        context, _current = _current, None
        if context is not None:
            _why_not = why_not
            context.close(failure, finalizing=finalizing)


def _see_finalize(MPI: Any) -> None:  # noqa: N803
    """From now on _on_finalize runs when anybody finalises MPI, in whichever thread: MPI deletes this attribute first.

    Once for the process: to take the attribute back when a context closes, in one thread, could meet MPI's end, which
    deletes it in another.
    """
    global _sees_finalize
    if not _sees_finalize:
        _sees_finalize = True
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_on_finalize), None)


def _on_finalize(_comm: MPI.Comm, _keyval: int, _value: object) -> None:
    _end_quietly("hvd_backup was used after MPI.Finalize(): finalise MPI last, or leave it to mpi4py", finalizing=True)


def _worst(complaints: list[str], rank: int) -> ConfigError:
    """This rank's own complaint, or else that of the lowest rank that has one."""
    if complaints[rank]:
        return ConfigError(complaints[rank])
    other, complaint = next((other, text) for other, text in enumerate(complaints) if text)
    return ConfigError(f"init() failed on rank {other}: {complaint}")


def _set_up_log(level: str) -> None:
    """Log records below WARNING need a handler to be seen; a program that has set up logging keeps its own."""
    number = {"trace": logging.DEBUG, "fatal": logging.CRITICAL}.get(level) or getattr(logging, level.upper())
    _log.setLevel(number)
    if number < logging.WARNING and not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        _log.addHandler(handler)


def _at_exit() -> None:
    """An exception that ends the interpreter is in sys.last_exc (Python 3.12) or sys.last_value by now."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    _end_quietly("the interpreter is exiting", failure="" if error is None else f"{type(error).__name__}: {error}")


def _end_quietly(why_not: str, failure: str = "", *, finalizing: bool = False) -> None:
    try:
        _end(why_not, failure, finalizing=finalizing)
    except HvdBackupError as error:
        _log.error("while leaving: %s", error)
