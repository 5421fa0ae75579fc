"""One optimizer's part in the training of all ranks: its updates, and the rounds in which they come.

A round is a stretch of steps after which all ranks do something else together (an epoch's evaluation, say). `follow`
begins and ends rounds explicitly; without it, a rank that enters a full collective ends the round for all. The
optimizers of hvd_backup.torch and hvd_backup.tensorflow own one Training each. Framework-neutral.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Sequence

from hvd_backup.context import Context
from hvd_backup.errors import HvdBackupError, UsageError
from hvd_backup.policy import Policy
from hvd_backup.updates import Framework, UpdateStream

__all__ = ["Training", "end_rounds", "gradient_observers", "trainings_of"]

POLL_S = 0.0005

_warned_about_leftovers = False
# Called when a step's first gradient is there: so an unchanged script's loader is found (torch/unchanged.py).
gradient_observers: list[Callable[[Training], object]] = []


class _Program:
    """The optimizers of one init()."""

    def __init__(self) -> None:
        self.made = 0
        self.alive: weakref.WeakSet[Training] = weakref.WeakSet()


_programs: weakref.WeakKeyDictionary[Context, _Program] = weakref.WeakKeyDictionary()


class Training(UpdateStream):
    """An optimizer's updates and rounds. Registers itself as a participant of full collectives (context.Participant).

    The k-th one of the program is the channel "optimizer.<k>", so all ranks must make their optimizers in the same
    order.

    Attributes:
        number: of the optimizer in its program.
        round_start: the step at which the last followed round began.
        batches_per_update: how many batches of the loader one update stands for, with gradient accumulation.
    """

    def __init__(self, place: Context, policy: Policy, framework: Framework) -> None:
        self._program = _programs.setdefault(place, _Program())
        super().__init__(f"optimizer.{self._program.made}", place, policy, framework)
        self.number = self._program.made
        self._program.made += 1
        self._program.alive.add(self)
        self._following = False
        self._abandoned = False  # a followed round whose loop was left early, and that is not over yet
        self._round_to_begin: tuple[int, int] | None = None  # as soon as the channel is open: length, align_every
        self._align_every = 0
        self._still_runs: Callable[[], bool] | None = None
        self.round_start = 0
        self.batches_per_update = 1
        self._plain_steps = False  # since the last round, without follow()
        self._joined_before_open = False  # the newest join() was called before this rank had taken any step
        self._leftovers = 0  # gradients dropped since another rank has ended the round
        place.register(self)

    def begins_the_program(self) -> bool:
        """Whether no update of any rank can have been made yet when this channel opens: the same on all ranks."""
        return self.number == 0 and self._reopened == 0

    def gradient_begins(self) -> None:
        """The first gradient of a step is there. If it is the first of a round, a followed one may still begin now."""
        for observe in gradient_observers:
            observe(self)

    # --- rounds of follow() ---

    def in_followed_round(self) -> bool:
        """Whether a loop over follow() runs. If it was left unnoticed, by an exception, the round is abandoned now."""
        if self._following and self._still_runs is not None and not self._still_runs():
            self.abandon_round()
        return self._following

    def aligned(self) -> bool:
        """Whether all ranks meet at this step (`follow(..., align_every=k)`)."""
        at = self.step
        every = self._align_every
        channel = self.channel
        if channel is not None and channel.round_end is not None and channel.step > channel.round_end:
            return False  # with another rank's state it has come into a later round, in which it meets the others
        return self._following and every > 0 and at > self.round_start and (at - self._earlier_steps) % every == 0

    def may_begin_round(self) -> bool:
        """Whether the step that is computed can still become the first one of a followed round."""
        return not (self._following or self._abandoned or self._plain_steps or self._framework.gradient_started())

    def begin_round(
        self,
        length: int,
        align_every: int,
        amid_backward: bool = False,
        still_runs: Callable[[], bool] | None = None,
    ) -> None:
        """Begins a followed round, and applies what this rank has missed.

        Args:
            length: steps, -1 when unknown.
            align_every: 0, or at how many steps' distance all ranks meet.
            amid_backward: see `may_begin_round`; weights must not change now, so step() applies what was missed.
            still_runs: whether the round's loop runs, for one that cannot say so itself when an exception ends it.
        """
        self.check_usable()
        if self.in_followed_round():
            raise UsageError("follow() inside a loop over follow() with the same optimizer: end that loop first")
        if self._framework.gradient_started():
            raise UsageError("follow() between backward() and step(): call step() first")
        self._finish_abandoned()
        if self._plain_steps:
            self.leave_round("follow()")
        self._following = True
        self._still_runs = still_runs
        self._align_every = align_every
        self.round_start = self._earlier_steps + (0 if self.channel is None else self.channel.round_start)
        self._round_to_begin = (length, align_every)
        if self.channel is not None:
            try:
                self._begin_awaited_round()
                if not amid_backward:
                    self.wait_outside_step()
            except BaseException:
                self.abandon_round()
                raise

    def set_layout(self, buckets: Sequence[tuple[int, str]], results: Sequence[int], buffers: object) -> None:
        """See UpdateStream. Then the round begins that was begun before the channel was open."""
        super().set_layout(buckets, results, buffers)
        self._begin_awaited_round()

    def _begin_awaited_round(self) -> None:
        if self._round_to_begin is not None:
            self.opened.begin_round(*self._round_to_begin)
            self._round_to_begin = None

    def round_over(self) -> bool:
        """Whether this round is over for this rank; waits when that is not certain yet."""
        channel = self.channel
        if channel is None:
            return False
        while not channel.round_over and channel.round_end is not None and channel.step >= channel.round_end:
            self.wait_outside_step()
        return channel.round_over

    def stop_contributing(self) -> None:
        """This rank's data has ended. Does not wait, but for the channel to be opened by all ranks."""
        if self.channel is None:
            self._framework.open()
        if not self.opened.round_over:
            self.opened.away()

    def finish_round(self, wait: bool) -> bool:
        """Having said so or joined, applies the updates of the others until the round is over for all.

        Args:
            wait: False: only what is there.

        Returns:
            Whether the round is over.
        """
        if self.channel is None:
            self._framework.open()
        channel = self.opened
        while not channel.round_over:
            if not wait and not channel.poll():
                return False
            if self.wait_outside_step(one=not wait) == "resume":
                if self._joined_before_open:
                    return True  # all had joined before any step was taken, so there was no round
                raise HvdBackupError("a rank that is away was told to resume: an error in hvd_backup, please report it")
        channel.leave()  # the round is behind us: what comes next, followed or not, is a round of its own
        channel.wait()
        self._following = False
        self._still_runs = None
        self._abandoned = False
        return True

    def abandon_round(self) -> None:
        """The loop was left early. Never blocks: an exception may be on its way. The rest is made up for later."""
        self._following = False
        self._still_runs = None
        self._abandoned = True
        if self.channel is not None:
            try:
                self.channel.away()
            except HvdBackupError:
                pass  # the engine has failed or was shut down: the next call says so

    def _finish_abandoned(self) -> None:
        if self._abandoned:
            end_rounds([self])

    # --- rounds without follow() ---

    def usable(self) -> bool:
        """Whether no exception has torn it."""
        return not self._torn

    def begin_join(self) -> None:
        """This rank is about to join(): what others contribute from now on, finish_round() applies."""
        if self.in_followed_round():
            raise UsageError(
                "join() inside a loop over follow(), which is for uneven data itself: call it after the loop"
            )
        if self._framework.gradient_started():
            raise UsageError("join() between backward() and step(): call step() first")
        self._finish_abandoned()
        if self.channel is not None and self.channel.round_over:
            self.channel.leave()
            self.channel.wait()
        self._joined_before_open = self.channel is None
        self._plain_steps = False
        self._warn_about_leftovers("join()")

    def leave_round(self, what: str) -> None:
        """Ends the round, because this rank enters the full collective `what`."""
        if self._torn:
            return  # what it would apply is of no use any more
        self._finish_abandoned()
        if self.channel is None:
            return
        if self._framework.gradient_started():
            if self.backup_workers == 0:
                return  # every rank is needed for this update, so every rank comes to it
            raise UsageError(
                f"{what} between backward() and step() with backup workers would drop the gradient: call it after "
                "step(), or let scalars travel with the update: optimizer.metrics(...)"
            )
        self.channel.leave()
        self.wait_outside_step()
        self._plain_steps = False
        self._warn_about_leftovers(what)

    def end_plain_steps(self, what: str) -> None:
        """Ends the round at `what`, if it is not a followed one and this rank has taken part in it."""
        if self._plain_steps and not self.in_followed_round():
            self.leave_round(what)

    def complete(self) -> None:
        """See UpdateStream."""
        super().complete()
        self._plain_steps = self._plain_steps or not self._following

    def _is_alone(self) -> bool:
        return not any(
            other.channel is not None and (other._following or other._plain_steps)
            for other in self._program.alive
            if other is not self
        )

    def _streams(self) -> Sequence[UpdateStream]:
        return trainings_of(self)

    def _dropped_after_end(self) -> None:
        if not self._following:
            self._leftovers += 1

    def _warn_about_leftovers(self, what: str) -> None:
        global _warned_about_leftovers
        if self._leftovers and not _warned_about_leftovers:
            _warned_about_leftovers = True
            warnings.warn(
                f"rank {self._place.rank}: {self._leftovers} gradients were dropped, because another rank had left the "
                f"training loop before and entered {what}, which ended the round for all. With backup workers or "
                "unequal data, ranks need unequal numbers of iterations; `for batch in hvd.follow(loader, optimizer)`, "
                "or hvd.callbacks.FollowCallback() in Keras's fit(), gives each rank the number that it needs",
                stacklevel=5,
            )
        self._leftovers = 0


def trainings_of(training: Training) -> list[Training]:
    """It, and the others of its program, in the order in which they were made."""
    others = [other for other in training._program.alive if other is not training]
    return [training, *sorted(others, key=lambda other: other.number)]


def end_rounds(trainings: Sequence[Training]) -> None:
    """Sees the followed rounds of these optimizers to their end: together, since other ranks may need all to go on."""
    for training in trainings:
        training.stop_contributing()
    running = list(trainings)
    while len(running) > 1:
        running = [training for training in running if not training.finish_round(wait=False)]
        time.sleep(POLL_S)
    for training in running:
        training.finish_round(wait=True)
