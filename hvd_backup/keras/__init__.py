"""hvd_backup for Keras 3 on TensorFlow or PyTorch: horovod.keras's names, with backup workers.

import hvd_backup.keras as hvd
hvd.init()
model.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(), backup_workers=1), loss=...)
model.fit(data, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.FollowCallback()])
"""

from typing import TYPE_CHECKING, Any

from hvd_backup.applied import AppliedUpdate
from hvd_backup.context import is_initialized, shutdown, straggler_report
from hvd_backup.errors import ConfigError, HvdBackupError, NotInitializedError, UsageError
from hvd_backup.failures import on_failure
from hvd_backup.first_n import ReduceOp
from hvd_backup.follow import follow
from hvd_backup.keras import callbacks
from hvd_backup.keras.backend import Compression, broadcast_variables
from hvd_backup.keras.collectives import allgather, allreduce, broadcast
from hvd_backup.keras.horovod_names import NAMES
from hvd_backup.keras.models import load_model
from hvd_backup.keras.optimizer import DistributedOptimizer
from hvd_backup.mpi import (
    allgather_object,
    barrier,
    broadcast_object,
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

init, join = NAMES.horovod.init, NAMES.join

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
Adasum = ReduceOp.ADASUM

__all__ = [
    "Adasum",
    "AppliedUpdate",
    "Average",
    "Compression",
    "ConfigError",
    "DistributedOptimizer",
    "HvdBackupError",
    "NotInitializedError",
    "ReduceOp",
    "Sum",
    "UsageError",
    "allgather",
    "allgather_object",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "cross_rank",
    "cross_size",
    "follow",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_enabled",
    "mpi_threads_supported",
    "on_failure",
    "rank",
    "shutdown",
    "size",
    "straggler_report",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return NAMES.resolve(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *NAMES.there()})
