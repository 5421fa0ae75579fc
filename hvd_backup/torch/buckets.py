"""Gradients packed into flat buffers: which gradient lies where, and the two buffers of each bucket.

One buffer of a bucket holds this rank's contribution, the other takes the result; they change roles after each step. So
the averaged gradients that p.grad shows after step() lie where the next contribution is made, and a gradient that
autograd accumulates into them in place (zero_grad(set_to_none=False), gradient_as_bucket_view) needs no copy at all,
while the engine never writes into a buffer that p.grad shows outside of step(). On a GPU, each has a twin in host
memory for the engine (staging.py).

It knows no engine and no steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hvd_backup.torch import staging
from hvd_backup.torch.bucket_plan import plan
from hvd_backup.torch.compression import NoneCompressor
from hvd_backup.torch.staging import DTYPES
from hvd_backup.torch.wire import Wire

__all__ = ["Bucket", "Buckets", "dense_strides", "gradients_kept"]

PLACE_BYTES = 16  # a gradient's place in a bucket begins at a multiple of this: what a GPU's thread moves at once


def dense_strides(parameter: torch.Tensor) -> tuple[int, ...]:
    """The strides that autograd gives to a gradient of `parameter`: its own, unless those leave gaps or overlap."""
    return torch.empty_like(parameter, device="meta").stride()


@contextmanager
def gradients_kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it updates may be loaded and applied, without autograd; afterwards p.grad is what it was before."""
    shown = [parameter.grad for parameter in parameters]
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter, gradient in zip(parameters, shown, strict=True):
            parameter.grad = gradient


