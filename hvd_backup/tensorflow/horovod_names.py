"""Names of horovod.tensorflow that are Horovod's own here: resolved when they are used.

    COLLECTIVES  first end the rounds of optimizers, as every full collective
    STARTED      using them starts Horovod
    PLAIN        they need no start

A name that needs Horovod raises an error that says so where Horovod cannot be used. Horovod 0.28.1.
"""

from __future__ import annotations

import functools
from typing import Any

from hvd_backup import context
from hvd_backup.beside_horovod import Horovod

__all__ = ["HOROVOD", "NAMES", "resolve"]

COLLECTIVES = frozenset(
    [
        "add_process_set",
        "alltoall",
        "grouped_allgather",
        "grouped_allreduce",
        "grouped_reducescatter",
        "reducescatter",
        "remove_process_set",
    ]
)
STARTED = frozenset(["SyncBatchNormalization", "elastic", "global_process_set", "start_timeline", "stop_timeline"])
PLAIN = frozenset(
    ["ProcessSet", "ccl_built", "cuda_built", "ddl_built", "gloo_built", "mpi_built", "nccl_built", "rocm_built"]
)
NAMES = COLLECTIVES | STARTED | PLAIN

HOROVOD = Horovod("tensorflow")


def resolve(name: str) -> Any:
    """The object behind a name.

    Raises:
        AttributeError: no such name; or it needs Horovod, which cannot be used: says why.
    """
    if name not in NAMES:
        raise AttributeError(f"module 'hvd_backup.tensorflow' has no attribute {name!r}")
    if why_not := HOROVOD.why_not():
        raise AttributeError(
            f"hvd_backup.tensorflow.{name} is Horovod's own, and Horovod cannot be used here: {why_not}"
        )
    if name in STARTED:
        return getattr(HOROVOD.start(), name)
    theirs = getattr(HOROVOD.module(), name)
    if name in PLAIN:
        return theirs

    @functools.wraps(theirs)
    def collective(*args: Any, **kwargs: Any) -> Any:
        context.current().before_full_collective(f"{name}()")
        HOROVOD.start()
        return theirs(*args, **kwargs)

    return collective
