"""A stand-in for a GPU's copies (hvd_backup.torch.staging.Transfers): tensors lie on the CPU, copies happen late.

As on a GPU, what is sent arrives only when somebody has waited for it or some time has passed, and until then host
memory holds other numbers; what a copy still needs must not change. Unlike there, what is used too early is found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterable, Sequence
from random import Random
from typing import Any

import torch

from hvd_backup import _core_testing as core
from hvd_backup import data_plane
from hvd_backup.torch import staging


def poison(dtype: torch.dtype) -> float:
    """What is in memory that nothing has been copied to."""
    return float("nan") if dtype.is_floating_point else -1


class HostLibrary:
    """The GPU library, its kernels run by the CPU (csrc/bindings/testing_gpu.cpp)."""

    @staticmethod
    def can_cast(gradient: str, wire: str) -> bool:
        return core.gpu_can_cast(gradient, wire)

    @staticmethod
    def pack(
        gradient: str,
        wire: str,
        gradients: Sequence[int],
        begins: Sequence[int],
        counts: Sequence[int],
        bucket: int,
        scale: float,
        device: int | None,
        stream: int,
        tally: int = 0,
    ) -> None:
        measured = core.gpu_pack(gradient, wire, gradients, begins, counts, bucket, scale, measured=tally != 0)
        if tally:
            _, squares, nonfinite = measured
            ctypes.c_double.from_address(tally).value = squares
            ctypes.c_uint64.from_address(tally + 8).value = nonfinite

    @staticmethod
    def unpack(*arguments: Any) -> None:
        core.gpu_unpack(*arguments[:-2])  # all but device and stream


class DelayedTransfers:
    """See Transfers. Counts what was asked for."""

    def __init__(self, seed: int = 0, streams: int = 2, device: Any = None) -> None:
        """streams: the caller's work goes to one of so many, another one each time that it is asked.

        device: as the engine uses it (_core_testing.HostDevice); None: it cannot.
        """
        self.device = device
        self.sent = self.loaded = self.fused = self.unpacked = 0
        self.ungathered: set[int] = set()  # streams whose work the next copy would not wait for
        self._rng = Random(seed)
        self._streams = streams
        self._current = 0
        self._running: list[DelayedCopy] = []

    def host_memory(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((elements,), poison(dtype), dtype=dtype)

    def stream(self) -> Hashable:
        self._current = (self._current + 1) % self._streams
        self.ungathered.add(self._current)
        return self._current

    def stream_address(self) -> int:
        return 0

    def engine_device(self, nccl_library: str) -> data_plane.Gpu:
        return self.device, "" if self.device else "the engine cannot use it"

    def gather(self, streams: Iterable[Hashable], tensors: Iterable[torch.Tensor]) -> None:
        self.ungathered -= set(streams)  # type: ignore[arg-type]

    def pack(
        self, packing: staging.Packing, bucket: torch.Tensor, scale: float, tally: torch.Tensor | None = None
    ) -> None:
        assert not self.ungathered, "packing that may overtake what makes a gradient"
        self.fused += packing.pack(staging.library(), bucket, scale, 0, tally)

    def unpack(
        self, bucket: torch.Tensor, views: list[torch.Tensor], gradients: list[torch.Tensor], scale: float
    ) -> None:
        self.unpacked += staging.unpack(staging.library(), bucket, views, gradients, scale, 0)

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> DelayedCopy:
        assert not self.ungathered, "a copy that may overtake what packs its source"
        self.sent += 1
        for copy in [copy for copy in self._running if copy.source.data_ptr() == target.data_ptr()]:
            self.run_until(copy)  # it comes before this one
        target.fill_(poison(target.dtype))
        return self._start(source, lambda: target.copy_(source))

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> DelayedCopy:
        self.loaded += 1
        target.copy_(source)  # what follows on the device comes after it
        return self._start(source, lambda: None)

    def _start(self, source: torch.Tensor, arrive: Callable[[], object]) -> DelayedCopy:
        self._running.append(copy := DelayedCopy(self, source, arrive))
        return copy

    def run_until(self, last: DelayedCopy) -> None:
        """In the order of one stream."""
        while last in self._running:
            self._running.pop(0).arrives()

    def time_passes(self) -> None:
        if self._running and self._rng.random() < 0.3:
            self.run_until(self._running[0])

    def has_ended(self, copy: DelayedCopy) -> bool:
        return copy not in self._running


class DelayedCopy:
    """See Copy."""

    def __init__(self, transfers: DelayedTransfers, source: torch.Tensor, arrive: Callable[[], object]) -> None:
        self._transfers = transfers
        self.source, self._was = source, source.clone()
        self._arrive = arrive

    def arrives(self) -> None:
        same = torch.equal(self.source.view(torch.uint8), self._was.view(torch.uint8))
        assert same, "what a copy was to move has changed before it had ended"
        self._arrive()

    def ended(self) -> bool:
        self._transfers.time_passes()
        return self._transfers.has_ended(self)

    def wait(self) -> None:
        self._transfers.run_until(self)


def use(transfers: staging.Transfers | None, library: Any = HostLibrary) -> None:
    """From now on gradients on the CPU travel like those on a GPU.

    library: the GPU library; None: hvd_backup was built without it.
    """
    staging.transfers_of = lambda device: transfers  # type: ignore[assignment]
    staging.library = lambda: library  # type: ignore[assignment]