class Bucket:
    """One bucket, with views of the parameters' gradients in both of its buffers.

    Attributes:
        members: indices of its parameters, in the order in which their gradients lie in it.
        contribution, result: the buffers, one-dimensional, on the parameters' device.
        sent, received: those in host memory that the engine reads and writes; on the CPU the same.
        contribution_views, result_views: a tensor for each member, of its parameter's shape and strides. They
            share memory with the buffer but count their in-place changes (`_version`) each for itself.
        residual: what of this rank's gradients has been dropped and is to be added to the next contribution, or None.
        unpacked: how many gradients of the next contribution are not there yet.
    """

    def __init__(
        self, members: list[int], parameters: Sequence[torch.Tensor], dtype: torch.dtype, direct: bool, judged: bool
    ) -> None:
        self.members = members
        self._direct = direct
        self._device = parameters[members[0]].device
        self._transfers = staging.transfers_of(self._device)
        step = PLACE_BYTES // dtype.itemsize
        self._places, elements = [], 0
        for index in members:
            elements = -(-elements // step) * step
            self._places.append(elements)
            elements += parameters[index].numel()
        self.contribution, self.sent = self._buffers(elements, dtype)
        self.result, self.received = self._buffers(elements, dtype)
        self.contribution_views = self._views(self.contribution, parameters)
        self.result_views = self._views(self.result, parameters)
        self.residual: torch.Tensor | None = None
        self.unpacked = len(members)
        self._packed_on: set[Hashable] = set()  # streams
        self._packing = staging.Packing()  # not yet in the contribution
        self._sending: staging.Copy | None = None
        self._sent_on = 0
        self._loading: staging.Copy | None = None
        self._tally: torch.Tensor | None = None  # see Transfers.pack
        if direct and judged:
            self._tally, self._verdict = self._buffers(2, torch.int64)  # the latter in host memory

    def _buffers(self, elements: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = torch.zeros(elements, dtype=dtype, device=self._device)
        return buffer, buffer if self._transfers is None else self._transfers.host_memory(elements, dtype)

    def _views(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        views = []
        for index, place in zip(self.members, self._places, strict=True):
            parameter = parameters[index]
            view = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
            views.append(view.set_(buffer.untyped_storage(), place, parameter.shape, dense_strides(parameter)))
        return views

    def pack(self, slot: int, gradient: torch.Tensor | None, at_once: bool) -> None:
        """One more gradient goes into its place: on a GPU with all others in `send`, unless it has to be `at_once`.

        Args:
            slot: whose, of the members.
            gradient: of the parameter's shape; the view, if it lies there already; None counts as zero.
        """
        self.unpacked -= 1
        view = self.contribution_views[slot]
        if self._transfers is not None:
            self._packed_on.add(self._transfers.stream())
            self._packing.add(view if at_once else gradient, view)
            if not at_once:
                return
        if gradient is None:
            view.zero_()
        elif gradient is not view:
            view.copy_(gradient)

    def start_afresh(self) -> None:
        """Nothing of the next contribution is there yet."""
        self.unpacked = len(self.members)
        self._packed_on.clear()
        self._packing = staging.Packing()

    def exchange_roles(self) -> None:
        """The result becomes the next contribution's buffer, and the other way round."""
        self.contribution, self.result = self.result, self.contribution
        self.contribution_views, self.result_views = self.result_views, self.contribution_views
        self.sent, self.received = self.received, self.sent

    def send(self, prescale: float) -> None:
        """Scales what has been packed, adds what was dropped before, and starts on its way to the engine."""
        if self._transfers is not None:
            self._transfers.gather(self._packed_on, self._packing.tensors())
            self._transfers.pack(self._packing, self.contribution, prescale, self._tally)
            self._packing = staging.Packing()
        elif prescale != 1.0:
            self.contribution.mul_(prescale)
        if self.residual is not None:
            self.contribution.add_(self.residual)
            if self._tally is not None:
                staging.look_for_nonfinite(self.contribution, self._tally)
        if self._direct:
            assert self._transfers is not None
            self._sent_on = self._transfers.stream_address()
            if self._tally is not None:
                self._sending = self._transfers.to_host(self._tally, self._verdict)
        elif self._transfers is not None:
            self._sending = self._transfers.to_host(self.contribution, self.sent)

    def on_device(self) -> tuple[int, int, int, bool] | None:
        """If the engine gets it on the GPU: addresses of the contribution and for the result, the stream, and whether
        it is finite, if it is `judged`."""
        if not self._direct:
            return None
        finite = self._tally is None or int(self._verdict[1]) == 0
        return self.contribution.data_ptr(), self.result.data_ptr(), self._sent_on, finite

    def is_sent(self, wait: bool) -> bool:
        """Whether the engine may have it. wait: until it may."""
        if self._sending is not None and wait:
            self._sending.wait()
        if self._sending is not None and not self._sending.ended():
            return False
        self._sending = None
        return True

    def load(self, own: bool) -> None:
        """What was `received` becomes the result; it must not change before `loaded`.

        own: of an update that this rank has contributed to.
        """
        if self._transfers is not None and not (self._direct and own):
            self._loading = self._transfers.to_device(self.received, self.result)

    def widened(self, parameters: Sequence[torch.Tensor], scale: float) -> list[torch.Tensor]:
        """The result as gradients of the members, of their parameters' dtypes, times `scale`."""
        gradients = [
            torch.empty_like(view, dtype=parameters[index].dtype)
            for index, view in zip(self.members, self.result_views, strict=True)
        ]
        if self._transfers is None:
            staging.unpack(None, self.result, self.result_views, gradients, scale, 0)
        else:
            self._transfers.unpack(self.result, self.result_views, gradients, scale)
        return gradients

    def loaded(self) -> None:
        """Waits until `received` may change again."""
        if self._loading is not None:
            self._loading.wait()
            self._loading = None

    def store(self) -> None:
        """The result, which has been changed, takes the place of what was `received`."""
        if self._transfers is not None:
            self._transfers.to_host(self.result, self.received).wait()

    def keep_residual(self, used: bool, finite: bool) -> None:
        """What was contributed has been used, or was dropped: then it waits for the next contribution.

        finite: otherwise it is of no use, and what waited before goes on to.
        """
        if used:
            self.residual = None
        elif finite:
            self.residual = self.contribution.clone()


class Buckets:
    """All buckets of an optimizer, in the order in which they become complete.

    Args:
        parameters: in the order of the optimizer's groups.
        order, bucket_bytes, groups: see `plan`.
        compression: see `Wire`.
        sparse: the sparse dimensions of those gradients that are sparse, by index.
        prescale: a factor for what is sent.
        direct: the engine gets contributions on the GPU, and leaves there the results of updates with one.
        judged: it is told with them whether they are finite, so it gets them once that is known.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        order: Sequence[int],
        bucket_bytes: int,
        groups: Sequence[Sequence[int]] | None = None,
        compression: Any = NoneCompressor,
        sparse: Mapping[int, int] | None = None,
        prescale: float = 1.0,
        direct: bool = False,
        judged: bool = False,
    ) -> None:
        self._wires = [Wire(p, compression, (sparse or {}).get(i, 0)) for i, p in enumerate(parameters)]
        planned = plan(parameters, order, bucket_bytes, groups)
        self.all = [Bucket(members, parameters, self._wires[members[0]].dtype, direct, judged) for members in planned]
        self._parameters = parameters
        self._prescale = prescale
        self._shown: list[torch.Tensor | None] = [None] * len(parameters)
        self._sending: deque[int] = deque()  # in order
        home = {i: (b, slot) for b, bucket in enumerate(self.all) for slot, i in enumerate(bucket.members)}
        self._home = [home[i] for i in range(len(parameters))]

    def layout(self) -> list[tuple[int, str]]:
        """Elements and dtype name of each."""
        return [(bucket.contribution.numel(), DTYPES[bucket.contribution.dtype]) for bucket in self.all]

    def result_addresses(self) -> list[int]:
        """Where results go now."""
        return [bucket.received.data_ptr() for bucket in self.all]

    def pack(self, index: int, show: bool) -> None:
        """Puts p.grad of a parameter into its bucket, unless it lies there already. No gradient counts as zero.

        A bucket that this has completed is on its way: see `take_sent`.

        Args:
            show: p.grad becomes the view in the bucket.
        """
        number, slot = self._home[index]
        bucket = self.all[number]
        parameter = self._parameters[index]
        gradient, view = parameter.grad, bucket.contribution_views[slot]
        if gradient is not None and gradient is not view:
            gradient = self._wires[index].outgoing(gradient)
        bucket.pack(slot, gradient, at_once=show)
        if show and gradient is not None:
            parameter.grad = view
        if bucket.unpacked == 0:
            bucket.send(self._prescale)
            self._sending.append(number)

    def take_sent(self, wait: bool) -> Iterator[tuple[int, int, int, tuple[int, int, int, bool] | None]]:
        """Those that the engine can read by now, once, in the order in which they were sent.

        Args:
            wait: for all.

        Yields:
            Number of the bucket, address of the contribution, address for the result; and where it lies on the GPU, if
            the engine is to get it there: see Bucket.on_device.
        """
        while self._sending and self.all[self._sending[0]].is_sent(wait):
            number = self._sending.popleft()
            bucket = self.all[number]
            yield number, bucket.sent.data_ptr(), bucket.received.data_ptr(), bucket.on_device()

    def start_afresh(self) -> None:
        """Nothing of the next contribution is there yet."""
        self._sending.clear()
        for bucket in self.all:
            bucket.start_afresh()

    def show_results(self, postscale: float, filled: list[bool], own: bool) -> None:
        """Makes p.grad show the results, times `postscale`; zeros in a bucket that is not `filled`.

        own: of an update that this rank has contributed to.
        """
        for bucket, has_result in zip(self.all, filled, strict=True):
            if not has_result:
                bucket.result.zero_()
            else:
                bucket.load(own)
            if all(self._wires[index].is_widened for index in bucket.members):
                gradients = bucket.widened(self._parameters, postscale)
            else:
                if has_result and postscale != 1.0:
                    bucket.result.mul_(postscale)
                views = zip(bucket.members, bucket.result_views, strict=True)
                gradients = [self._wires[index].read(view) for index, view in views]
            for index, gradient in zip(bucket.members, gradients, strict=True):
                self._shown[index] = gradient
                if self._parameters[index].grad is not gradient:
                    self._parameters[index].grad = gradient

    def results_loaded(self) -> None:
        """Waits until other results may come. What is shown stays."""
        for bucket in self.all:
            bucket.loaded()

    def store_results(self) -> None:
        """What p.grad shows is what the engine keeps for late ranks."""
        for bucket in self.all:
            bucket.store()

    def settle_results(self) -> None:
        """What p.grad shows now, after the user has changed it, becomes the result. No gradient counts as zero."""
        for bucket in self.all:
            for index, view in zip(bucket.members, bucket.result_views, strict=True):
                gradient = self._parameters[index].grad
                if gradient is view:
                    continue
                if gradient is None:
                    view.zero_()
                else:
                    view.copy_(self._wires[index].outgoing(gradient))
                self._parameters[index].grad = self._wires[index].read(view)

    def spoil_result(self) -> None:
        """Marks the result as one that is not to be applied: whoever gets it finds a NaN."""
        bucket = self.all[0]
        bucket.result[0] = float("nan")
        index = bucket.members[0]
        self._parameters[index].grad = self._wires[index].read(bucket.result_views[0])

    def result_versions(self) -> list[int]:
        """Counts of in-place changes of what `show_results` shows; -1 where p.grad shows something else."""
        return [
            shown._version if shown is not None and parameter.grad is shown else -1
            for shown, parameter in zip(self._shown, self._parameters, strict=True)
        ]

    def show_zeros(self) -> None:
        """Makes p.grad show zeros, in the buffers where the next contribution is made."""
        for bucket in self.all:
            bucket.contribution.zero_()
            for index, view in zip(bucket.members, bucket.contribution_views, strict=True):
                self._parameters[index].grad = view

    def exchange_roles(self) -> None:
        """See Bucket."""
        for bucket in self.all:
            bucket.exchange_roles()
