"""The GPUs that TensorFlow can use, in words: for `hvd-backup check`."""

import functools

import tensorflow as tf

from hvd_backup import data_plane
from hvd_backup.tensorflow.data_plane import gpu_of

__all__ = ["facts"]


def facts() -> list[tuple[str, str]]:
    """How gradients on them travel."""
    if not tf.config.get_visible_devices("GPU"):
        return [("GPU, TF", "none that TensorFlow can use")]
    return [("GPU, TF", f"gradients {data_plane.in_words(functools.partial(gpu_of, '/GPU:0'))}")]
