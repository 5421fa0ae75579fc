"""Models that were saved with a DistributedOptimizer, or with a plain one, loaded for distributed training."""

from __future__ import annotations

from typing import Any

import keras

from hvd_backup.keras.backend import Compression
from hvd_backup.keras.optimizer import DistributedOptimizer

__all__ = ["load_model"]


def load_model(
    filepath: Any,
    custom_optimizers: list[type] | None = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
    **options: Any,
) -> Any:
    """keras.models.load_model(), whose optimizer is a DistributedOptimizer, with the state that was saved.

    Args:
        filepath: of a model that was saved compiled.
        custom_optimizers: optimizer classes that are not Keras's own.
        custom_objects: as Keras's.
        compression, options: DistributedOptimizer's arguments.
        legacy_opts: Horovod's; Keras 3 has no legacy optimizers, so it changes nothing.
    """
    known = {kind.__name__: kind for kind in custom_optimizers or ()}
    model = keras.models.load_model(filepath, custom_objects={**known, **(custom_objects or {})})
    if getattr(model, "optimizer", None) is not None:
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression, **options)
    return model
