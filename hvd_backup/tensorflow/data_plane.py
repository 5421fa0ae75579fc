"""The GPU that TensorFlow's variables are on, for hvd_backup/data_plane.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_backup import data_plane
from hvd_backup.config import Config
from hvd_backup.context import Context
from hvd_backup.policy import Policy

__all__ = ["device_of", "engage", "gpu_of", "number_of"]


def engage(place: Context, policy: Policy, variables: Sequence[Any]) -> bool:
    """See hvd_backup.data_plane.engage."""
    return data_plane.engage(place, policy, map(device_of, variables), gpu_of)


def device_of(variable: Any) -> str:
    """Where a variable of TensorFlow or Keras is, for tf.device: "/GPU:1", say."""
    spec = tf.DeviceSpec.from_string((variable if isinstance(variable, tf.Variable) else variable.value).device)
    return f"/{spec.device_type or 'CPU'}:{spec.device_index or 0}"


def gpu_of(device: str, config: Config) -> tuple[Any, str]:
    """The GPU as the engine uses it, or None and why it cannot."""
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type != "GPU":
        return None, data_plane.ON_THE_CPU
    if data_plane.library() is None:
        return None, data_plane.NO_LIBRARY
    return _gpu(number_of(spec.device_index), config.nccl_library)


def number_of(index: int) -> int:
    """Of TensorFlow's GPU with this index, as CUDA counts: some may be hidden, and one may count as several."""
    numbers = []
    for physical in tf.config.get_visible_devices("GPU"):
        parts = tf.config.get_logical_device_configuration(physical) or [None]
        numbers += [int(physical.name.rpartition(":")[2])] * len(parts)
    return numbers[index]


@functools.cache
def _gpu(number: int, nccl_library: str) -> tuple[Any, str]:
    """See gpu_of. The GPU library has to show that it runs on this GPU."""
    library: Any = data_plane.library()
    try:
        gpu = data_plane.the_gpu(number, nccl_library)
        memory = gpu.host_memory(4)  # which the GPU can write to as well
        library.pack("float32", "float32", [0], [0], [1], memory.address, 1.0, number, 0)
    except RuntimeError as error:  # compiled for other GPUs, or by a CUDA that is newer than the driver
        return None, (
            f"hvd_backup's GPU library does not run on GPU {number} ({error}): build it with CUDAARCHS set to this "
            "GPU's architecture, and with a CUDA that the driver supports"
        )
    return gpu, ""
