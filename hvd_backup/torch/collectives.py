"""Collectives of all ranks on torch tensors: Horovod's names, argument order and meaning.

Those that end in `_` work in place, those with `_async` return a handle for `synchronize` and `poll`. allreduce,
allgather and broadcast can be differentiated. Sums go through the engine, from and to the tensors' own memory;
broadcast and allgather move bytes over MPI. Call them from the training thread, on all ranks in the same order.
"""

from __future__ import annotations

from typing import Any

import torch

from hvd_backup import byte_collectives, context
from hvd_backup.errors import UsageError
from hvd_backup.first_n import Handle, ReduceOp, checked_handle
from hvd_backup.torch.compression import Compression, NoneCompressor
from hvd_backup.torch.first_n import start
from hvd_backup.torch.memory import Done, bytes_of, contiguous, signature_of

__all__ = [
    "HANDLES",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "poll",
    "synchronize",
]


HANDLES = (Handle, Done)


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[NoneCompressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """Mean or sum over all ranks, as a new tensor.

    Args:
        tensor: float16, bfloat16, float32, float64, int32 or int64; shape and dtype equal on all ranks.
        average: Horovod's older way to say op: True is Average, False is Sum.
        name: of the collective; without one, calls are matched by their order in the program.
        compression: Compression.fp16 sends floating-point tensors as float16.
        op: Average (default) or Sum.
        prescale_factor, postscale_factor: applied before and after the sum.

    Raises:
        UsageError: something that cannot be used; inside a followed loop with backup workers.
        HvdBackupError: ranks differ in what they call, or a rank has left.
    """
    compressed, ctx = compression.compress(tensor)
    arguments = (average, name, op, prescale_factor, postscale_factor, process_set)
    if isinstance(compressed, torch.Tensor) and not compressed.requires_grad:  # autograd takes a third of the time
        reduced = _start_allreduce(compressed, *arguments, wait_follows=True).wait()
    else:
        reduced = _apply(_Allreduce, compressed, *arguments)
    return compression.decompress(reduced, ctx)


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Starts `allreduce`; `synchronize` gives the new tensor. Do not change `tensor` before."""
    return _start_allreduce(tensor, average, name, op, prescale_factor, postscale_factor, process_set)


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Starts `allreduce_`; `synchronize` gives `tensor`. Do not use it before."""
    return _start_allreduce(tensor, average, name, op, prescale_factor, postscale_factor, process_set, in_place=True)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """`allreduce` in place; returns `tensor`."""
    arguments = (average, name, op, prescale_factor, postscale_factor, process_set)
    reduced: torch.Tensor = _start_allreduce(tensor, *arguments, in_place=True, wait_follows=True).wait()
    return reduced


def allgather(tensor: torch.Tensor, name: str | None = None, process_set: Any = None) -> torch.Tensor:
    """Concatenates the tensors of all ranks along the first dimension, which may differ; the others must not."""
    gathered: torch.Tensor = _apply(_Allgather, tensor, name, process_set)
    return gathered


def allgather_async(tensor: torch.Tensor, name: str | None = None, process_set: Any = None) -> Done:
    """As `allgather`, with a handle; it waits, so its result is there at once."""
    return Done(allgather(tensor.detach(), name, process_set))


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> torch.Tensor:
    """The tensor of rank `root_rank`, on every rank, as a new tensor. Shape and dtype must be equal on all ranks."""
    copy: torch.Tensor = _apply(_Broadcast, tensor, root_rank, name, process_set)
    return copy


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> torch.Tensor:
    """`broadcast` in place; returns `tensor`."""
    _no_process_set(process_set)
    here = context.current()
    root = here.root(root_rank)
    with here.full_collective(f"broadcast({signature_of(tensor)}, root_rank={root}, name={name!r})") as left:
        whole = contiguous("broadcast", tensor.detach())
        byte_collectives.broadcast(left.comm, bytes_of(whole), left.place_of(root))
    with torch.no_grad():
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
    return tensor


def broadcast_async(tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> Done:
    """As `broadcast`, with a handle; it waits, so its result is there at once."""
    return Done(broadcast(tensor.detach(), root_rank, name, process_set))


def broadcast_async_(tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None) -> Done:
    """As `broadcast_`, with a handle; it waits, so its result is there at once."""
    return Done(broadcast_(tensor, root_rank, name, process_set))


def synchronize(handle: Handle | Done) -> Any:
    """Waits for a collective that was started, and gives its tensor (or `FirstN`). May be called again."""
    return checked_handle("synchronize", handle).wait()


def poll(handle: Handle | Done) -> bool:
    """Whether `synchronize` would return at once."""
    return bool(checked_handle("poll", handle).poll())


def _apply(function: Any, *arguments: Any) -> Any:  # torch has no annotation for Function.apply
    return function.apply(*arguments)


class _Allreduce(torch.autograd.Function):
    """The derivative of a mean (or sum) over ranks is the mean (or sum) of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *arguments: Any) -> Any:
        ctx.arguments = arguments
        return _start_allreduce(tensor, *arguments, wait_follows=True).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        average, _, op, prescale, postscale, process_set = ctx.arguments
        arguments = (average, None, op, prescale, postscale, process_set)
        return (_start_allreduce(gradients[0], *arguments, wait_follows=True).wait(), *[None] * 6)


class _Allgather(torch.autograd.Function):
    """Each rank's gradient is its part of the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str | None, process_set: Any) -> torch.Tensor:
        _no_process_set(process_set)
        here = context.current()
        whole = contiguous("allgather", tensor)
        ctx.shape = whole.shape
        whole = whole.reshape(1) if whole.dim() == 0 else whole
        with here.full_collective(f"allgather({signature_of(whole, first='any')}, name={name!r})") as left:
            lengths, own = left.comm.allgather(len(whole)), left.place_of(here.rank)
            ctx.own = slice(sum(lengths[:own]), sum(lengths[: own + 1]))
            gathered = torch.empty((sum(lengths), *whole.shape[1:]), dtype=whole.dtype)
            row_bytes = gathered[0].numel() * gathered.element_size() if sum(lengths) else 0
            byte_lengths = [length * row_bytes for length in lengths]
            byte_collectives.allgather(left.comm, bytes_of(whole), bytes_of(gathered), byte_lengths)
        return gathered.to(tensor.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        summed = _start_allreduce(gradients[0], op=ReduceOp.SUM, wait_follows=True).wait()
        return summed[ctx.own].reshape(ctx.shape), None, None


class _Broadcast(torch.autograd.Function):
    """The root's gradient is the sum of all gradients, the others have none."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: Any) -> torch.Tensor:
        ctx.is_root = context.current().rank == root_rank
        return broadcast_(tensor.detach().clone(), root_rank, name, process_set)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        summed = _start_allreduce(gradients[0], op=ReduceOp.SUM, wait_follows=True).wait()
        return summed if ctx.is_root else torch.zeros_like(summed), None, None, None


def _start_allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale: float = 1.0,
    postscale: float = 1.0,
    process_set: Any = None,
    *,
    in_place: bool = False,
    wait_follows: bool = False,
) -> Handle:
    _no_process_set(process_set)
    if average is not None and op is not None:
        raise UsageError(f"allreduce(average={average}, op={op}): give one of them")
    if op is None:
        op = ReduceOp.SUM if average is False else ReduceOp.AVERAGE

    def outcome(result: torch.Tensor, _contributors: tuple[int, ...]) -> torch.Tensor:
        if in_place:
            tensor.detach().copy_(result)
        return tensor if in_place else result

    here = context.current()
    here.before_full_collective("allreduce()")
    return start("allreduce", tensor, here.size, name, op, prescale, postscale, outcome, wait_follows)


def _no_process_set(process_set: Any) -> None:
    if process_set is not None:
        raise UsageError("process_set is not there yet: give init() a communicator of the ranks that work together")
