"""Callbacks for fit(): Horovod's, written for Keras 3, and FollowCallback.

model.fit(data, callbacks=[
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    hvd.callbacks.FollowCallback(),
    hvd.callbacks.MetricAverageCallback(),
])
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import keras
import numpy as np

from hvd_backup import context, mpi
from hvd_backup.errors import UsageError
from hvd_backup.follow import running
from hvd_backup.keras.backend import broadcast_variables
from hvd_backup.keras.optimizer import DistributedApply
from hvd_backup.training import Training, end_rounds

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "FollowCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]


class FollowCallback(keras.callbacks.Callback):
    """What `hvd.follow` is for loops: each epoch is a round, in which all ranks come to the same number of updates.

    A rank that is late ends its epoch when the others have, without working through the batches that are left; at the
    end of an epoch, and before its validation, all ranks have equal weights. Put it before callbacks that use all
    ranks (MetricAverageCallback), and, with backup workers, use it always.

    When an exception ends fit() on a rank (in the data, or a callback), the others go on without it: at its next use of
    the optimizer or of a full collective it applies what they have done until the end of their epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running = False
        self._stopped = False

    def on_train_begin(self, logs: Any = None) -> None:
        """An exception may have ended the last fit()."""
        if self._training().in_followed_round():
            self._training().abandon_round()
        self.model.optimizer._exchange.belongs_to(self.model)
        self._running = self._stopped = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """The round begins."""
        fit = _keras_loop()
        still_runs = None if fit is None else running(fit)
        self._training().begin_round(self.params.get("steps") or -1, 0, still_runs=still_runs)
        self._running = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Ends the epoch when the round is over."""
        if self._running and not self.model.stop_training and self._training().round_over():
            self._stopped = self.model.stop_training = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Validation at the end of an epoch, with the weights of the whole round."""
        self._finish()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """The round ends; training goes on with the next one."""
        self._finish()
        if self._stopped:
            self._stopped = self.model.stop_training = False

    def _finish(self) -> None:
        if self._running:
            self._running = False
            end_rounds([self._training()])

    def _training(self) -> Training:
        optimizer = self.model.optimizer
        if not isinstance(optimizer, DistributedApply):
            raise UsageError(
                f"FollowCallback: the model was compiled with {type(optimizer).__name__}, expected a "
                "hvd.DistributedOptimizer"
            )
        return optimizer.training


