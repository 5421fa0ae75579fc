"""allreduce, allgather and broadcast of TensorFlow tensors over all ranks, as in horovod.tensorflow, with gradients.

allreduce is an op of ours; the others go through NumPy (hvd_backup/mpi.py), inside tf.function as a Python call. What
ours cannot (process sets, other reductions, sparse tensors as they are) is done by Horovod, where it can be used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_backup import context, mpi
from hvd_backup.beside_horovod import is_global
from hvd_backup.errors import UsageError
from hvd_backup.first_n import ReduceOp
from hvd_backup.tensorflow.compression import Compression
from hvd_backup.tensorflow.first_n import dense, reduce
from hvd_backup.tensorflow.horovod_names import NAMES

__all__ = ["allgather", "allreduce", "broadcast"]


def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
) -> Any:
    """Mean or sum over all ranks; waits for all. Arguments as Horovod's; devices and ignore_name_scope change nothing.

    Process sets, the other reductions and a tf.IndexedSlices need Horovod.

    Raises:
        UsageError: a dtype or an op that cannot be used; something that needs Horovod, which is not there.
    """
    if average is not None and op is not None:
        raise UsageError(f"allreduce(average={average}, op={op}): give one of them")
    kind = op if op is not None else ReduceOp.SUM if average is False else ReduceOp.AVERAGE
    here = context.current()
    ours = (
        is_global(process_set) and kind in (ReduceOp.AVERAGE, ReduceOp.SUM) and not isinstance(tensor, tf.IndexedSlices)
    )
    if not ours and NAMES.horovod.usable():
        return NAMES.enter("allreduce")(
            tensor,
            compression=compression,
            op=int(kind),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            name=name,
            **({} if process_set is None else {"process_set": process_set}),
        )
    _only_all_ranks(process_set)
    if tf.executing_eagerly():
        here.before_full_collective("allreduce()")
    given = dense("allreduce", tensor, sparse_as_dense=False)
    if prescale_factor != 1.0:
        given = given * tf.cast(prescale_factor, given.dtype)
    compressed, told = compression.compress(given)
    results, _ = reduce("allreduce", [compressed], here.size, name, kind)
    result = compression.decompress(results[0], told)
    return result if postscale_factor == 1.0 else result * tf.cast(postscale_factor, result.dtype)


def allgather(tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None) -> Any:
    """Concatenates the tensors of all ranks along the first dimension, which may differ; the others must not."""
    if not is_global(process_set) and NAMES.horovod.usable():
        return NAMES.enter("allgather")(tensor, name, ignore_name_scope, process_set)
    _only_all_ranks(process_set)

    @tf.custom_gradient  # each rank's gradient is its part of the sum of all
    def gather(given: Any) -> tuple[Any, Callable[[Any], Any]]:
        result = tf.numpy_function(lambda array: mpi.allgather(array, name), [given], given.dtype)
        result.set_shape([None, *given.shape[1:]])

        def gradient(upstream: Any) -> Any:
            rows = tf.shape(given)[:1] if given.shape.rank else tf.ones([1], tf.int32)
            lengths = tf.numpy_function(mpi.allgather, [rows], tf.int32)
            summed = tf.numpy_function(lambda array: mpi.allreduce(array, op=ReduceOp.SUM), [upstream], upstream.dtype)
            start = tf.reduce_sum(lengths[: context.current().rank])
            return tf.reshape(summed[start : start + rows[0]], tf.shape(given))

        return result, gradient

    return gather(tf.convert_to_tensor(tensor))


def broadcast(
    tensor: Any, root_rank: int, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None
) -> Any:
    """The tensor of rank `root_rank`, on every rank. Shape and dtype must be equal on all ranks."""
    if not is_global(process_set) and NAMES.horovod.usable():
        return NAMES.enter("broadcast")(tensor, root_rank, name, ignore_name_scope, process_set)
    _only_all_ranks(process_set)

    @tf.custom_gradient  # the root's gradient is the sum of all, the others have none
    def send(given: Any) -> tuple[Any, Callable[[Any], Any]]:
        result = tf.numpy_function(lambda array: mpi.broadcast(array, root_rank, name), [given], given.dtype)
        result.set_shape(given.shape)

        def gradient(upstream: Any) -> Any:
            summed = tf.numpy_function(lambda array: mpi.allreduce(array, op=ReduceOp.SUM), [upstream], upstream.dtype)
            summed.set_shape(given.shape)
            return summed if context.current().rank == root_rank else tf.zeros_like(summed)

        return result, gradient

    return send(tf.convert_to_tensor(tensor))


def _only_all_ranks(process_set: Any) -> None:
    if not is_global(process_set):
        raise UsageError(
            f"process_set needs Horovod, which cannot be used here ({NAMES.horovod.why_not()}): give init() a "
            "communicator of the ranks that work together"
        )
