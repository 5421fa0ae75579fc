"""hvd_backup for PyTorch: horovod.torch's names, with backup workers.

import hvd_backup.torch as hvd
hvd.init()
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), backup_workers=1)
for x, y in hvd.follow(loader, optimizer):
    ...
"""

from hvd_backup.applied import AppliedUpdate
from hvd_backup.context import init, is_initialized, shutdown, straggler_report
from hvd_backup.errors import ConfigError, HvdBackupError, NotInitializedError, UsageError
from hvd_backup.first_n import ReduceOp
from hvd_backup.follow import follow
from hvd_backup.mpi import (
    allgather_object,
    barrier,
    broadcast_object,
    cross_rank,
    cross_size,
    join,
    local_rank,
    local_size,
    mpi_threads_supported,
    rank,
    size,
)
from hvd_backup.torch.collectives import (
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    poll,
    synchronize,
)
from hvd_backup.torch.compression import Compression
from hvd_backup.torch.distributed import DistributedOptimizer
from hvd_backup.torch.first_n import FirstN, first_n_allreduce, first_n_allreduce_async
from hvd_backup.torch.functions import broadcast_optimizer_state, broadcast_parameters

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM

__all__ = [
    "AppliedUpdate",
    "Average",
    "Compression",
    "ConfigError",
    "DistributedOptimizer",
    "FirstN",
    "HvdBackupError",
    "NotInitializedError",
    "ReduceOp",
    "Sum",
    "UsageError",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "cross_rank",
    "cross_size",
    "first_n_allreduce",
    "first_n_allreduce_async",
    "follow",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_threads_supported",
    "poll",
    "rank",
    "shutdown",
    "size",
    "straggler_report",
    "synchronize",
]

_ONLY_IN_HOROVOD = """
    Adasum Max Min Product ProcessSet SyncBatchNorm add_process_set alltoall alltoall_async ccl_built cuda_built
    ddl_built elastic global_process_set gloo_built gloo_enabled grouped_allgather grouped_allreduce
    grouped_allreduce_ grouped_allreduce_async grouped_allreduce_async_ grouped_reducescatter is_homogeneous
    mpi_built mpi_enabled nccl_built reducescatter reducescatter_async remove_process_set rocm_built
    sparse_allreduce_async start_timeline stop_timeline
"""


def __getattr__(name: str) -> object:
    if name in _ONLY_IN_HOROVOD.split():
        raise AttributeError(f"hvd_backup.torch.{name} is not there yet: it needs Horovod (horovod.torch.{name})")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
