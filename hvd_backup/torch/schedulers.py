"""Learning-rate schedulers that advance with the updates, not with the iterations of this rank's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hvd_backup.errors import UsageError

__all__ = ["take_over"]


def take_over(scheduler: Any, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Makes the user's scheduler.step() do nothing; returns what steps the scheduler now.

    The scheduler gets a class derived from its own, so that its state_dict stays what it was.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UsageError(
            "register_scheduler(ReduceLROnPlateau): it needs a value at each step: send it along with "
            "optimizer.metrics(loss=...), and use optimizer.on_update(lambda update: "
            "scheduler.step(update.metrics['loss']))"
        )
    own = getattr(scheduler, "optimizer", None)
    if not callable(getattr(scheduler, "step", None)) or own is None:
        raise UsageError(f"register_scheduler({type(scheduler).__name__}): expected a torch.optim.lr_scheduler")
    if own.param_groups is not optimizer.param_groups:
        raise UsageError("register_scheduler(): this scheduler was made for another optimizer")
    advance = type(scheduler).step
    if getattr(advance, "driven_by_updates", False):
        raise UsageError("register_scheduler(): this scheduler is registered already")

    def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        """The optimizer steps this scheduler after each update."""

    nothing.driven_by_updates = True  # type: ignore[attr-defined]
    scheduler.__class__ = type(type(scheduler).__name__, (type(scheduler),), {"step": nothing})

    def step() -> None:
        own._opt_called = True  # it asks the optimizer that it was made for whether step() comes first
        advance(scheduler)

    return step
