"""hvd_backup for TensorFlow 2 (and Keras 3): horovod.tensorflow's names, with backup workers.

import hvd_backup.tensorflow as hvd
hvd.init()
tape = hvd.DistributedGradientTape(tape)                                 # or:
optimizer = hvd.DistributedOptimizer(optimizer, backup_workers=1)        # a Keras 3 optimizer

Names that are not here are Horovod's own, where there is a Horovod: horovod_names.py has them.
"""

from typing import TYPE_CHECKING, Any

from hvd_backup.applied import AppliedUpdate
from hvd_backup.context import is_initialized, shutdown, straggler_report
from hvd_backup.errors import ConfigError, HvdBackupError, NotInitializedError, UsageError
from hvd_backup.failures import on_failure
from hvd_backup.first_n import ReduceOp
from hvd_backup.follow import follow
from hvd_backup.mpi import (
    barrier,
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
from hvd_backup.tensorflow.collectives import allgather, allreduce, broadcast
from hvd_backup.tensorflow.compression import Compression
from hvd_backup.tensorflow.first_n import FirstN, first_n_allreduce
from hvd_backup.tensorflow.functions import (
    allgather_object,
    broadcast_,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
    local_rank_op,
    local_size_op,
    rank_op,
    size_op,
)
from hvd_backup.tensorflow.gradient_tape import DistributedGradientTape
from hvd_backup.tensorflow.horovod_names import NAMES
from hvd_backup.tensorflow.optimizer import DistributedOptimizer

init, join = NAMES.horovod.init, NAMES.join

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
    "DistributedGradientTape",
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
    "allgather_object",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_object_fn",
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
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_enabled",
    "mpi_threads_supported",
    "on_failure",
    "rank",
    "rank_op",
    "shutdown",
    "size",
    "size_op",
    "straggler_report",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return NAMES.resolve(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *NAMES.there()})
