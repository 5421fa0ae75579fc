"""Buckets of gradients on a GPU, on their way to the engine and back, through pinned host memory.

    gradients -> contribution (GPU) -> sent (pinned) -> engine -> received (pinned) -> result (GPU) -> p.grad

A bucket is packed, scaled and cast by one launch of the GPU library (hvd_backup._gpu), and what was compressed unpacked
by another; or by PyTorch's own operations if hvd_backup was built without it. Copies go over a stream of our own, which
waits for what produced the data; whoever uses a result on the GPU waits for the copy there. The host waits in two
places only: a contribution is handed to the engine when it has arrived in host memory, and the next result is asked for
when the last one has left it.

Or the engine gets contributions on the GPU, and leaves results there (data_plane.py): then only updates that a rank has
missed come through host memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch

from hvd_backup import data_plane
from hvd_backup.data_plane import library
from hvd_backup.errors import UsageError

__all__ = [
    *("DTYPES", "Copy", "CudaTransfers", "Packing", "Transfers"),
    *("is_supported", "library", "library_for", "look_for_nonfinite", "transfers_of", "unpack"),
]

# Names as the engine has them.
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


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

    def stream_address(self) -> int:
        """The same, for the engine."""

    def engine_device(self, nccl_library: str) -> data_plane.Gpu:
        """The device as the engine uses it (`_gpu.Device`), or None and why it cannot.

        nccl_library: where NCCL is, if it is not found by name.
        """

    def gather(self, streams: Iterable[Hashable], tensors: Iterable[torch.Tensor]) -> None:
        """What the caller does next comes after what was begun on these streams, which made these tensors."""

    def pack(self, packing: Packing, bucket: torch.Tensor, scale: float, tally: torch.Tensor | None = None) -> None:
        """Starts to put gradients into their bucket, scaled and cast, after the caller's work so far.

        tally: two int64 on the device; the second is not zero afterwards if there is a NaN or an infinity.
        """

    def unpack(
        self, bucket: torch.Tensor, views: list[torch.Tensor], gradients: list[torch.Tensor], scale: float
    ) -> None:
        """Starts it, after the caller's work so far: see `unpack`."""

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """Starts it, after the caller's work so far; `source` must stay as it is until it has ended."""

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """Starts it, after the caller's work so far; what the caller does next on the device comes after it."""


def library_for(number: int) -> Any:
    """The GPU library, if it can be used on this GPU."""
    why_not = data_plane.why_no_library(number)
    if why_not and library() is not None:
        warnings.warn(f"PyTorch packs gradients: {why_not}", stacklevel=2)
    return None if why_not else library()


class Packing:
    """Gradients on their way into a bucket, each with the view that is its place.

    Attributes:
        gradients: of the bucket's dtype or of another one; None counts as zero.
        views: of the same shapes.
    """

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor | None] = []
        self.views: list[torch.Tensor] = []

    def add(self, gradient: torch.Tensor | None, view: torch.Tensor) -> None:
        """One more. It may be the view itself."""
        self.gradients.append(gradient)
        self.views.append(view)

    def tensors(self) -> list[torch.Tensor]:
        """Those that are not None."""
        return [gradient for gradient in self.gradients if gradient is not None]

    def write(self, bucket: torch.Tensor, scale: float) -> None:
        """With PyTorch's operations: few launches, and one more for the scale."""
        sources, targets = [], []
        for gradient, view in zip(self.gradients, self.views, strict=True):
            if gradient is None:
                view.zero_()
            elif gradient is not view:
                sources.append(gradient)
                targets.append(view)
        if sources:
            torch._foreach_copy_(targets, sources)
        if scale != 1.0:
            bucket.mul_(scale)

    def fused(
        self, gpu: Any, bucket: torch.Tensor, scale: float, stream: int, tally: torch.Tensor | None = None
    ) -> bool:
        """With one launch of the GPU library, if there is one and it can do it. tally: see Transfers.pack."""
        dtypes = {gradient.dtype for gradient in self.tensors()} or {bucket.dtype}
        if len(dtypes) > 1:
            return False
        (dtype,) = dtypes
        moved = [
            (view, gradient)
            for gradient, view in zip(self.gradients, self.views, strict=True)
            if gradient is not view or scale != 1.0 or tally is not None
        ]
        arguments = _arguments(gpu, dtype, bucket, moved, scale, stream)
        if arguments is None:
            return False
        if moved:
            gpu.pack(*arguments, 0 if tally is None else tally.data_ptr())
        return True

    def pack(self, gpu: Any, bucket: torch.Tensor, scale: float, stream: int, tally: torch.Tensor | None) -> bool:
        """By `fused`, which it returns, or otherwise by `write`."""
        if self.fused(gpu, bucket, scale, stream, tally):
            return True
        self.write(bucket, scale)
        if tally is not None:
            look_for_nonfinite(bucket, tally)
        return False


