"""DistributedOptimizer with the arguments of horovod.tensorflow's: that of hvd_backup.keras, for Keras 3 optimizers."""

from __future__ import annotations

from typing import Any

from hvd_backup.first_n import ReduceOp
from hvd_backup.tensorflow.compression import Compression

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(  # noqa: N802
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: int = ReduceOp.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    **options: Any,
) -> Any:
    """See hvd_backup.keras.DistributedOptimizer; options: backup_workers and the rest. use_locking changes nothing."""
    from hvd_backup.keras import optimizer as keras_optimizer  # which builds on this package

    return keras_optimizer.DistributedOptimizer(
        optimizer,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        backward_passes_per_step=backward_passes_per_step,
        process_set=process_set,
        **options,
    )
