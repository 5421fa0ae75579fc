"""hvd_backup for NumPy arrays and mpi4py: first-N allreduce, and the collectives that Horovod users know.

    import hvd_backup.mpi as hvd
    hvd.init()
    mean, contributors = hvd.first_n_allreduce(array, n=hvd.size() - 1, name="gradient")

Names, argument order and meaning are Horovod's where Horovod has the function. Arrays come in as anything that
`numpy.asarray` takes, are never modified, and come out as new arrays. What it is not: autograd, optimizers (those are
in hvd_backup.torch). Call it from one thread, the training thread.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvd_backup import byte_collectives, context, numpy_buffers
from hvd_backup.context import init, is_initialized, shutdown, straggler_report
from hvd_backup.errors import UsageError
from hvd_backup.failures import on_failure
from hvd_backup.first_n import Handle, ReduceOp, Signature, checked_handle, contributors_wanted
from hvd_backup.numpy_buffers import as_buffer, bytes_of, signature_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Average",
    "FirstN",
    "Max",
    "Min",
    "Product",
    "ReduceOp",
    "Sum",
    "allgather",
    "allgather_object",
    "allreduce",
    "allreduce_async",
    "barrier",
    "broadcast",
    "broadcast_object",
    "cross_rank",
    "cross_size",
    "first_n_allreduce",
    "first_n_allreduce_async",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_enabled",
    "mpi_threads_supported",
    "on_failure",
    "poll",
    "rank",
    "shutdown",
    "size",
    "straggler_report",
    "synchronize",
]

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
Min = ReduceOp.MIN
Max = ReduceOp.MAX
Product = ReduceOp.PRODUCT


class FirstN(NamedTuple):
    """Outcome of a first-N allreduce: the result, and the ranks whose arrays it holds, ascending."""

    result: NDArray[Any]
    contributors: tuple[int, ...]


def rank() -> int:
    """This process's rank."""
    return context.current().rank


def size() -> int:
    """Number of processes."""
    return context.current().size


def local_rank() -> int:
    """This process's rank among those of its node."""
    return context.current().local_rank


def local_size() -> int:
    """Number of processes on this node."""
    return context.current().local_size


def cross_rank() -> int:
    """The number of this node, among the nodes that have a process of this local rank."""
    return context.current().cross_rank


def cross_size() -> int:
    """Number of nodes that have a process of this local rank."""
    return context.current().cross_size


def mpi_threads_supported() -> bool:
    """Whether MPI supports several threads: always, once initialised."""
    context.current()
    return True


def mpi_enabled() -> bool:
    """Whether MPI carries the messages: always, once initialised."""
    context.current()
    return True


def gloo_enabled() -> bool:
    """Whether Gloo does: never."""
    context.current()
    return False


def is_homogeneous() -> bool:
    """Whether all nodes have as many processes."""
    return context.current().is_homogeneous


def first_n_allreduce(
    tensor: ArrayLike,
    n: int | None = None,
    name: str | None = None,
    op: ReduceOp = Average,
    *,
    backup_workers: int | None = None,
) -> FirstN:
    """Mean or sum over the first `n` ranks to arrive, the same on all ranks; nobody waits for the others.

    The k-th call under a name on each rank is the k-th collective. A rank that comes too late gets the result that the
    others have already computed, without its own array. When fewer than n ranks can still contribute (the others have
    left or joined), those are enough.

    Args:
        tensor: float16, bfloat16 (ml_dtypes), float32, float64, int32 or int64; shape and dtype equal on all ranks.
        n: how many contributors to wait for, 1 to size.
        name: of the collective; without one, calls are matched by their order in the program.
        op: Average (over the contributors; integers: floor of the exact mean) or Sum.
        backup_workers: in place of n: size - n. Without both, HVD_BACKUP_BACKUP_WORKERS counts; without that, n = size.

    Raises:
        UsageError: a dtype, n or op that cannot be used, or a name under way.
        HvdBackupError: ranks differ in shape, dtype, n or op; or the engine has failed.
    """
    outcome: FirstN = _start_first_n(tensor, n, name, op, backup_workers, wait_follows=True).wait()
    return outcome


def first_n_allreduce_async(
    tensor: ArrayLike,
    n: int | None = None,
    name: str | None = None,
    op: ReduceOp = Average,
    *,
    backup_workers: int | None = None,
) -> Handle:
    """Starts `first_n_allreduce`; `synchronize` gives its outcome. Do not change the array before."""
    return _start_first_n(tensor, n, name, op, backup_workers, wait_follows=False)


def allreduce(tensor: ArrayLike, name: str | None = None, op: ReduceOp = Average) -> NDArray[Any]:
    """Reduces over all ranks, and waits for all.

    Args:
        tensor: as in `first_n_allreduce`. With Min, Max, Product: floating-point or integer of any width.
        name: of the collective; without one, calls are matched by their order in the program.
        op: Average, Sum, Min, Max or Product. Integers with Average: floor of the exact mean.

    Returns:
        A new array of the same shape and dtype. Ranks that have joined count as absent: the mean is over the others.

    Raises:
        UsageError: a dtype or op that cannot be used; inside a followed loop with backup workers.
        HvdBackupError: ranks differ in what they call, or a rank has left.
    """
    if op in (Average, Sum):
        result: NDArray[Any] = _start_allreduce(tensor, name, op, wait_follows=True).wait()
        return result
    array = as_buffer("allreduce", tensor, name)
    if not isinstance(op, ReduceOp) or not (array.dtype.kind in "iuf" or array.dtype.name == "bfloat16"):
        raise UsageError(
            f"allreduce(op={op!r}) of dtype {array.dtype}: expected Average, Sum, Min, Max or Product, of numbers"
        )
    here = context.current()
    with here.full_collective(f"allreduce({signature_of(array)}, op={op.name}, name={name!r})") as left:
        return numpy_buffers.reduce_over_mpi(left.comm, array, op)


