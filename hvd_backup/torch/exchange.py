"""The gradients of one optimizer on their way out and back: hooks, packing, handing over, and the results as p.grad.

Hooks on the parameters copy each gradient into its bucket as soon as autograd has it, and a complete bucket goes to the
engine while the backward pass goes on. In the first step nothing overlaps: the order in which gradients become ready is
only then known, and decides the buckets of all ranks. What it is not: the rules of step() (hvd_backup/updates.py) and
the face that users see (optimizer.py).
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hvd_backup import faults
from hvd_backup.context import Context
from hvd_backup.errors import UsageError
from hvd_backup.policy import Policy
from hvd_backup.resync import PackedState, pack, unpack
from hvd_backup.torch import data_plane, hyperparameters, resync
from hvd_backup.torch.buckets import Buckets, gradients_kept
from hvd_backup.torch.memory import checksum_of
from hvd_backup.torch.resync import TorchArrays
from hvd_backup.torch.scaling import DrivenScaler
from hvd_backup.torch.watched import WatchedParameters
from hvd_backup.training import Training

__all__ = ["ExchangeOptions", "GradientExchange"]

SCALER_NEVER_HEARS = (
    'a GradScaler with nonfinite="drop": it lowers its scale when it finds Inf in a mean gradient, but a gradient with '
    "Inf is left out of the mean, so the scale would only grow. Leave nonfinite out: an update that holds Inf is then "
    "skipped on every rank; or train with bfloat16, which needs no scale"
)


@dataclass(frozen=True)
class ExchangeOptions:
    """How gradients are packed.

    Attributes:
        bucket_bytes: see `buckets.plan`.
        prescale, postscale: factors before and after the mean.
        compression: as DistributedOptimizer's argument. Sparse gradients are sent dense.
        groups: which gradients go together, by index, or None: buckets of bucket_bytes.
        bucket_views: DistributedOptimizer's gradient_as_bucket_view.
        description: lines that must be equal on all ranks.
    """

    bucket_bytes: int
    prescale: float
    postscale: float
    compression: Any
    groups: list[list[int]] | None
    bucket_views: bool
    description: tuple[str, ...]


class Appliable(Protocol):
    """The optimizer."""

    param_groups: list[dict[str, Any]]

    def _apply_update(self) -> None:
        """Applies p.grad to the weights."""


class GradientExchange:
    """Owned by its optimizer.

    Attributes:
        training: the optimizer's updates and rounds.
        synchronized: synchronize() is done, complete() is not.
        passes: backward passes until a gradient is handed over.
        schedulers: called after each update.
        resynced: by name, what else goes along when a rank takes over the state of another one: state_dict() and
            load_state_dict().
    """

    def __init__(
        self,
        place: Context,
        policy: Policy,
        options: ExchangeOptions,
        named: Sequence[tuple[str, torch.Tensor]],
        optimizer: Appliable,
        passes: int,
    ) -> None:
        self.training = Training(place, policy, self)
        self.synchronized = False
        self.training.batches_per_update = self.passes = passes
        self.schedulers: list[Callable[[], None]] = []
        self.resynced: dict[str, Any] = {}
        self._place = place
        self._options = options
        self._watched = WatchedParameters(named)
        self._parameters = self._watched.all
        self._optimizer: Appliable = weakref.proxy(optimizer)
        self._buckets: Buckets | None = None
        self._first_order: list[int] = []
        self._sent: hyperparameters.Hyperparameters = []
        self._loaded = False
        self._for_user = False
        self._scaler: DrivenScaler | None = None
        self._versions_in_hand: list[int] | None = None
        self._start_afresh()
        for index in range(len(named)):
            self._register_hook(index)

    def _register_hook(self, index: int) -> None:
        """The hook must not keep this exchange alive: a new optimizer may take over the same parameters."""
        this = weakref.ref(self)

        def hook(_: torch.Tensor) -> None:
            exchange = this()
            if exchange is None:
                handle.remove()
            else:
                exchange.gradient_ready(index)

        parameter: Any = self._parameters[index]  # torch has no annotation for this method
        handle = parameter.register_post_accumulate_grad_hook(hook)

    def set_passes(self, passes: int) -> None:
        """Changes backward_passes_per_step between two gradients."""
        if self._started:
            raise UsageError("backward_passes_per_step was changed between backward() and step(): do it after step()")
        self.training.batches_per_update = self.passes = passes
        self._start_afresh()

    def _start_afresh(self) -> None:
        """The next gradient is awaited: nothing of it is there yet."""
        self._started = False
        self._passes_left = [self.passes] * len(self._parameters)
        self._packed = [False] * len(self._parameters)
        self._watched.start_afresh()
        if self._buckets is not None:
            self._buckets.start_afresh()

    # --- the gradient goes out ---

    def gradient_ready(self, index: int) -> None:
        """Called by autograd when the gradient of a parameter has been accumulated in p.grad."""
        if not self._started:
            self._start()
        if self._place.size == 1:  # nothing overlaps, so zero_grad() may forget it, as with Horovod
            return
        if self._passes_left[index] <= 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
                "backward_passes_per_step to accumulate gradients locally."
            )
        self._passes_left[index] -= 1
        if self._passes_left[index] > 0:
            return
        if self._buckets is not None:
            self._pack(self._buckets, index)
        else:
            self._first_order.append(index)
        self._watched.handed_over(index)

    def _start(self) -> None:
        self.training.check_usable()
        self.training.gradient_begins()
        if self.synchronized:
            if self.training.policy.may_leave_out:
                raise UsageError(
                    "backward() between synchronize() and step(): call step() in skip_synchronize() first. With backup "
                    "workers late ranks apply every update: for a GradScaler, which skips some, use "
                    "optimizer.register_scaler(scaler)"
                )
            self._skip()
        self._started = True
        faults.injected().sleep(self._place.rank, self.training.global_step, self._place.size)

    def synchronize(self, for_user: bool = False) -> None:
        """Hands over what the hooks have not, waits, and leaves the averaged gradients in p.grad.

        for_user: who may change them before complete(). So that late ranks get what was made of them, that must be
            known when the first gradient goes out.
        """
        self.training.check_usable()
        if not self._started:
            by_hand = any(parameter.grad is not None for parameter in self._parameters)
            if self.training.backup_workers > 0 or not by_hand:
                raise UsageError("step() without a gradient: call loss.backward() before every step()")
            self._start()
        self._watched.check_all_known(self._optimizer.param_groups)
        self._watched.check_untouched()
        if self._buckets is None:
            self._for_user = for_user
            self.open()
        assert self._buckets is not None
        for index, packed in enumerate(self._packed):
            if not packed:
                self._pack(self._buckets, index)
        self._submit(self._buckets, wait=True)
        self._check_hyperparameters()
        used = self.training.catch_up()
        if self.training.policy.late == "carry":
            self._carry(used)
        self._start_afresh()
        self.synchronized = True

    def _carry(self, used: list[bool]) -> None:
        """What was dropped is added to the next gradient, unless it holds NaN, which would never go away."""
        assert self._buckets is not None
        finite = [
            was_used or bool(bucket.contribution.isfinite().all())
            for bucket, was_used in zip(self._buckets.all, used, strict=True)
        ]
        if self.training.policy.scope == "step":
            finite = [all(finite)] * len(finite)
        for bucket, was_used, is_finite in zip(self._buckets.all, used, finite, strict=True):
            bucket.keep_residual(was_used, is_finite)

    def _pack(self, buckets: Buckets, index: int) -> None:
        """Puts a gradient into its bucket; a complete bucket goes out."""
        self._watched.check_unchanged(index)
        buckets.pack(index, show=self._options.bucket_views)
        self._packed[index] = True
        self._submit(buckets, wait=False)

    def _submit(self, buckets: Buckets, wait: bool) -> None:
        for sent in buckets.take_sent(wait):
            self.training.contribute(self._metadata)
            self.training.submit(*sent)

    def _metadata(self) -> bytes:
        if not self.training.policy.may_leave_out:
            return b""
        self._sent = hyperparameters.snapshot(self._optimizer.param_groups)
        return hyperparameters.encode(self._sent)

    def _check_hyperparameters(self) -> None:
        if not self.training.policy.may_leave_out:
            return
        now = hyperparameters.snapshot(self._optimizer.param_groups)
        if told := hyperparameters.changes(self._sent, now):
            raise UsageError(
                f"a hyperparameter was changed between backward() and step(): {told}. It has gone out with the "
                "gradient, and must be the same for all who apply the update: set it before backward(), or hand the "
                "scheduler over with optimizer.register_scheduler(scheduler)"
            )

    # --- Framework: what the training asks for ---

    def open(self) -> None:
        """Agrees with all ranks on the buckets, by the order in which gradients have become ready, if they have."""
        seen = set(self._first_order)
        order = self._first_order + [i for i in reversed(range(len(self._parameters))) if i not in seen]
        gradients = {index: parameter.grad for index, parameter in enumerate(self._parameters)}
        sparse = {i: g.sparse_dim() for i, g in gradients.items() if g is not None and g.is_sparse}
        policy = self.training.policy
        holds = self._for_user and policy.may_leave_out and policy.scope == "step"
        proposal = json.dumps({"order": order, "sparse": list(sparse.items()), "holds": holds}).encode()
        update_bytes = sum(p.numel() * p.element_size() for p in self._parameters)
        direct = data_plane.engage(self._place, policy, self._parameters)
        agreed = json.loads(self.training.open(self._description(), proposal, update_bytes, direct))
        options = self._options
        buckets = Buckets(
            self._parameters,
            agreed["order"],
            options.bucket_bytes,
            options.groups,
            options.compression,
            dict(agreed["sparse"]),
            options.prescale,
            direct,
            judged=policy.nonfinite == "drop",
        )
        if agreed["holds"]:
            self.training.hold()
        self.training.set_layout(buckets.layout(), buckets.result_addresses(), buckets)
        self._buckets = buckets
        self._watched.opened()

    def gradient_started(self) -> bool:
        """See Framework."""
        return self._started or self.synchronized

    def load(self, metadata: bytes, filled: list[bool], settled: bool) -> None:
        """See Framework."""
        assert self._buckets is not None
        if metadata:
            hyperparameters.install(self._optimizer.param_groups, hyperparameters.decode(metadata))
        self._buckets.show_results(1.0 if settled else self._options.postscale, filled, self.training.loads_own)
        if self._scaler is not None:
            if not settled:
                self._scaler.unscale()
            if self.training.holds:
                self._scaler.judge()
        self._loaded = True

    def settle(self) -> None:
        """See Framework."""
        assert self._buckets is not None
        self._buckets.settle_results()
        if self._scaler is not None:
            if not self._scaler.finite:
                self._buckets.spoil_result()  # it may look finite by now, clipped
            self._scaler.judge()
        self._buckets.store_results()

    def apply(self) -> None:
        """See Framework."""
        if self._scaler is not None:
            self._scaler.apply(held=self.training.holds)
        else:
            self._optimizer._apply_update()

    def applied(self) -> None:
        """See Framework."""
        assert self._buckets is not None
        self._buckets.results_loaded()
        for step in self.schedulers:
            step()

    def state(self, own: dict[str, Any]) -> PackedState:
        """See Framework."""
        return pack({"own": own, **resync.state_of(self._place, self._optimizer, self.resynced)}, TorchArrays())

    def load_state(self, memory: memoryview) -> dict[str, Any]:
        """See Framework."""
        state = unpack(memory, TorchArrays())
        resync.load(self._place, self._optimizer, self.resynced, state)
        own: dict[str, Any] = state["own"]
        return own

    @contextmanager
    def outside_step(self) -> Iterator[None]:
        """See Framework. p.grad shows no result buffer outside of step(), so nothing that it shows is overwritten."""
        try:
            with gradients_kept(self._parameters):
                yield
        finally:
            self._loaded = False

    # --- the end of a step ---

    def hand_to_user(self) -> None:
        """Between synchronize() and complete() the user may change gradients, unless late ranks would not get it."""
        unseen = self.training.policy.may_leave_out and not self.training.holds
        if self._buckets is not None and self._loaded and unseen:
            self._versions_in_hand = self._buckets.result_versions()

    def complete(self) -> None:
        """Applies what synchronize() has left in p.grad."""
        self.training.check_usable()
        assert self._buckets is not None
        before, self._versions_in_hand = self._versions_in_hand, None
        if before is not None and self._buckets.result_versions() != before:
            raise UsageError(
                "gradients were changed between synchronize() and step(). With backup workers late ranks apply this "
                "update, too, and get what was made of it only if synchronize() is called from the first step on, with "
                "scope='step'; otherwise use optimizer.on_update(fn, when='before'), which runs fn on every rank, for "
                "every update"
            )
        self.training.complete()
        self._end_step()

    def _skip(self) -> None:
        """The update is not applied, on any rank: a GradScaler has found Inf in the mean gradient, the same on all."""
        self._versions_in_hand = None
        self.training.skip()
        self._end_step()

    def _end_step(self) -> None:
        assert self._buckets is not None
        self.synchronized = False
        if self._loaded:
            self._buckets.results_loaded()
            self._buckets.exchange_roles()
            self.training.set_results(self._buckets.result_addresses())
            self._loaded = False

    def forget(self) -> None:
        """zero_grad() after backward(), with one rank: nothing has gone out."""
        if self._started and not self.synchronized:
            self._start_afresh()

    def extend(self, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """More parameters, from the next gradient on; all ranks are here, after the same update."""
        first = len(self._parameters)
        self._watched.extend(named)
        for index in range(first, len(self._parameters)):
            self._register_hook(index)
        self._buckets = None
        self._first_order = []
        self.training.reopen()
        self._start_afresh()

    @property
    def driven(self) -> bool:
        """Whether a scaler is registered."""
        return self._scaler is not None

    def drive(self, scaler: Any) -> None:
        """See DistributedStep.register_scaler."""
        if self.gradient_started():
            raise UsageError("register_scaler() between backward() and step(): call it before backward()")
        if self._scaler is not None:
            raise UsageError("register_scaler(): this optimizer has a scaler already")
        if self.training.holds:
            raise UsageError("register_scaler() after the first synchronize(): register it before the first step")
        if self.training.policy.late == "carry":
            raise UsageError('register_scaler() with late="carry": a carried gradient has the scale of its own step')
        if self.training.policy.nonfinite == "drop":
            raise UsageError(SCALER_NEVER_HEARS)
        self.resynced["scaler"] = scaler
        optimizer: Any = self._optimizer
        this: Any = weakref.proxy(self)
        self._scaler = DrivenScaler(
            scaler, optimizer._itself(), lambda: bool(this.synchronized), optimizer._apply_update
        )

    def refuse_foreign_scaler(self) -> None:
        """A GradScaler that is not driven by updates wants to step()."""
        if self.training.policy.nonfinite == "drop":
            raise UsageError(SCALER_NEVER_HEARS)
        if self.training.backup_workers > 0:
            raise UsageError(
                "a GradScaler that is not registered, with backup workers: a rank that is late would scale otherwise "
                "than the others. Call optimizer.register_scaler(scaler) once, before the first step; the rest stays"
            )

    def zero_in_buckets(self) -> None:
        """zero_grad() with gradient_as_bucket_view: gradients become zeros in the buffers that go out next."""
        if self._options.bucket_views and self._buckets is not None:
            self._buckets.show_zeros()

    def _beginning(self) -> list[str]:
        """What nobody would find out later: every rank would train a model of its own, or at a rate of its own.

        Of the first optimizer. To another one a rank that is late may come when the others have gone on. And with
        backup workers hyperparameters travel with each update.
        """
        told = "(alike after hvd.broadcast_parameters(model.state_dict(), 0))"
        lines = [f"weights with checksum {checksum_of(self._parameters)} {told}"]
        if not self.training.policy.may_leave_out:
            lines.append(f"hyperparameters {hyperparameters.snapshot(self._optimizer.param_groups)}")
        return lines

    def _description(self) -> list[str]:
        scaler = f"gradient scaler: {'registered' if self._scaler is not None else 'none'}"
        lines = [*self._options.description, scaler, *self._watched.describe()]
        return lines + (self._beginning() if self.training.begins_the_program() else [])
