"""`follow(loader, optimizer)`: ties a rank's position in its data to the global step.

A rank that missed k updates skips their k batches, so all ranks end the epoch at the same step, and a batch number
means the same everywhere. Loaders may be uneven, or of unknown length: a rank whose data has ended goes on applying the
updates of the others until the round is over. Framework-neutral; knows a torch DataLoader only by its looks, to skip
cheaply.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from hvd_backup.errors import UsageError
from hvd_backup.training import Training, end_rounds

__all__ = ["END", "Batches", "Followed", "Round", "follow", "left_by_break", "length_of", "running"]

Batch = TypeVar("Batch")

END = object()
ENDLESS = 1 << 60


class HasTraining(Protocol):
    """An optimizer made by DistributedOptimizer."""

    @property
    def training(self) -> Training: ...


def follow(
    loader: Iterable[Batch], optimizer: HasTraining | Sequence[HasTraining], align_every: int | None = None
) -> Followed[Batch]:
    """The batches of `loader` that this rank is to compute: one epoch, over which all ranks stay together.

        for x, y in hvd.follow(loader, optimizer):

    Args:
        loader: any iterable of batches. With a length it should be the number of batches of this epoch.
        optimizer: the optimizer, or several (a GAN): the first gives the position and must step once per batch; updates
            of the others that this rank has missed are applied by their step(), and at the end.
        align_every: all ranks meet whenever the first optimizer's updates of this run are a multiple of it; nobody
            skips over such a step. There, and with backup workers only there, full collectives (evaluation,
            checkpoints) may be called in the loop: `if optimizer.aligned: ...`. Use it with loaders of equal length: a
            rank whose data has ended is no longer in the loop to take part. The same on all ranks.

    Returns:
        An iterable for one epoch; len() of it is that of the loader, for progress bars. A rank that skips batches sees
        fewer: count with `optimizer.global_step` where the number of the batch matters, not with enumerate().

    A batch for which step() is not called (a gradient that you skip, or accumulate) moves the position on by itself.
    With gradient accumulation over k batches, an update that was missed counts for k.

    A rank that leaves the loop by `break` or `return` goes on applying the updates of the others until the round is
    over. When an exception ends the loop (or when another generator stands between, as tqdm's), it does not wait: it
    contributes nothing more, and makes up for the rest at its next use of the optimizer or of a full collective.

    Raises:
        UsageError: in the loop, for a loader with a length, when step() is called twice for one batch.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise UsageError(f"follow({type(loader).__name__}): expected an iterable of batches")
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers:
        raise UsageError("follow(loader, []): at least one optimizer is needed")
    for each in optimizers:
        if not isinstance(getattr(each, "training", None), Training):
            raise UsageError(f"follow(): {type(each).__name__} was not made by hvd.DistributedOptimizer")
    if align_every is not None and (
        isinstance(align_every, bool) or not isinstance(align_every, int) or align_every < 1
    ):
        raise UsageError(f"follow(align_every={align_every!r}): expected a number of steps >= 1, or None")
    return Followed(loader, [each.training for each in optimizers], align_every or 0)


class Followed(Generic[Batch]):
    """What `follow` returns."""

    def __init__(self, loader: Iterable[Batch], trainings: list[Training], align_every: int) -> None:
        self._loader = loader
        self._trainings = trainings
        self._align_every = align_every

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # a TypeError is the right answer when it has none

    def __iter__(self) -> Iterator[Batch]:
        batches = Batches(self._loader)
        round = Round(self._trainings, length_of(self._loader), self._align_every)
        try:
            while (batch := round.take(batches)) is not END:
                yield batch
                round.advance()
            round.finish()
        except GeneratorExit:
            if left_by_break(sys._getframe(1)):
                round.finish()
            raise
        finally:
            round.abandon()


class Round:
    """A followed round, and the place in the data that belongs to it. Begins at once; finish() or abandon() ends it.

    Args:
        trainings: of the optimizers; the first gives the position.
        length: number of steps, -1 when unknown.
        align_every: as in `follow`.
        first_batch: number of the batch that belongs to the round's first step.
        amid_backward: that batch is being computed already.
    """

    def __init__(
        self,
        trainings: list[Training],
        length: int,
        align_every: int,
        first_batch: int = 0,
        amid_backward: bool = False,
    ) -> None:
        self._begun: list[Training] = []
        self._first = trainings[0]
        self._known_length = length >= 0
        self._first_batch = first_batch
        try:
            for training in trainings:
                if training is self._first:
                    training.begin_round(length, align_every, amid_backward)
                else:
                    training.begin_round(-1, 0, amid_backward)
                self._begun.append(training)
        except BaseException:
            self.abandon()
            raise
        self._position = _Position(self._first)

    def take(self, batches: Batches[Any]) -> Any:
        """The batch that this rank is to compute next; END when the round or the data is over."""
        if self._first.round_over():
            return END
        return batches.at(self._first_batch + self._position.batch)

    def advance(self) -> None:
        """The loop's body has run for the batch that was taken."""
        self._position.advance(self._known_length)

    def finish(self) -> None:
        """Waits until the round is over for all, and applies the updates of the others meanwhile."""
        end_rounds(self._begun)
        self._begun = []

    def abandon(self) -> None:
        """Never waits; does nothing after finish()."""
        for training in self._begun:
            training.abandon_round()
        self._begun = []


class _Position:
    """Which batch belongs to the step that this rank is to compute."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.batch = (training.step - training.round_start) * training.batches_per_update
        self._window()

    def _window(self) -> None:
        """Begins to count anew: batches and updates since the last batch with a step()."""
        self._first_batch, self._batches = self.batch, 0
        self._first_step, self._calls = self._training.step, self._training.step_calls

    def advance(self, known_length: bool) -> None:
        """The loop's body has run for `batch`: on time, one further; after k missed updates, k times as far."""
        self._batches += 1
        self.batch += 1
        calls = self._training.step_calls - self._calls
        if calls == 0:
            return
        if calls > self._batches and known_length:
            raise UsageError(
                "step() of the followed optimizer was called more than once for a batch, so len(loader) is not the "
                "number of updates: follow(iter(loader), optimizer), or put the optimizer with one step per batch first"
            )
        updates = self._training.step - self._first_step
        # A window with a batch that the loop has skipped looks larger than it is.
        self._training.batches_per_update = min(self._training.batches_per_update, max(1, self._batches // calls))
        self.batch = max(self.batch, self._first_batch + self._batches * updates // calls)
        self._window()


class Batches(Generic[Batch]):
    """The loader's batches, in order, with a way to pass over some of them."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._iterator = iter(loader)
        self._next = 0

    def at(self, position: int) -> Any:
        """The batch number `position`, which must not lie behind; END when there is none."""
        while self._next < position:
            if self._skip() is END:
                return END
        self._next += 1
        return next(self._iterator, END)

    def _skip(self) -> object:
        """A DataLoader without workers on a map-style dataset gives up its indices without loading anything."""
        self._next += 1
        iterator: Any = self._iterator
        indices = getattr(iterator, "_sampler_iter", None)
        loads_itself = getattr(iterator, "_num_workers", None) == 0 and getattr(iterator, "_dataset_kind", None) == 0
        return next(iterator if indices is None or not loads_itself else indices, END)


def left_by_break(frame: FrameType) -> bool:
    """Whether a generator is being closed because `frame` has left its loop by break or return, not by an exception.

    Then the frame is at the instruction that takes the iterator off its stack, which cannot raise; otherwise it is
    still at the one that did. CPython offers nothing better: it hides an exception on its way from the generator.
    """
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("POP_TOP", "POP_ITER")


def running(frame: FrameType) -> Callable[[], bool]:
    """Says from then on whether the call that this thread has made, and whose frame this is, still goes on."""
    thread = threading.get_ident()

    def still_runs() -> bool:
        at = sys._current_frames().get(thread)
        while at is not None and at is not frame:
            at = at.f_back
        return at is not None

    return still_runs


def length_of(loader: object) -> int:
    """Number of batches, -1 when unknown. What claims to be endless has no length, either."""
    try:
        length = len(loader)  # type: ignore[arg-type]
        return length if length < ENDLESS else -1
    except TypeError:
        return -1
