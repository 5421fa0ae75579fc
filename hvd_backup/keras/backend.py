"""What of hvd_backup.keras depends on Keras's backend: TensorFlow or PyTorch, whichever Keras runs on.

Neither needs the other to be installed.
"""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["BACKEND", "Compression", "Updates", "broadcast_variables"]

BACKEND: str = keras.backend.backend()
Compression: Any
Updates: Any
broadcast_variables: Any

if BACKEND == "tensorflow":
    from hvd_backup.keras.tensorflow_updates import GraphUpdates as Updates
    from hvd_backup.tensorflow.compression import Compression
    from hvd_backup.tensorflow.functions import broadcast_variables
elif BACKEND == "torch":
    from hvd_backup.keras.torch_updates import TorchUpdates as Updates
    from hvd_backup.torch.compression import Compression
    from hvd_backup.variables import broadcast_variables
else:
    raise ImportError(
        f"hvd_backup.keras works with Keras on TensorFlow or PyTorch, but its backend is {BACKEND}: set "
        "KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch before keras is imported"
    )
