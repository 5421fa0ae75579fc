"""Buckets of gradients on a GPU, on their way to the engine and back, through pinned host memory.

    gradients -> contribution (GPU) -> sent (pinned) -> engine -> received (pinned) -> result (GPU) -> p.grad

Copies go over a stream of our own, which waits for what produced the data; whoever uses a result on the GPU waits for
the copy there. The host waits in two places only: a contribution is handed to the engine when it has arrived in host
memory, and the next result is asked for when the last one has left it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from typing import Protocol

import torch

from hvd_backup.errors import UsageError

__all__ = ["Copy", "CudaTransfers", "Transfers", "is_supported", "transfers_of"]


class Copy(Protocol):
    """One copy that was started."""

    def ended(self) -> bool:
        """Whether the data is there."""

    def wait(self) -> None:
        """Blocks until it is."""


class Transfers(Protocol):
    """Copies between one device and the host. Calls follow each other in the order of one stream."""

    def host_memory(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros, in host memory from and to which copies need not be waited for."""

    def stream(self) -> Hashable:
        """Where the caller's work on the device goes now."""

    def gather(self, streams: Iterable[Hashable]) -> None:
        """What the caller does next comes after what was begun on these streams."""

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """Starts it, after the caller's work so far; `source` must stay as it is until it has ended."""

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """Starts it, after the caller's work so far; what the caller does next on the device comes after it."""


class CudaTransfers:
    """See Transfers. One stream for all copies of a device, ahead of others: they hold up the training."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def host_memory(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """See Transfers."""
        with torch.cuda.device(self._device):
            return torch.zeros(elements, dtype=dtype, pin_memory=True)

    def stream(self) -> Hashable:
        """See Transfers."""
        return torch.cuda.current_stream(self._device)

    def gather(self, streams: Iterable[Hashable]) -> None:
        """See Transfers."""
        current = torch.cuda.current_stream(self._device)
        for stream in streams:
            if stream != current:
                current.wait_stream(stream)  # type: ignore[arg-type]  # it is one of CUDA's

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """See Transfers."""
        return self._copy(source, target, of_device=source)

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """See Transfers."""
        copy = self._copy(source, target, of_device=target)
        torch.cuda.current_stream(self._device).wait_stream(self._copies)
        return copy

    def _copy(self, source: torch.Tensor, target: torch.Tensor, of_device: torch.Tensor) -> Copy:
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        of_device.record_stream(self._copies)  # should it be freed meanwhile
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._copies)
        return _CudaCopy(event)


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def ended(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()


@functools.cache
def _cuda_transfers(device: torch.device) -> CudaTransfers:
    return CudaTransfers(device)


def is_supported(device: torch.device) -> bool:
    """Whether gradients may be there."""
    return device.type in ("cpu", "cuda")


def transfers_of(device: torch.device) -> Transfers | None:
    """Of a GPU; None for the CPU, whose memory the engine reads and writes itself."""
    if device.type == "cpu":
        return None
    if not is_supported(device):
        raise UsageError(f"a tensor is on {device}: supported are the CPU and CUDA")
    return _cuda_transfers(device)