def allreduce_async(tensor: ArrayLike, name: str | None = None, op: ReduceOp = Average) -> Handle:
    """Starts `allreduce` (Average or Sum); `synchronize` gives the array. Do not change `tensor` before."""
    return _start_allreduce(tensor, name, op, wait_follows=False)


def synchronize(handle: Handle) -> Any:
    """Waits for a collective that was started: gives a `FirstN`, or the array of an allreduce. May be called again."""
    return checked_handle("synchronize", handle).wait()


def poll(handle: Handle) -> bool:
    """Whether `synchronize` would return at once."""
    return bool(checked_handle("poll", handle).poll())


def allgather(tensor: ArrayLike, name: str | None = None) -> NDArray[Any]:
    """Concatenates the arrays of all ranks along the first dimension, which may differ; the others must not.

    Args:
        tensor: any dtype but objects. A 0-d array counts as one of one element.
        name: compared between ranks, for error messages.
    """
    array = as_buffer("allgather", tensor, name)
    if array.ndim == 0:
        array = array.reshape(1)
    here = context.current()
    row: tuple[int, ...] = array.shape[1:]
    row_bytes = math.prod(row) * array.dtype.itemsize
    with here.full_collective(f"allgather({signature_of(array, first='any')}, name={name!r})") as left:
        lengths = left.comm.allgather(len(array))
        result: NDArray[Any] = np.empty((sum(lengths), *row), array.dtype)
        byte_lengths = [length * row_bytes for length in lengths]
        byte_collectives.allgather(left.comm, bytes_of(array), bytes_of(result), byte_lengths)
    return result


def broadcast(tensor: ArrayLike, root_rank: int, name: str | None = None) -> NDArray[Any]:
    """The array of rank `root_rank`, on every rank. Shape and dtype must be equal on all ranks.

    Args:
        tensor: any dtype but objects.
        root_rank: whose array it is.
        name: compared between ranks, for error messages.
    """
    array = as_buffer("broadcast", tensor, name)
    here = context.current()
    root = here.root(root_rank)
    result: NDArray[Any] = array.copy()
    with here.full_collective(f"broadcast({signature_of(array)}, root_rank={root}, name={name!r})") as left:
        byte_collectives.broadcast(left.comm, bytes_of(result), left.place_of(root))
    return result


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """The object of rank `root_rank`, on every rank. It must pickle."""
    here = context.current()
    root = here.root(root_rank)
    data = byte_collectives.pickled(obj) if here.rank == root else b""  # may raise: before the others wait for it
    with here.full_collective(f"broadcast_object(root_rank={root}, name={name!r})") as left:
        everybodys = byte_collectives.broadcast_pickled(left.comm, data, left.place_of(root))
    return obj if here.rank == root else everybodys


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """The objects of all ranks, in the order of ranks. Each must pickle."""
    here = context.current()
    data = byte_collectives.pickled(obj)  # may raise: before the others wait for it
    with here.full_collective(f"allgather_object(name={name!r})") as left:
        return byte_collectives.allgather_pickled(left.comm, data)


def barrier() -> None:
    """Returns when all ranks have called it."""
    context.current().full_collective("barrier()")


def join() -> int:
    """For uneven data: this rank's part is over; returns when all ranks have joined.

    Until then allreduce and first_n_allreduce of the others go on without this rank (it counts as absent, where Horovod
    counts it as zeros); collectives that need its data (broadcast, allgather) raise.

    Returns:
        The rank that joined last.
    """
    return context.current().join()


def _start_first_n(
    tensor: ArrayLike, n: int | None, name: str | None, op: ReduceOp, backup_workers: int | None, wait_follows: bool
) -> Handle:
    here = context.current()
    wanted = contributors_wanted(n, backup_workers, here.size, here.default_backup_workers)
    return _start(
        "first_n_allreduce", tensor, wanted, name, op, lambda result, ranks: FirstN(result, ranks), wait_follows
    )


def _start_allreduce(tensor: ArrayLike, name: str | None, op: ReduceOp, wait_follows: bool) -> Handle:
    here = context.current()
    here.before_full_collective("allreduce()")
    return _start("allreduce", tensor, here.size, name, op, lambda result, ranks: result, wait_follows)


def _start(
    operation: str,
    tensor: ArrayLike,
    required: int,
    name: str | None,
    op: ReduceOp,
    outcome: Callable[[NDArray[Any], tuple[int, ...]], Any],
    wait_follows: bool,
) -> Handle:
    array = as_buffer(operation, tensor, name)
    result = np.empty(array.shape, array.dtype)

    def finish(contributors: tuple[int, ...]) -> Any:
        if op is Average and array.dtype.kind == "i":  # the engine sums integers exactly
            np.floor_divide(result, len(contributors), out=result)
        return outcome(result, contributors)

    return context.current().collectives.start(
        Signature(operation, array.dtype.name, array.shape, required, op),
        name,
        contribution=array.ctypes.data,
        result=result.ctypes.data,
        keep=(array, result),
        finish=finish,
        wait_follows=wait_follows,
    )
