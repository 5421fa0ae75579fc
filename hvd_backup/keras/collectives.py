"""allreduce, allgather and broadcast of values over all ranks, as in horovod.keras: tensors of the backend come out.

They go through NumPy (hvd_backup/mpi.py) and have no gradients; hvd_backup.tensorflow and hvd_backup.torch have such.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from hvd_backup import mpi
from hvd_backup.errors import UsageError
from hvd_backup.first_n import ReduceOp
from hvd_backup.keras.backend import Compression

__all__ = ["allgather", "allreduce", "broadcast"]


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool = True,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: Any = Compression.none,
) -> Any:
    """The mean or sum over all ranks; waits for all.

    Args:
        value: a tensor, an array or a number; shape and dtype equal on all ranks.
        name: for messages; equal on all ranks.
        average: the mean; otherwise the sum. op, when given, counts instead: Average, Sum, Min, Max or Product.
        prescale_factor, postscale_factor: before and after.
        compression: Compression.none or Compression.fp16.
    """
    kind = ReduceOp(op) if op is not None else ReduceOp.AVERAGE if average else ReduceOp.SUM
    tensor = keras.ops.convert_to_tensor(value)
    if prescale_factor != 1.0:
        tensor = tensor * prescale_factor
    compressed, told = compression.compress(tensor)
    result = compression.decompress(keras.ops.convert_to_tensor(mpi.allreduce(_array(compressed), name, kind)), told)
    return result if postscale_factor == 1.0 else result * postscale_factor


def allgather(value: Any, name: str | None = None) -> Any:
    """The values of all ranks, one after the other along the first dimension, which may differ; the others must not."""
    return keras.ops.convert_to_tensor(mpi.allgather(_array(value), name))


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """The value of rank `root_rank`, on every rank. Shape and dtype must be equal on all ranks."""
    return keras.ops.convert_to_tensor(mpi.broadcast(_array(value), root_rank, name))


def _array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, keras.KerasTensor):
        raise UsageError("a collective on a symbolic Keras tensor: give it values")
    return np.asarray(keras.ops.convert_to_numpy(value))
