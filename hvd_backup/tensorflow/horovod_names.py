"""Names of horovod.tensorflow that are Horovod's own here, in one table (Horovod 0.28.1)."""

from __future__ import annotations

from hvd_backup.beside_horovod import Horovod, HorovodNames, words

__all__ = ["HOROVOD", "NAMES"]

HOROVOD = Horovod("tensorflow")
NAMES = HorovodNames(
    package="hvd_backup.tensorflow",
    horovod=HOROVOD,
    collectives=words(
        """
        add_process_set alltoall grouped_allgather grouped_allreduce grouped_reducescatter reducescatter
        remove_process_set
        """
    ),
    started=words(
        """
        PartialDistributedGradientTape SyncBatchNormalization elastic global_process_set
        process_set_included_op start_timeline stop_timeline
        """
    ),
    plain=words(
        """
        BroadcastGlobalVariablesHook LocalGradientAggregationHelper ProcessSet broadcast_global_variables
        ccl_built check_extension check_num_rank_power_of_2 cuda_built ddl_built gloo_built gpu_available
        handle_average_backwards_compatibility mpi_built nccl_built refs_to_vars rocm_built split_list
        vars_to_refs
        """
    ),
)
