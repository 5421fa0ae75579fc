"""What an optimizer tells about an update that it has applied: data only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvd_backup._core import Update

__all__ = ["AppliedUpdate", "describe_update"]


@dataclass(frozen=True)
class AppliedUpdate:
    """One update, as `optimizer.last_update` and the functions given to `optimizer.on_update` see it.

    Everything but `contributed`, `caught_up`, `resynced` and `dropped` is the same on all ranks.

    Attributes:
        step: its number in this run, from 0; -1 as long as there was none.
        contributors: the ranks whose gradients it holds, ascending. With scope="bucket": those in every bucket.
        by_scope: the same for each scope: one entry with scope="step", one for each bucket with scope="bucket".
        required: N, how many contributors it waited for. With backup_workers="auto" it changes.
        samples: sum of the contributors' `samples` (the effective batch). With scope="bucket": of the first bucket.
        contributed: this rank's gradient is in it (in all of its buckets).
        caught_up: how many updates without this rank's gradient the last step() has applied; while the functions of
            `on_update` run, how many before this one.
        resynced: how many updates the last step() has not applied, because they were not kept any more: this rank has
            taken over the state of another one in place of them (on_max_lag="resync").
        metrics: for each name given to `metrics()`, the mean over the contributors that gave a number for it, weighted
            with their samples; NaN when none did.
        dropped: the gradient that the last step() handed over was not used, at least not whole.
    """

    step: int = -1
    contributors: tuple[int, ...] = ()
    by_scope: tuple[tuple[int, ...], ...] = ()
    required: int = 0
    samples: float = 0.0
    contributed: bool = False
    caught_up: int = 0
    resynced: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: bool = False


def describe_update(
    update: Update, earlier_steps: int, gradient_scopes: int, caught_up: int, metrics: Mapping[str, float]
) -> AppliedUpdate:
    """The core's account of an update in the user's terms.

    Args:
        update: from the core, which counts the steps of a channel.
        earlier_steps: those before this channel.
        gradient_scopes: how many scopes hold gradients.
        caught_up, metrics: see AppliedUpdate.
    """
    by_scope = tuple(tuple(ranks) for ranks in update.contributors[:gradient_scopes])
    everywhere = set(by_scope[0]).intersection(*by_scope[1:]) if by_scope else set()
    return AppliedUpdate(
        step=earlier_steps + update.step,
        contributors=tuple(sorted(everywhere)),
        by_scope=by_scope,
        required=update.required,
        samples=update.samples,
        contributed=update.contributed,
        caught_up=caught_up,
        metrics=metrics,
    )


def no_update_yet(names: tuple[str, ...]) -> AppliedUpdate:
    """What stands in for the last update before the first one."""
    return AppliedUpdate(metrics=dict.fromkeys(names, math.nan))
