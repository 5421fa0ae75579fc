"""What users call on the optimizer that DistributedOptimizer returns: methods in front of the wrapped optimizer's own.

Names and habits are Horovod's (horovod/torch/optimizer.py, 0.28.1). What is not here: how it is made (distributed.py),
how gradients go out and back (exchange.py), and the rules of step() (hvd_backup/updates.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from hvd_backup import context
from hvd_backup.applied import AppliedUpdate
from hvd_backup.errors import UsageError
from hvd_backup.torch import checks
from hvd_backup.torch.exchange import GradientExchange
from hvd_backup.torch.memory import checksum_of
from hvd_backup.torch.resync import check_resyncable
from hvd_backup.torch.schedulers import take_over
from hvd_backup.training import Training

__all__ = ["DistributedStep"]

_STATE_KEY = "hvd_backup"


class DistributedStep(torch.optim.Optimizer):
    """What is put in front of the wrapped optimizer's class. Its own state is in `_exchange` alone."""

    _exchange: GradientExchange
    _synchronizes: bool

    # --- Horovod's face ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the update that this rank's gradient is part of, and before it all that this rank has missed.

        After it p.grad is the gradient of the last update that was applied. It is valid until the next backward pass:
        clone what you want to keep.

        Args:
            closure: computes the loss and the gradients, once, before anything else.

        Returns:
            What the closure has returned, or None.

        Raises:
            UsageError: there was no backward pass; gradients or hyperparameters were changed after it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_synchronized = self._exchange.synchronized
        if not self._synchronizes:
            if not is_synchronized:
                raise UsageError("step() within skip_synchronize(): call synchronize() before it")
        elif is_synchronized:
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
                "Put it into one: with optimizer.skip_synchronize(): optimizer.step()",
                stacklevel=2,
            )
        with torch.no_grad():
            if not is_synchronized:
                self._exchange.synchronize()
            self._exchange.complete()
        return loss

    def synchronize(self) -> None:
        """Waits for the update that this rank's gradient is part of, and leaves the mean gradient in p.grad.

        Updates that this rank has missed are applied. When its own gradient was dropped, the step() that follows does
        nothing, and p.grad holds the gradient of the last update that was applied.
        """
        with torch.no_grad():
            self._exchange.synchronize(for_user=True)
        self._exchange.hand_to_user()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """For changing the mean gradient before it is applied:

            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()

        With backup workers, late ranks get the gradient as the contributors have changed it; so all ranks must change
        it in the same way, from the first step on. Not with scope="bucket": use `on_update(fn, when="before")` there.
        """
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. With gradient_as_bucket_view gradients are always zeroed in place, never set to None."""
        exchange = self._exchange
        if self.training.alone:
            exchange.forget()
        elif exchange.gradient_started() and not exchange.synchronized:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        super().zero_grad(set_to_none)
        exchange.zero_in_buckets()

    @property
    def backward_passes_per_step(self) -> int:
        """How many backward passes make one gradient."""
        return self._exchange.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes it, from the next gradient on."""
        self._exchange.set_passes(checks.positive("backward_passes_per_step", passes))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; on all ranks, between two steps: all ranks meet here. Not inside a loop over follow().

        Raises:
            UsageError: between backward() and step(), inside a followed loop, or a parameter that cannot be used.
        """
        exchange = self._exchange
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise UsageError(f'add_param_group({type(param_group).__name__}): expected a dict with "params"')
        if exchange.gradient_started():
            raise UsageError("add_param_group() between backward() and step(): call it after step()")
        if self.training.in_followed_round():
            raise UsageError("add_param_group() inside a loop over follow(): call it before or after the loop")
        parameters = param_group["params"]
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        number = len(self.param_groups)
        named = [(f"allreduce.noname.{number}.{i}", each) for i, each in enumerate(given) if each.requires_grad]
        for name, parameter in named:
            checks.check_parameter(name, parameter)
        shapes = [tuple(parameter.shape) for parameter in given]
        context.current().full_collective(
            f"add_param_group(parameters of shapes {shapes}, with checksum {checksum_of(given)})"
        )
        super().add_param_group({**param_group, "params": given})
        if named:
            exchange.extend(named)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the global step under a key of its own, which plain optimizers ignore."""
        return {**super().state_dict(), _STATE_KEY: {"global_step": self.global_step}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, or a plain optimizer's (the global step then stays)."""
        if self._exchange.gradient_started():
            raise UsageError("load_state_dict() between backward() and step(): call it after step()")
        own = state_dict.get(_STATE_KEY)
        groups = self.param_groups
        super().load_state_dict({key: value for key, value in state_dict.items() if key != _STATE_KEY})
        groups[:] = self.param_groups  # schedulers made before wrapping go on looking at this very list
        self.param_groups = groups
        if own is not None:
            self.training.global_step = own["global_step"]

    # --- beyond Horovod ---

    @property
    def training(self) -> Training:
        """For `follow`."""
        return self._exchange.training

    @property
    def samples(self) -> float:
        """The weight of this rank's gradient in the mean: `optimizer.samples = len(x)` before backward(). Default 1.

        With equal weights the update is the mean over ranks, as in Horovod; with the number of samples of each rank's
        batch (and a loss that is a mean), it is the mean over samples.
        """
        return self.training.samples

    @samples.setter
    def samples(self, value: float) -> None:
        self.training.samples = value

    def metrics(self, **scalars: Any) -> None:
        """Sends scalars along with the next gradient; `last_update.metrics` then has their means, on every rank.

        Call it before step(). The names are fixed at the first step(), and must be equal on all ranks. NaN and None
        mean that this rank has no number.
        """
        self.training.metrics(scalars)

    @property
    def last_update(self) -> AppliedUpdate:
        """The newest update that this rank has applied, and what became of the gradient of the last step()."""
        return self.training.last_update

    @property
    def global_step(self) -> int:
        """Updates behind these weights, those before the checkpoint included. Equal weights, equal global step."""
        return self.training.global_step

    @property
    def aligned(self) -> bool:
        """Within `follow(..., align_every=k)`: all ranks meet at this step, and may call full collectives."""
        return self.training.aligned()

    def counters(self) -> dict[str, int]:
        """contributed, dropped: gradients of this rank; caught_up: updates applied without its gradient; resynced:
        updates not applied, but taken over from another rank."""
        return self.training.counters()

    def on_update(self, fn: Callable[[AppliedUpdate], object], when: Literal["before", "after"] = "after") -> None:
        """Runs fn(update) for every update that this rank applies, also those that it has missed.

        Args:
            fn: must do the same on every rank, given the same update. An exception in it ends the training.
            when: "before": p.grad holds the mean gradient and may be changed (clipping); "after": the weights are new
                (moving averages of weights, schedulers that need a metric).
        """
        if when not in ("before", "after"):
            raise UsageError(f'on_update(when={when!r}): expected "before" or "after"')
        if not callable(fn):
            raise UsageError(f"on_update({type(fn).__name__}): expected a function of one argument, the AppliedUpdate")
        functions = self.training.before_update if when == "before" else self.training.after_update
        functions.append(fn)

    def register_scheduler(self, scheduler: Any) -> None:
        """From now on the scheduler steps once after each update, on every rank, also after updates that were missed.

        Calls of scheduler.step() in your own loop then do nothing. For schedulers that count updates, not epochs.
        """
        exchange = self._exchange
        exchange.schedulers.append(take_over(scheduler, self))
        exchange.resynced[f"scheduler {len(exchange.schedulers)}"] = scheduler

    def resync_also(self, **things: Any) -> None:
        """What else is to be equal on all ranks: a rank that is too far behind takes it over from another one.

        Such a rank (`on_max_lag="resync"`) does not apply what it has missed, and functions of `on_update` do not run
        for it. It gets the weights, the optimizer's state, registered schedulers and scaler, the global step, and the
        buffers that `broadcast_parameters(model.state_dict())` was given. Name here whatever else your updates change:

            optimizer.resync_also(ema=ema_model)

        Args:
            things: by name, the same on all ranks: objects with state_dict() and load_state_dict().
        """
        for name, thing in things.items():
            check_resyncable(name, thing)
        self._exchange.resynced.update(things)

    def register_scaler(self, scaler: Any) -> None:
        """For mixed precision with torch.amp.GradScaler: an update that holds Inf is skipped on every rank.

            optimizer.register_scaler(scaler)
            ...
            scaler.scale(loss).backward()
            scaler.step(optimizer)      # is optimizer.step() now
            scaler.update()             # does nothing now: the scale follows the updates, on every rank

        p.grad holds unscaled gradients wherever you see the mean: after synchronize(), where scaler.unscale_(optimizer)
        does nothing more, and in on_update functions.
        """
        self._exchange.drive(scaler)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks of an optimizer before it steps it; one that is registered never does."""
        self._exchange.refuse_foreign_scaler()
        return bool(self.__dict__.get("_step_supports_amp_scaling", False))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """It belongs to this process and its engine."""
        raise UsageError(
            "a DistributedOptimizer cannot be copied or pickled: use state_dict(), and load_state_dict() of the other"
        )

    def _itself(self) -> DistributedStep:
        """For those that hold a proxy."""
        return self

    def _apply_update(self) -> None:
        self._opt_called = True  # what a scheduler looks at to find out whether step() was called
        super().step()


# torch.optim.Optimizer wraps the step() of a class in which it finds no such mark. The wrapped optimizer's own step()
# has it already, so its hooks run once for each update, and not once more around ours.
DistributedStep.step.hooked = True  # type: ignore[attr-defined]