def unpack(
    gpu: Any, bucket: torch.Tensor, views: list[torch.Tensor], gradients: list[torch.Tensor], scale: float, stream: int
) -> bool:
    """Writes what is in a bucket to gradients of a wider dtype: scaled in that, in float32 at least, and rounded once.

    Args:
        gpu: the GPU library, which does so by one launch; or None. The bits are the same.
        views: of the bucket.
        gradients: one for each view, of its shape, all of one dtype.

    Returns:
        Whether the library has done it.
    """
    dtype = gradients[0].dtype
    pairs = list(zip(views, gradients, strict=True))
    arguments = _arguments(gpu, dtype, bucket, pairs, scale, stream)
    if arguments is not None:
        gpu.unpack(*arguments)
        return True
    for view, gradient in pairs:
        wide = view.to(torch.promote_types(dtype, torch.float32))
        gradient.copy_(wide if scale == 1.0 else wide.mul_(scale))
    return False


def _arguments(
    gpu: Any,
    dtype: torch.dtype,
    bucket: torch.Tensor,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    scale: float,
    stream: int,
) -> tuple[Any, ...] | None:
    """What the GPU library's pack and unpack take; None: it cannot do it.

    Args:
        dtype: of the gradients.
        pairs: views of the bucket, each with its gradient or None.
    """
    if gpu is None or dtype not in DTYPES or not gpu.can_cast(DTYPES[dtype], DTYPES[bucket.dtype]):
        return None
    if any(g is not None and g.stride() != view.stride() and g.numel() > 1 for view, g in pairs):
        return None  # its elements lie in another order
    ordered = sorted(pairs, key=lambda pair: pair[0].storage_offset())
    return (
        DTYPES[dtype],
        DTYPES[bucket.dtype],
        [0 if gradient is None else gradient.data_ptr() for _, gradient in ordered],
        [view.storage_offset() for view, _ in ordered],
        [view.numel() for view, _ in ordered],
        bucket.data_ptr(),
        scale,
        bucket.device.index,
        stream,
    )


def look_for_nonfinite(bucket: torch.Tensor, tally: torch.Tensor) -> None:
    """See Transfers.pack; after the caller's work so far."""
    tally[1:] = bucket.isfinite().all().logical_not()


class CudaTransfers:
    """See Transfers. One stream for all copies of a device, ahead of others: they hold up the training."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._gpu = library_for(device.index)

    def host_memory(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """See Transfers."""
        with torch.cuda.device(self._device):
            return torch.zeros(elements, dtype=dtype, pin_memory=True)

    def stream(self) -> Hashable:
        """See Transfers."""
        return torch.cuda.current_stream(self._device)

    def stream_address(self) -> int:
        """See Transfers."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def engine_device(self, nccl_library: str) -> data_plane.Gpu:
        """See Transfers."""
        return data_plane.the_gpu(self._device.index, nccl_library)

    def gather(self, streams: Iterable[Hashable], tensors: Iterable[torch.Tensor]) -> None:
        """See Transfers."""
        current = torch.cuda.current_stream(self._device)
        others = [stream for stream in streams if stream != current]
        for stream in others:
            current.wait_stream(stream)  # type: ignore[arg-type]  # it is one of CUDA's
        for tensor in tensors if others else ():
            tensor.record_stream(current)  # should it be freed meanwhile

    def pack(self, packing: Packing, bucket: torch.Tensor, scale: float, tally: torch.Tensor | None = None) -> None:
        """See Transfers."""
        packing.pack(self._gpu, bucket, scale, self.stream_address(), tally)

    def unpack(
        self, bucket: torch.Tensor, views: list[torch.Tensor], gradients: list[torch.Tensor], scale: float
    ) -> None:
        """See Transfers."""
        unpack(self._gpu, bucket, views, gradients, scale, self.stream_address())

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
