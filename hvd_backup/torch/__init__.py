"""hvd_backup for PyTorch: horovod.torch's names, with backup workers.

import hvd_backup.torch as hvd
hvd.init()
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), backup_workers=1)
for x, y in hvd.follow(loader, optimizer):
    ...

Names that are not here are Horovod's own, or ours where there is no Horovod: horovod_names.py has the table.
"""

from typing import TYPE_CHECKING

from hvd_backup.applied import AppliedUpdate
from hvd_backup.context import is_initialized, shutdown, straggler_report
from hvd_backup.errors import ConfigError, HvdBackupError, NotInitializedError, UsageError
from hvd_backup.failures import on_failure
from hvd_backup.first_n import ReduceOp
from hvd_backup.follow import follow
from hvd_backup.mpi import (
    cross_rank,
    cross_size,
    gloo_enabled,
    is_homogeneous,
    local_rank,
    local_size,
    mpi_enabled,
    mpi_threads_supported,
    rank,
    size,
)
from hvd_backup.torch import horovod_names
from hvd_backup.torch.compression import Compression
from hvd_backup.torch.distributed import DistributedOptimizer
from hvd_backup.torch.first_n import FirstN, first_n_allreduce, first_n_allreduce_async
from hvd_backup.torch.functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from hvd_backup.torch.horovod_names import barrier, init, join, poll, synchronize

if TYPE_CHECKING:
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
    )

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
Adasum = ReduceOp.ADASUM
Min = ReduceOp.MIN
Max = ReduceOp.MAX
Product = ReduceOp.PRODUCT

__all__ = [
    "Adasum",
    "AppliedUpdate",
    "Average",
    "Compression",
    "ConfigError",
    "DistributedOptimizer",
    "FirstN",
    "HvdBackupError",
    "Max",
    "Min",
    "NotInitializedError",
    "Product",
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

if not TYPE_CHECKING:

    def __getattr__(name):
        value = horovod_names.resolve(name)
        if name not in horovod_names.STARTED:
            globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *(horovod_names.NAMES if horovod_names.HOROVOD.usable() else horovod_names.EITHER)})
