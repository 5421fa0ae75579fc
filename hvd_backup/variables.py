"""The same variables on all ranks, for whatever has a value that NumPy understands: TensorFlow's and Keras's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hvd_backup import byte_collectives, context
from hvd_backup.beside_horovod import is_global
from hvd_backup.errors import UsageError
from hvd_backup.numpy_buffers import bytes_of

__all__ = ["broadcast_variables"]


def broadcast_variables(variables: Iterable[Any], root_rank: int = 0, process_set: Any = None) -> None:
    """Gives all ranks the values of rank `root_rank`, in place.

    Args:
        variables: of a model (`model.variables`) or an optimizer (`optimizer.variables`).
        root_rank: whose values they are to be.
        process_set: None.

    Raises:
        UsageError: on every rank, when numbers, shapes or dtypes differ between ranks.
    """
    if not is_global(process_set):
        raise UsageError("process_set is not there yet: give init() a communicator of the ranks that work together")
    here = context.current()
    root = here.root(root_rank)
    pairs = [(variable, np.array(variable.numpy(), order="C")) for variable in variables]
    told = ", ".join(f"{value.shape} {value.dtype.name}" for _, value in pairs)
    with here.full_collective(f"broadcast_variables({told}, root_rank={root})") as left:
        for variable, value in pairs:
            byte_collectives.broadcast(left.comm, bytes_of(value), left.place_of(root))
            if here.rank != root:
                variable.assign(value)
