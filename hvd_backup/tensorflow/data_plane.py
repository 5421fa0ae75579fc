"""The GPU that TensorFlow's variables are on, for hvd_backup/data_plane.py."""

from __future__ import annotations

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


def gpu_of(device: str, config: Config) -> data_plane.Gpu:
    """The GPU as the engine uses it, or None and why it cannot."""
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type != "GPU":
        return None, data_plane.ON_THE_CPU
    return data_plane.the_gpu(number_of(spec.device_index), config.nccl_library)


def number_of(index: int) -> int:
    """Of TensorFlow's GPU with this index, as CUDA counts: some may be hidden, and one may count as several."""
    numbers = []
    for physical in tf.config.get_visible_devices("GPU"):
        parts = tf.config.get_logical_device_configuration(physical) or [None]
        numbers += [int(physical.name.rpartition(":")[2])] * len(parts)
    return numbers[index]
