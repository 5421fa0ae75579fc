"""Names of horovod.keras that are Horovod's own here, in one table (Horovod 0.28.1)."""

from __future__ import annotations

from hvd_backup.beside_horovod import Horovod, HorovodNames, words

__all__ = ["HOROVOD", "NAMES"]

HOROVOD = Horovod("keras")
NAMES = HorovodNames(
    package="hvd_backup.keras",
    horovod=HOROVOD,
    collectives=words(
        """
        add_process_set reducescatter remove_process_set
        """
    ),
    started=words(
        """
        PartialDistributedOptimizer elastic global_process_set start_timeline stop_timeline
        """
    ),
    plain=words(
        """
        ProcessSet broadcast_global_variables ccl_built cuda_built ddl_built gloo_built mpi_built nccl_built
        rocm_built
        """
    ),
)
