"""A Training whose steps run inside TensorFlow's graphs, where no Python of ours is called.

What the base class notes step by step in Python, the stream of the ops has counted: how many steps there were, and what
the last update was. Rounds are the base class's own.
"""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import Any, Protocol

from hvd_backup.applied import AppliedUpdate, describe_update
from hvd_backup.context import Context
from hvd_backup.policy import Policy
from hvd_backup.tensorflow.streams import Stream
from hvd_backup.training import Training

__all__ = ["GraphFramework", "GraphTraining"]


class GraphFramework(Protocol):
    """What an optimizer does for its training: hvd_backup/keras/tensorflow_updates.py."""

    def open(self) -> None:
        """Opens the channel: a round ends before the first step."""

    def gradient_started(self) -> bool:
        """Between the gradient and its update; not from outside, as both are one call."""

    def take_updates(self, one: bool) -> None:
        """Applies what this rank has missed, all or just one update, in a graph."""


class GraphTraining(Training):
    """See the module."""

    _stream: Stream | None = None
    _taken_over: AppliedUpdate  # the last update of the rank whose state it was, or that there was none yet
    _resynced_in = -2  # after so many steps, in the next one

    def __init__(self, place: Context, policy: Policy, framework: GraphFramework) -> None:
        self._settled = {"calls": 0, "leftovers": 0}  # before the last round that has ended
        super().__init__(place, policy, framework)  # type: ignore[arg-type]  # what it would call is overridden here

    def attach(self, stream: Stream) -> None:
        """The channel is open, and `stream` is its other side."""
        self._stream = stream
        stream.set_samples(self._samples)

    def _account(self) -> dict[str, Any]:
        return {"calls": 0, "leftovers": 0, "kind": ""} if self._stream is None else self._stream.account()

    # --- what the base class counts ---

    @property
    def step_calls(self) -> int:
        """How many steps have ended."""
        return int(self._account()["calls"])

    @step_calls.setter
    def step_calls(self, value: int) -> None:
        pass  # the base class begins to count

    @property
    def last_update(self) -> AppliedUpdate:
        """The newest update applied here, or that of a state taken over, and what became of the last gradient."""
        told = self._account()
        newest = self._taken_over
        if self._earlier_steps + told.get("step", -1) > newest.step:
            update: Any = SimpleNamespace(**told)
            means = self._metrics.means(has_result=len(update.contributors[-1]) > 0)
            newest = describe_update(update, self._earlier_steps, self._gradient_scopes, 0, means)
        return dataclasses.replace(
            newest,
            caught_up=told.get("caught_up", 0),
            dropped=told.get("dropped", False),
            resynced=self._resynced if told["calls"] - self._resynced_in <= 1 else 0,
        )

    @last_update.setter
    def last_update(self, value: AppliedUpdate) -> None:
        self._taken_over = value

    @property
    def _plain_steps(self) -> bool:
        """Since the last round there were steps without follow."""
        return not self._following and not self._abandoned and self.step_calls > self._settled["calls"]

    @_plain_steps.setter
    def _plain_steps(self, value: bool) -> None:
        self._settled["calls"] = self.step_calls

    @property
    def _leftovers(self) -> int:
        """Gradients dropped since another rank has ended the round."""
        return int(self._account()["leftovers"]) - self._settled["leftovers"]

    @_leftovers.setter
    def _leftovers(self, value: int) -> None:
        self._settled["leftovers"] = int(self._account()["leftovers"])

    def finish_round(self, wait: bool) -> bool:
        """See the base class."""
        over = super().finish_round(wait)
        if over:  # what was dropped in a followed round is as it should be
            self._plain_steps, self._leftovers = False, 0
        return over

    # --- samples, metrics and updates ---

    @property
    def metric_names(self) -> tuple[str, ...]:
        """In the order in which they travel."""
        return self._metrics.names

    def metrics_buffers(self) -> list[tuple[int, int, int]]:
        """Of the bucket after those of the gradients, if any: bytes, and the addresses (contribution, result)."""
        metrics = self._metrics
        if not metrics.elements:
            return []
        return [(8 * metrics.elements, metrics.contribution_address, metrics.result_address)]

    @property
    def samples(self) -> float:
        """This rank's weight in the mean."""
        return self._samples

    @samples.setter
    def samples(self, value: float) -> None:
        Training.samples.fset(self, value)  # type: ignore[attr-defined]
        if self._stream is not None:
            self._stream.set_samples(self._samples)

    def resync(self, take_over: bool) -> None:
        """What the base class does in `_wait`; called from within the graph."""
        if take_over:
            if self._resynced_in != self.step_calls:
                self._resynced_in, self._resynced = self.step_calls, 0
            self._take_over(self.opened.step)
        else:
            for stream in self._streams():
                stream.serve()

    def serve(self, leaving: bool = False) -> None:
        """See the base class. The thread that runs this part of a graph is one of TensorFlow's."""
        self._thread = threading.get_ident()
        super().serve(leaving)

    def wait_outside_step(self, one: bool = False) -> str:
        """See the base class."""
        framework: Any = self._framework
        framework.take_updates(one)
        return str(self._account()["kind"])
