"""Before training: the same variables on all ranks. As in horovod.tensorflow.functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_backup import byte_collectives, context
from hvd_backup.errors import UsageError
from hvd_backup.numpy_buffers import bytes_of

__all__ = ["broadcast_variables"]


def broadcast_variables(variables: Iterable[Any], root_rank: int = 0, process_set: Any = None) -> None:
    """Gives all ranks the values of rank `root_rank`, in place.

    Args:
        variables: of a model (`model.variables`) or an optimizer (`optimizer.variables`), TensorFlow's or Keras's.
        root_rank: whose values they are to be.
        process_set: None.

    Raises:
        UsageError: inside tf.function; or, on every rank, numbers, shapes or dtypes that differ between ranks.
    """
    if not tf.executing_eagerly():
        raise UsageError("broadcast_variables() inside a tf.function: call it before training, eagerly")
    if process_set is not None and getattr(process_set, "process_set_id", None) != 0:
        raise UsageError("process_set is not there yet: give init() a communicator of the ranks that work together")
    here = context.current()
    if not 0 <= root_rank < here.size:
        raise UsageError(f"root_rank={root_rank}: expected 0 to {here.size - 1}, there are {here.size} ranks")
    listed = list(variables)
    told = ", ".join(f"{tuple(each.shape)} {tf.as_dtype(each.dtype).name}" for each in listed)
    here.full_collective(f"broadcast_variables({told}, root_rank={root_rank})")
    for variable in listed:
        value = np.array(variable.numpy(), order="C")
        byte_collectives.broadcast(here.comm, bytes_of(value), root_rank)
        if here.rank != root_rank:
            variable.assign(value)
