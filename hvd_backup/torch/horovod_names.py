"""Which names of horovod.torch are Horovod's own here, and which are ours: one table, resolved when a name is used.

    OURS         always ours: what training with backup workers goes through
    EITHER       Horovod's own where it can be used, and otherwise ours (torch/collectives.py)
    COLLECTIVES  Horovod's own; like those of EITHER they first end the rounds of optimizers, as every full collective
    STARTED      Horovod's own; using them starts Horovod
    PLAIN        Horovod's own; they need no start

A name that needs Horovod raises an error that says so where Horovod cannot be used. Names and signatures are those of
Horovod 0.28.1, whose documentation they keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hvd_backup import context
from hvd_backup.beside_horovod import Horovod, is_global, words
from hvd_backup.errors import UsageError
from hvd_backup.torch import collectives

__all__ = [
    "HOROVOD",
    "NAMES",
    "barrier",
    "init",
    "is_global",
    "join",
    "poll",
    "resolve",
    "synchronize",
]


OURS = words("""
    Adasum Average Compression DistributedOptimizer Max Min Product Sum allgather_object barrier broadcast_object
    broadcast_optimizer_state broadcast_parameters cross_rank cross_size gloo_enabled init is_homogeneous is_initialized
    join local_rank local_size mpi_enabled mpi_threads_supported poll rank shutdown size synchronize
""")
EITHER = words("""
    allgather allgather_async allreduce allreduce_ allreduce_async allreduce_async_ broadcast broadcast_
    broadcast_async broadcast_async_
""")
COLLECTIVES = words("""
    add_process_set alltoall alltoall_async grouped_allgather grouped_allgather_async grouped_allreduce
    grouped_allreduce_ grouped_allreduce_async grouped_allreduce_async_ grouped_reducescatter
    grouped_reducescatter_async reducescatter reducescatter_async remove_process_set sparse_allreduce_async
""")
STARTED = words("SyncBatchNorm elastic global_process_set start_timeline stop_timeline")
PLAIN = words("""
    HorovodInternalError ProcessSet ccl_built cuda_built ddl_built gloo_built mpi_built nccl_built rocm_built
""")
NAMES = OURS | EITHER | COLLECTIVES | STARTED | PLAIN

HOROVOD = Horovod("torch")
init = HOROVOD.init


def resolve(name: str) -> Any:
    """The object behind a name of EITHER, COLLECTIVES, STARTED or PLAIN.

    Raises:
        AttributeError: no such name; or it needs Horovod, which cannot be used: says why.
    """
    if name in EITHER:
        return _either(name) if HOROVOD.usable() else getattr(collectives, name)
    if name not in NAMES:
        raise AttributeError(f"module 'hvd_backup.torch' has no attribute {name!r}")
    if why_not := HOROVOD.why_not():
        raise AttributeError(f"hvd_backup.torch.{name} is Horovod's own, and Horovod cannot be used here: {why_not}")
    if name in COLLECTIVES:
        return _guarded(name)
    if name == "SyncBatchNorm":
        return _sync_batch_norm()
    if name in ("start_timeline", "stop_timeline"):
        return _after_start(name)
    if name in STARTED:
        HOROVOD.use_after_init()
    return getattr(HOROVOD.module(), name)


def barrier(process_set: Any = None) -> None:
    """Returns when all ranks (of the process set) have called it."""
    if is_global(process_set):
        context.current().full_collective("barrier()")
    else:
        _enter("barrier").barrier(process_set)


def join(device: int = -1) -> int:
    """For uneven data: this rank's part is over; returns when all ranks have joined.

    Until then allreduce and the training of the others go on, and this rank applies their updates. In Horovod's
    allreduce, and in updates without backup workers, a rank that has joined counts as zeros; with backup workers an
    update is the mean over its contributors, as always.

    Args:
        device: Horovod's; for tensors on a GPU.

    Returns:
        The rank that joined last.
    """
    return HOROVOD.join(device)


def synchronize(handle: Any) -> Any:
    """Waits for a collective that was started, and gives its tensor (or `FirstN`)."""
    if isinstance(handle, collectives.HANDLES) or not HOROVOD.usable():
        return collectives.synchronize(handle)
    return HOROVOD.module().synchronize(handle)


def poll(handle: Any) -> bool:
    """Whether `synchronize` would return at once."""
    if isinstance(handle, collectives.HANDLES) or not HOROVOD.usable():
        return collectives.poll(handle)
    return bool(HOROVOD.module().poll(handle))


def _enter(name: str) -> Any:
    """Before one of Horovod's collectives: the rounds of optimizers end. Returns Horovod, started."""
    context.current().before_full_collective(f"{name}()")
    return HOROVOD.start()


def _guarded(name: str) -> Callable[..., Any]:
    theirs = getattr(HOROVOD.module(), name)

    @functools.wraps(theirs)
    def collective(*args: Any, **kwargs: Any) -> Any:
        _enter(name)
        return theirs(*args, **kwargs)

    return collective


def _either(name: str) -> Callable[..., Any]:
    guarded, own = _guarded(name), getattr(collectives, name)

    @functools.wraps(guarded)
    def collective(*args: Any, **kwargs: Any) -> Any:
        return (guarded if HOROVOD.usable() else own)(*args, **kwargs)

    return collective


def _after_start(name: str) -> Callable[..., Any]:
    theirs = getattr(HOROVOD.module(), name)

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        HOROVOD.start()
        return theirs(*args, **kwargs)

    return call


@functools.cache
def _sync_batch_norm() -> type:
    theirs: Any = HOROVOD.module().SyncBatchNorm

    class SyncBatchNorm(theirs):  # type: ignore[misc]  # Horovod has no annotations
        __doc__ = theirs.__doc__
        __module__, __qualname__ = "hvd_backup.torch", "SyncBatchNorm"  # where pickle finds it

        def forward(self, input: Any) -> Any:
            if self.training:
                if context.current().any_backup_workers():
                    raise UsageError(
                        "SyncBatchNorm needs all ranks in every forward pass, so it cannot be combined with backup "
                        "workers: use torch.nn.BatchNorm2d, or GroupNorm, which needs no other sample"
                    )
                HOROVOD.start()
            return super().forward(input)

    return SyncBatchNorm
