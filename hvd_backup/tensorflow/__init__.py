"""hvd_backup for TensorFlow 2 (and Keras 3): horovod.tensorflow's names, with backup workers.

import hvd_backup.tensorflow as hvd
hvd.init()
tape = hvd.DistributedGradientTape(tape)                                 # or:
optimizer = hvd.DistributedOptimizer(optimizer, backup_workers=1)        # a Keras 3 optimizer

Names that are not here are Horovod's own, where there is a Horovod: horovod_names.py has them.
"""

from typing import TYPE_CHECKING, Any

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
    gloo_enabled,
    is_homogeneous,
    join,
    local_rank,
    local_size,
    mpi_enabled,
    mpi_threads_supported,
    rank,
    size,
)
from hvd_backup.tensorflow import horovod_names
from hvd_backup.tensorflow.collectives import allgather, allreduce, broadcast
from hvd_backup.tensorflow.compression import Compression
from hvd_backup.tensorflow.first_n import FirstN, first_n_allreduce
from hvd_backup.tensorflow.functions import broadcast_variables
from hvd_backup.tensorflow.gradient_tape import DistributedGradientTape

if TYPE_CHECKING:
    from hvd_backup.keras.optimizer import DistributedOptimizer

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM

__all__ = [
    "AppliedUpdate",
    "Average",
    "Compression",
    "ConfigError",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "FirstN",
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
    "cross_rank",
    "cross_size",
    "first_n_allreduce",
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
    "rank",
    "shutdown",
    "size",
    "straggler_report",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "DistributedOptimizer":  # Keras's, which builds on this package
            from hvd_backup.keras.optimizer import DistributedOptimizer

            return DistributedOptimizer
        return horovod_names.resolve(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *(horovod_names.NAMES if horovod_names.HOROVOD.usable() else ())})
