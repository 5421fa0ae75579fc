"""Gradient scaling of mixed precision (torch.amp.GradScaler), driven by the updates and not by this rank's own loop.

Whether an update holds Inf or NaN follows from the mean gradient, which is the same on all ranks; so every rank, late
ones too, skips the same updates and keeps the same scale. PyTorch's own scaler does the work, through its public calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hvd_backup.errors import UsageError

__all__ = ["DrivenScaler"]


class DrivenScaler:
    """A GradScaler that the updates of one optimizer drive.

    The user's calls of scaler.step(optimizer) become optimizer.step(), and scaler.update() does nothing. The scaler
    gets a class derived from its own, so that its state_dict stays what it was.

    Each update is either unscaled here and applied, unless the scaler finds Inf or NaN in it; or it is `held`: the
    contributors may change it (clip it) after it was unscaled, and send late ranks what they have made of it. Then what
    counts is whether it is `finite` before and after the change.

    Args:
        scaler: the user's.
        optimizer: that it is registered with.
        synchronized: whether p.grad holds the mean gradient.
        apply: applies p.grad to the weights.

    Attributes:
        finite: what `judge` found.
    """

    def __init__(
        self,
        scaler: Any,
        optimizer: torch.optim.Optimizer,
        synchronized: Callable[[], bool],
        apply: Callable[[], None],
    ) -> None:
        kind: Any = type(scaler)
        if not all(callable(getattr(scaler, name, None)) for name in ("scale", "unscale_", "step", "update")):
            raise UsageError(f"register_scaler({kind.__name__}): expected a torch.amp.GradScaler")
        if getattr(kind, "driven_by_updates", False):
            raise UsageError("register_scaler(): this scaler is registered already: use one scaler for each optimizer")
        self.finite = True
        self._kind = kind
        self._scaler = scaler
        self._optimizer = optimizer
        self._target = _Target(optimizer, apply)
        device = next(self._parameters()).device
        self._probe = torch.zeros(1, device=device, requires_grad=True)

        def step(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            """The optimizer skips the update on every rank when it holds Inf or NaN."""
            return given.step(*args, **kwargs) if given is optimizer else kind.step(self, given, *args, **kwargs)

        def unscale_(self: Any, given: Any) -> None:
            """The mean gradient is unscaled already."""
            if given is not optimizer:
                kind.unscale_(self, given)
            elif not synchronized():
                raise UsageError(
                    "scaler.unscale_() of a registered scaler before optimizer.synchronize(): what is unscaled is the "
                    "mean gradient. Clip it after synchronize(), or in optimizer.on_update(fn, when='before')"
                )

        def update(self: Any, new_scale: Any = None) -> None:
            """The optimizer updates this scaler after each update."""
            if new_scale is not None:
                kind.update(self, new_scale)

        methods = {"step": step, "unscale_": unscale_, "update": update, "driven_by_updates": True}
        scaler.__class__ = type(kind.__name__, (kind,), methods)
        # It makes its scale when it first scales something, which a rank that is late may not have done yet.
        scaler.scale(torch.ones(1, device=device))

    def unscale(self) -> None:
        """p.grad becomes the gradient of the loss that was not scaled."""
        if self._scaler.is_enabled():
            self._kind.unscale_(self._scaler, self._target)

    def judge(self) -> None:
        """Looks whether p.grad is finite."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        self.finite = not self._scaler.is_enabled() or all(bool(g.isfinite().all()) for g in dense)

    def apply(self, held: bool) -> None:
        """Applies p.grad, unless it held Inf or NaN, and updates the scale."""
        target = self._target
        if held and self._scaler.is_enabled():
            self._probe.grad = torch.full_like(self._probe, 0.0 if self.finite else float("nan"))
            target = _Target(torch.optim.SGD([self._probe]), target.step)
            self._kind.unscale_(self._scaler, target)
        self._kind.step(self._scaler, target)
        self._kind.update(self._scaler)

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])


class _Target:
    """An optimizer as the scaler sees it: its step() is the update alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, apply: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self.step = apply

    @property
    def param_groups(self) -> Any:
        return self._optimizer.param_groups
