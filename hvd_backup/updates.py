"""One optimizer's updates as its training thread lives them: open the channel, contribute, catch up, apply.

Framework-neutral: what needs tensors is done by the framework's optimizer (the Framework protocol). It knows no engine
but the channel, and no rounds (those are in training.py, whose Training is what an optimizer owns).

A step is   contribute (when the first bucket is ready), submit each bucket, catch_up, complete.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from hvd_backup import context, failures
from hvd_backup._core import Channel, Update
from hvd_backup.applied import AppliedUpdate, describe_update, no_update_yet
from hvd_backup.context import Context
from hvd_backup.errors import HvdBackupError, UsageError
from hvd_backup.metrics import Metrics
from hvd_backup.policy import Policy
from hvd_backup.resync import PackedState, memory_at

__all__ = ["Framework", "UpdateStream"]

UpdateFunction = Callable[[AppliedUpdate], object]


class Framework(Protocol):
    """What an optimizer does for its stream of updates."""

    def open(self) -> None:
        """Opens the stream (`UpdateStream.open`, `set_layout`): a round ends before the first step()."""

    def gradient_started(self) -> bool:
        """Between backward() and step(): a gradient has been computed, or an averaged one waits to be applied."""

    def load(self, metadata: bytes, filled: list[bool], settled: bool) -> None:
        """Makes the result buffers the gradients, and the hyperparameters in `metadata`, if any, those of the update.

        Args:
            metadata: what the first contributor has sent; empty when the first bucket is not filled.
            filled: for each bucket, whether there is a result; without one (all its contributors have left) it counts
                as zero.
            settled: the contributors have made of the results what they apply (`UpdateStream.hold`).
        """

    def settle(self) -> None:
        """Makes the gradients, as the user may have changed them, the contents of the result buffers."""

    def apply(self) -> None:
        """Applies what was loaded to the weights."""

    def applied(self) -> None:
        """An update has been applied, and the functions of on_update have run: learning-rate schedulers."""

    def state(self, own: dict[str, Any]) -> PackedState:
        """All that updates depend on, and `own`: for a rank beyond the journal. Used before anything changes."""

    def load_state(self, memory: memoryview) -> dict[str, Any]:
        """Makes the state of another rank that of this one, in place; returns its `own`."""

    def outside_step(self) -> AbstractContextManager[object]:
        """Within it updates may be loaded and applied; afterwards the gradients are what they were before."""


class UpdateStream:
    """The updates of one channel.

    Attributes:
        policy, backup_workers: the rules, and b.
        channel: None before the first step().
        step_calls: how many steps have been completed, with or without success.
        last_update: the newest update applied here, and what became of the last gradient.
        before_update, after_update: functions that run for every update.
    """

    def __init__(self, name: str, place: Context, policy: Policy, framework: Framework) -> None:
        self.channel: Channel | None = None  # first, so that it goes before the buffers that it uses
        self.policy = policy
        self.backup_workers = policy.backup_workers
        self.step_calls = 0
        self.last_update = no_update_yet(())
        self.before_update: list[UpdateFunction] = []
        self.after_update: list[UpdateFunction] = []
        self._name = name
        self._place = place
        self._framework: Framework = weakref.proxy(framework)  # which owns this stream
        self._metrics = Metrics()
        self._buffers: object = None
        self._samples = 1.0
        self._global_step_base = 0
        self._earlier_steps = 0  # of channels before this one, and their counters
        self._earlier_counters = {"contributed": 0, "dropped": 0, "caught_up": 0, "resynced": 0}
        self._reopened = 0
        self._gradient_buckets = 0
        self._gradient_scopes = 1
        self._contributing = False
        self._own: Update | None = None
        self._holds = False
        self._on_device = False
        self._caught_up = 0
        self._resynced = 0  # likewise: updates of which the last step has taken over the outcome
        self._resynced_before = 0  # the channel's counter, before the last step
        self._thread = threading.get_ident()  # which takes the steps
        self._torn = ""

    # --- opening ---

    def open(self, description: Sequence[str], proposal: bytes, update_bytes: int, on_device: bool = False) -> bytes:
        """Opens the channel; returns the proposal that all ranks use.

        Waits for all ranks, so that differences are found before the first step, unless another optimizer is at work:
        a rank that was late there may be one step from coming here, which it can take only when the others go on.

        Args:
            description: lines that must be equal on all ranks, besides policy and metrics.
            proposal: anything; all ranks get that of the lowest rank.
            update_bytes: bytes of one update.
            on_device: gradients are handed over on the GPU that the engine uses.

        Raises:
            HvdBackupError: on every rank, when the descriptions differ; names the first difference and the ranks.
        """
        self._metrics.freeze()
        metrics = "metrics " + (", ".join(self._metrics.names) or "none")
        self.channel = self._place.engine.open(
            self._name + (f"[{self._reopened}]" if self._reopened else ""),
            "training",
            "\n".join([*description, self.policy.description(), metrics]),
            proposal,
            self.policy.required,
            grace_us=self.policy.grace_us,
            max_misses=self.policy.max_misses,
            max_lag=self.policy.lag_bound(update_bytes),
            arrive=self.policy.arrive,
            wait_for_all=self._is_alone(),
            automatic=self.policy.automatic,
            drop_nonfinite=self.policy.nonfinite == "drop",
            resync=self.policy.on_max_lag == "resync",
            on_device=on_device,
        )
        self._on_device = on_device
        return self.channel.proposal

    def set_layout(self, buckets: Sequence[tuple[int, str]], results: Sequence[int], buffers: object) -> None:
        """Tells the channel its buckets.

        Args:
            buckets: elements and dtype name of each.
            results: addresses, as for `set_results`.
            buffers: what owns the memory; kept until the channel has gone.
        """
        layout = list(buckets)
        per_bucket = self.policy.scope == "bucket"
        self._buffers = buffers
        self._gradient_buckets = len(layout)
        self._gradient_scopes = len(layout) if per_bucket else 1
        if self._metrics.elements:
            layout.append((self._metrics.elements, "float64"))
        scopes = list(range(len(layout))) if per_bucket else [0] * len(layout)
        on_device = [self._on_device and b < self._gradient_buckets for b in range(len(layout))]
        self.opened.set_layout(layout, scopes, on_device)
        self.opened.measure(self._gradient_buckets)
        self.last_update = no_update_yet(self._metrics.names)
        self.set_results(results)

    def set_results(self, results: Sequence[int]) -> None:
        """Where missed updates go: an address for each bucket, the same that the next `submit` names."""
        extra = [self._metrics.result_address] if self._metrics.elements else []
        self.opened.set_results([*results, *extra])

    @property
    def framework(self) -> Framework:
        """Who does what needs tensors; a proxy, which does not keep it alive."""
        return self._framework

    @property
    def opened(self) -> Channel:
        """The channel, which must be there."""
        assert self.channel is not None, "the channel is used before open()"
        return self.channel

    def hold(self) -> None:
        """To be called after open(): gradients may be changed between catch_up() and complete(), by all contributors
        alike; late ranks get what was made of them."""
        self.opened.hold()
        self._holds = True

    @property
    def holds(self) -> bool:
        """Whether `hold` was called for the channel that is open."""
        return self._holds

    # --- what the user gives and asks ---

    @property
    def samples(self) -> float:
        """This rank's weight in the mean."""
        return self._samples

    @samples.setter
    def samples(self, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several elements
            number = 0.0
        if not (math.isfinite(number) and number > 0):
            raise UsageError(f"samples={value!r}: expected a finite number above 0 (len(x), say)")
        if number != self._samples and self._framework.gradient_started():
            raise UsageError("samples was changed between backward() and step(): set it before backward()")
        self._samples = number

    def metrics(self, scalars: dict[str, Any]) -> None:
        """See `Metrics.give`."""
        self._metrics.give(scalars)

    @property
    def step(self) -> int:
        """Updates taken in this run."""
        return self._earlier_steps + (self.channel.step if self.channel is not None else 0)

    @property
    def global_step(self) -> int:
        """Updates behind these weights: those of this run, and those of the checkpoint that it began with."""
        return self._global_step_base + self.step

    @global_step.setter
    def global_step(self, value: int) -> None:
        self._global_step_base = value - self.step

    def counters(self) -> dict[str, int]:
        """contributed, dropped (gradients of this rank), caught_up, resynced (updates)."""
        now = self.channel.counters() if self.channel is not None else {}
        return {name: count + now.get(name, 0) for name, count in self._earlier_counters.items()}

    @property
    def alone(self) -> bool:
        """Whether there is but one rank."""
        return self._place.size == 1

    def reopen(self) -> None:
        """The layout changes: what comes next is a channel of its own. All ranks are here, after the same update."""
        self._metrics.thaw()
        if self.channel is None:
            return
        self._earlier_steps, self._earlier_counters = self.step, self.counters()
        self._reopened += 1
        self._resynced_before = 0
        self._holds = False
        self.channel = None

    # --- a step ---

    def check_usable(self) -> None:
        """Raises unless the engine that this optimizer was made with runs, and its weights are those of all."""
        self._place.check_process()
        if context.current() is not self._place:
            raise UsageError("this optimizer was made before shutdown(): make a new DistributedOptimizer after init()")
        if self._torn:
            raise HvdBackupError(self._torn)

    def contribute(self, metadata: Callable[[], bytes]) -> None:
        """Before the first submit() of a step; does nothing later in it. metadata: called for what goes with it."""
        if not self._contributing:
            self.opened.begin(self._samples, metadata())
            self._contributing = True

    def submit(
        self, bucket: int, contribution: int, result: int, on_device: tuple[int, int, int, bool] | None = None
    ) -> None:
        """Hands over a bucket of gradients, by address.

        on_device: where it lies on the GPU: contribution, result, and the stream that makes the contribution; and with
        nonfinite="drop" whether it is finite.
        """
        if on_device is None:
            self.opened.submit(bucket, contribution, result)
        else:
            self.opened.submit_on_device(bucket, contribution, result, *on_device)

    @property
    def loads_own(self) -> bool:
        """Whether the update that the framework is to load is one that this rank has contributed to, in all buckets."""
        return self._own is not None

    def catch_up(self) -> list[bool]:
        """Applies all missed updates, and loads the one that the gradient handed over is part of, if it is.

        Returns:
            For each bucket of gradients, whether it became part of an update.
        """
        channel = self.opened
        if self._metrics.elements:
            channel.submit(self._gradient_buckets, *self._metrics.pack())
        base = channel.step
        used = [False] * self._gradient_buckets
        self._caught_up = self._resynced = 0
        self._own = None
        while (update := self._wait()).kind == "update":
            if update.step == base:
                used = self._by_bucket(update, lambda ranks: self._place.rank in ranks)
            if update.contributed:
                self._own = update
                break
            self._apply(update)
        self._contributing = False
        if self._own is not None:
            self._load(self._own, settled=False)
        elif update.kind == "over" and channel.step == base:
            self._dropped_after_end()
        return used

    def complete(self) -> None:
        """Ends the step: applies what catch_up() has loaded. Without that, the gradient was dropped."""
        own, self._own = self._own, None
        if own is not None:
            if self._holds:
                self._framework.settle()
                self.opened.commit()
            self._apply_loaded(own)
        self.step_calls += 1
        self.last_update = dataclasses.replace(
            self.last_update, caught_up=self._caught_up, resynced=self._resynced, dropped=own is None
        )

    def skip(self) -> None:
        """Ends the step without applying what catch_up() has loaded; with b = 0 only, so there is nothing held."""
        self._own = None
        self.step_calls += 1
        self.last_update = dataclasses.replace(self.last_update, caught_up=self._caught_up, dropped=True)

    def wait_outside_step(self, one: bool = False) -> str:
        """Applies what this rank has missed, all or just one update; returns the kind of the last one."""
        with self._framework.outside_step():
            self._caught_up = self._resynced = 0
            while (update := self._wait(one)).kind == "update":
                self._apply(update)
                if one:
                    break
        return update.kind

    # --- ranks beyond the journal ---

    def serve(self, leaving: bool = False) -> None:
        """Makes a copy of the state for others, if it is wanted, and if no update is half applied right now.

        leaving: this rank is about to leave for good.
        """
        channel = self.channel
        if channel is None or self._own is not None or self._torn or self._thread != threading.get_ident():
            return
        if channel.state_wanted_at_exit if leaving else channel.state_wanted:
            own = {"global_step": self.global_step, "last_update": self.last_update}
            packed = self._framework.state(own)  # which owns what its parts point to
            channel.offer_state(packed.parts)

    def _wait(self, one: bool = False) -> Update:
        """What channel.wait() gives; serves other ranks, and takes over the state of another one, on the way.

        one: this, too, counts as what has come, so that it does not wait for more.
        """
        self._thread = threading.get_ident()
        while True:
            with failures.reported():
                update = self.opened.wait()
            if update.kind == "offer":
                for stream in self._streams():
                    stream.serve()
            elif update.kind == "resync":
                self._take_over(update.step)
            if one or update.kind not in ("offer", "resync"):
                return update

    def _streams(self) -> Sequence[UpdateStream]:
        """Of this program."""
        return [self]

    def _take_over(self, step: int) -> None:
        """The state of another rank is here: this rank goes on as if it were that one, after update `step` - 1."""
        self._torn = (
            f"an exception ended an earlier call while it took over the state of another rank at step {step}, so the "
            "weights of this rank are those of nobody: end the program"
        )
        with failures.unbroken():
            own = self._framework.load_state(memory_at(*self.opened.state()))
        self.global_step = own["global_step"]
        contributed = self._place.rank in own["last_update"].contributors
        self.last_update = dataclasses.replace(own["last_update"], contributed=contributed)
        total = self.opened.counters()["resynced"]
        self._resynced += total - self._resynced_before
        self._resynced_before = total
        self._torn = ""

    # --- inside ---

    def _is_alone(self) -> bool:
        """No other optimizer of this program is at work."""
        return True

    def _dropped_after_end(self) -> None:
        """The gradient was dropped because its round was over."""

    def _by_bucket(self, update: Update, holds: Callable[[list[int]], bool]) -> list[bool]:
        """For each bucket of gradients, whether something holds for its contributors."""
        verdicts = [holds(ranks) for ranks in update.contributors[: self._gradient_scopes]]
        return verdicts if self.policy.scope == "bucket" else verdicts * self._gradient_buckets

    def _apply(self, update: Update) -> None:
        self._load(update, settled=self._holds)
        self._apply_loaded(update)
        self._caught_up += 1

    def _load(self, update: Update, settled: bool) -> None:
        self._torn = _torn(update)
        self._framework.load(update.metadata, self._by_bucket(update, lambda ranks: len(ranks) > 0), settled)
        self._torn = ""

    def _apply_loaded(self, update: Update) -> None:
        means = self._metrics.means(has_result=len(update.contributors[-1]) > 0)
        applied = describe_update(update, self._earlier_steps, self._gradient_scopes, self._caught_up, means)
        with failures.unbroken():
            self._torn = _torn(update)
            for function in self.before_update:
                function(applied)
            self._framework.apply()
            self.last_update = applied
            for function in self.after_update:
                function(applied)
            self._framework.applied()
            self._torn = ""


def _torn(update: Update) -> str:
    return (
        f"an exception ended an earlier call while it applied update {update.step}, so the weights of this rank are no "
        "longer those of the others: end the program, or load a checkpoint into new optimizers on all ranks"
    )
