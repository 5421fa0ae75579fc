"""Makes Horovod scripts train with backup workers as they are: `python -m hvd_backup.run` installs it first.

Names of horovod.torch become ours, and a DataLoader whose loop steps a DistributedOptimizer follows the global step, as
with `hvd.follow`. Which loader that is shows at the first gradient: it is the one whose loop is innermost then. Loaders
in whose loops nothing is computed backward, those of evaluation, stay as they are. With backup workers, the GradScaler
that has scaled a loss is registered with the optimizer that gets the first gradient from it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch.amp import GradScaler
from torch.utils.data import DataLoader

from hvd_backup.follow import END, Batches, Followed, Round, left_by_break, length_of
from hvd_backup.torch import horovod_names
from hvd_backup.torch.exchange import GradientExchange
from hvd_backup.training import Training, gradient_observers, trainings_of

__all__ = ["install"]


def install() -> None:
    """Once, before the script runs."""
    _replace_names()
    DataLoader.__iter__ = _iterate  # type: ignore[method-assign, assignment]
    GradScaler.scale = _scale  # type: ignore[method-assign, assignment]
    gradient_observers.extend((_found, _register_scaler))


def _replace_names() -> None:
    """horovod.torch's names become ours; without Horovod, there is a horovod.torch that is ours altogether."""
    ours = importlib.import_module("hvd_backup.torch")
    if not horovod_names.HOROVOD.usable():
        stand_in: Any = ModuleType("horovod", "hvd_backup in place of Horovod")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("horovod", None, is_package=True)
        stand_in.__path__ = []
        stand_in.torch = ours
        sys.modules["horovod"], sys.modules["horovod.torch"] = stand_in, ours
        return
    theirs = sys.modules["horovod.torch"]
    replaced = horovod_names.OURS | horovod_names.EITHER | horovod_names.COLLECTIVES | {"SyncBatchNorm"}
    values = {name: getattr(ours, name) for name in sorted(replaced)}
    for name, value in values.items():
        setattr(theirs, name, value)
    horovod_names.HOROVOD.use_after_init()  # a script may reach into Horovod in ways that we do not see


class _Raw:
    """A DataLoader as PyTorch iterates over it."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = _original_iter(self._loader)
        return iterator


class _Loop:
    """A loop over a loader that runs. round: since a gradient was computed in it; taken: batches so far."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.round: Round | None = None
        self.taken = 0


_original_iter: Any = DataLoader.__iter__
_loops: list[_Loop] = []
_trained_on: weakref.WeakKeyDictionary[DataLoader[Any], list[weakref.ref[Training]]] = weakref.WeakKeyDictionary()


def _iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """In place of DataLoader.__iter__."""
    trainings = [training for ref in _trained_on.get(loader, []) if (training := ref()) is not None]
    if trainings and not any(training.in_followed_round() for training in trainings):
        return iter(Followed(_Raw(loader), trainings, 0))
    return _watched(loader)


def _watched(loader: DataLoader[Any]) -> Iterator[Any]:
    """The first loop over a loader: if gradients are computed in it, it follows from there on."""
    loop = _Loop(loader)
    _loops.append(loop)
    batches: Batches[Any] = Batches(_Raw(loader))
    try:
        while (batch := batches.at(loop.taken) if loop.round is None else loop.round.take(batches)) is not END:
            loop.taken += 1
            yield batch
            if loop.round is not None:
                loop.round.advance()
        if loop.round is not None:
            loop.round.finish()
    except GeneratorExit:
        if loop.round is not None and left_by_break(sys._getframe(1)):
            loop.round.finish()
        raise
    finally:
        _loops.remove(loop)
        if loop.round is not None:
            loop.round.abandon()


def _found(training: Training) -> None:
    """A gradient of `training` is there: the innermost loop is its training loop, if it has none yet."""
    loop = _loops[-1] if _loops else None
    trainings = trainings_of(training)
    if loop is None or loop.round is not None or not all(each.may_begin_round() for each in trainings):
        return
    length = length_of(loop.loader)
    first_batch = loop.taken - 1  # it is the batch in whose body we are
    loop.round = Round(trainings, length - first_batch if length >= 0 else -1, 0, first_batch, amid_backward=True)
    _trained_on[loop.loader] = [weakref.ref(each) for each in trainings]


_original_scale: Any = GradScaler.scale
_scaled_with: list[weakref.ref[GradScaler]] = []  # the scaler of the loss whose gradients come next


def _scale(scaler: GradScaler, outputs: Any) -> Any:
    """In place of GradScaler.scale."""
    if scaler.is_enabled():
        _scaled_with[:] = [weakref.ref(scaler)]
    return _original_scale(scaler, outputs)


def _register_scaler(training: Training) -> None:
    """A gradient of `training` is there."""
    scaler = _scaled_with.pop()() if _scaled_with else None
    exchange = training.framework
    if scaler is None or training.backup_workers == 0 or not isinstance(exchange, GradientExchange):
        return
    if not exchange.driven:
        exchange.drive(scaler)
