"""Objects and variables that are to be the same on all ranks, and facts for graphs, as in horovod.tensorflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_backup import context, mpi
from hvd_backup import variables as neutral
from hvd_backup.beside_horovod import is_global
from hvd_backup.errors import UsageError
from hvd_backup.tensorflow.collectives import broadcast
from hvd_backup.tensorflow.horovod_names import NAMES

__all__ = [
    "allgather_object",
    "broadcast_",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "local_rank_op",
    "local_size_op",
    "rank_op",
    "size_op",
]


def broadcast_variables(
    variables: Iterable[Any], root_rank: int = 0, process_set: Any = None, inplace: bool = False
) -> None:
    """Gives all ranks the values of rank `root_rank`, in place: see hvd_backup.variables. inplace changes nothing.

    Raises:
        UsageError: inside tf.function; or, on every rank, numbers, shapes or dtypes that differ between ranks.
    """
    if not tf.executing_eagerly():
        raise UsageError("broadcast_variables() inside a tf.function: call it before training, eagerly")
    neutral.broadcast_variables(variables, root_rank, process_set)


def broadcast_(variables: Iterable[Any], root_rank: int, name: str | None = None, process_set: Any = None) -> list[Any]:
    """The same, also inside a tf.function; returns the values."""
    return [each.assign(broadcast(each, root_rank, name, process_set=process_set)) for each in variables]


def broadcast_object(
    obj: Any, root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Any:
    """The object of rank `root_rank`, on every rank. It must pickle. session: TensorFlow 1's; must be None."""
    _no_session(session)
    if not is_global(process_set):
        return NAMES.enter("broadcast_object")(obj, root_rank, name=name, process_set=process_set)
    return mpi.broadcast_object(obj, root_rank, name)


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Callable[[Any], Any]:
    """`broadcast_object` as a function of the object alone."""
    return lambda obj: broadcast_object(obj, root_rank, session, name, process_set)


def allgather_object(obj: Any, session: Any = None, name: str | None = None, process_set: Any = None) -> list[Any]:
    """The objects of all ranks, by rank. Each must pickle. session: TensorFlow 1's; must be None."""
    _no_session(session)
    if not is_global(process_set):
        objects: list[Any] = NAMES.enter("allgather_object")(obj, name=name, process_set=process_set)
        return objects
    return mpi.allgather_object(obj, name)


def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Number of ranks as an int32 scalar, found out when a graph runs, not when it is traced."""
    if process_set_id != 0:
        return NAMES.horovod.start().size_op(process_set_id, name)
    return _when_run(lambda: context.current().size, name)


def rank_op(name: str | None = None) -> Any:
    """This rank, likewise."""
    return _when_run(lambda: context.current().rank, name)


def local_size_op(name: str | None = None) -> Any:
    """Number of ranks on this machine, likewise."""
    return _when_run(lambda: context.current().local_size, name)


def local_rank_op(name: str | None = None) -> Any:
    """This rank among those of this machine, likewise."""
    return _when_run(lambda: context.current().local_rank, name)


def _when_run(ask: Callable[[], int], name: str | None) -> Any:
    answer = tf.numpy_function(lambda: np.int32(ask()), [], tf.int32, name=name)
    answer.set_shape([])
    return answer


def _no_session(session: Any) -> None:
    if session is not None:
        raise UsageError("session: TensorFlow 1's sessions are not supported, only TensorFlow 2")