def _keras_loop() -> FrameType | None:
    """The frame of Keras's own loop through the epochs: fit(). None: a loop of the user's calls the callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("keras.") and not module.startswith("keras.src.callbacks"):
            return frame
        frame = frame.f_back
    return None


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """At the beginning of training all ranks get the weights and the optimizer's variables of rank `root_rank`.

    Args:
        root_rank: whose they are.
        device: Horovod's; changes nothing.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self.root_rank = root_rank
        self.broadcast_done = False
        self._local: set[int] = set()

    def register_local_var(self, var: Any) -> None:
        """This variable is the rank's own, and is not sent."""
        self._local.add(id(var))

    def on_train_begin(self, logs: Any = None) -> None:
        """Sends them, once."""
        if self.broadcast_done:
            return
        optimizer: Any = self.model.optimizer
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        variables = [*self.model.variables, *optimizer.variables]
        broadcast_variables([each for each in variables if id(each) not in self._local], self.root_rank)
        if isinstance(optimizer, DistributedApply):
            optimizer.training.global_step = int(self.model.optimizer.iterations)
            optimizer._exchange.belongs_to(self.model)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """At the end of an epoch the logs hold the mean over all ranks. Put it before callbacks that look at the logs."""

    def __init__(self, device: str = "") -> None:
        super().__init__()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Averages in place."""
        if not logs:
            return
        names = sorted(logs)
        values = np.array([float(logs[name]) for name in names], np.float64)
        means = mpi.allreduce(values, name="metrics " + ",".join(names))
        logs.update({name: float(mean) for name, mean in zip(names, means, strict=True)})


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to initial_lr * multiplier(epoch) from start_epoch to end_epoch.

    With backup workers the rate travels with the updates, so that a late rank applies them exactly as the others did.

    Args:
        initial_lr: the rate at multiplier 1.
        multiplier: a function of the epoch, or a factor that is applied once for each epoch from start_epoch on.
        start_epoch, end_epoch: the first epoch, and the first one no more; None: to the end.
        staircase: the epoch is a whole number; otherwise it grows with every batch.
        momentum_correction: what the optimizer has accumulated is scaled when the rate changes (Goyal et al. 2017,
            "Accurate, Large Minibatch SGD", section 3, remark 3). Only without backup workers.
        steps_per_epoch: batches in an epoch, when fit() does not know.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("Parameter `initial_lr` is required")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        factor: Any = multiplier
        self.multiplier: Callable[[float], float] = (
            factor if callable(factor) else lambda epoch: float(factor) ** (epoch - start_epoch)
        )

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks for the number of steps."""
        if self.steps_per_epoch is None:
            self.steps_per_epoch = self.params.get("steps")
        if not self.staircase and not self.steps_per_epoch:
            raise ValueError(f"{type(self).__name__}: fit() does not know the steps of an epoch: give steps_per_epoch")
        optimizer: Any = self.model.optimizer
        late = isinstance(optimizer, DistributedApply) and optimizer.training.backup_workers > 0
        if late and self.momentum_correction and self._momenta():
            self.momentum_correction = False
            warnings.warn(
                f"{type(self).__name__}(momentum_correction=True) is without effect with backup workers", stacklevel=2
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the rate."""
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if self.staircase and batch == 0:
            self._adjust(epoch)
        elif not self.staircase:
            self._adjust(epoch + batch / (self.steps_per_epoch or 1))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the rate into the logs, as `lr`."""
        if logs is not None:
            logs["lr"] = float(self.model.optimizer.learning_rate)

    def _adjust(self, epoch: float) -> None:
        optimizer: Any = self.model.optimizer
        old, new = float(optimizer.learning_rate), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = new
        if self.momentum_correction and old > 0 and new != old:
            for momentum in self._momenta():
                momentum.assign(momentum * (new / old))

    def _momenta(self) -> list[Any]:
        """What SGD with momentum has accumulated; it holds the learning rate as a factor."""
        optimizer: Any = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not isinstance(optimizer, keras.optimizers.SGD) or not optimizer.momentum:
            return []
        return list(optimizer.momentums)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from initial_lr / size() to initial_lr over the first epochs (Goyal et al. 2017).

    Args:
        initial_lr: the rate after the warm-up.
        warmup_epochs: how many epochs it takes.
        verbose: 1: says when it is over.
        momentum_correction, steps_per_epoch: as in LearningRateScheduleCallback.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            size = context.current().size
            epoch += 1.0 / (self.steps_per_epoch or 1)  # round numbers at the end of each epoch
            return 1.0 / size * (epoch * (size - 1) / warmup_epochs + 1)

        super().__init__(
            initial_lr,
            multiplier,
            start_epoch=0,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See LearningRateScheduleCallback."""
        super().on_epoch_end(epoch, logs)
        if self.end_epoch is not None and epoch == self.end_epoch - 1 and self.verbose > 0 and mpi.rank() == 0:
            rate = float(self.model.optimizer.learning_rate)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Keras's ModelCheckpoint of the best model so far, written by rank 0 alone.

    Put it after MetricAverageCallback, so that "best" is by the mean over all ranks.
    """

    def __init__(
        self,
        filepath: str,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: str = "epoch",
        **options: Any,
    ) -> None:
        super().__init__(
            filepath, monitor=monitor, verbose=verbose, save_best_only=True, mode=mode, save_freq=save_freq, **options
        )

    def _save_model(self, *arguments: Any, **options: Any) -> None:
        if mpi.rank() == 0:
            super()._save_model(*arguments, **options)
