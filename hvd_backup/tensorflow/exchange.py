"""The gradients' way out and back, in TensorFlow's graph: which ops they take, on the CPU or on a GPU.

On the CPU, and from a GPU whose gradients go through host memory, the ops pack gradients and TensorFlow copies them. Or
the engine gets them where they are, on a GPU (data_plane.py): then TensorFlow packs a bucket, by one launch for each,
and takes its result apart, and nothing waits for the GPU. Only updates that a rank has missed come through host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_backup.tensorflow.layout import Layout
from hvd_backup.tensorflow.library import ops
from hvd_backup.tensorflow.streams import Stream

__all__ = ["Exchange", "none_to_send"]


class Exchange:
    """Of one optimizer, whose channel is open.

    Args:
        stream: of its channel.
        layout: where the engine has gradients in host memory.
        device: on which the engine gets them, as for tf.device; empty: in host memory.
        judged: it is told with them whether they are finite, if they are on a GPU.
    """

    def __init__(self, stream: Stream, layout: Layout, device: str, judged: bool) -> None:
        self._judged = judged
        self._stream = stream
        self._layout = layout
        self._device = device

    def submit(self, values: Any, sent: Sequence[Any], metrics: Any) -> list[Any]:
        """Hands everything over, in order.

        Args:
            values: hyperparameters that travel along.
            sent: of each variable its gradient.
            metrics: of the bucket after those of the gradients, which is always in host memory; None: there is none.

        Returns:
            Operations of the graph; nothing eagerly.
        """
        submitted: list[Any] = []
        for number, bucket in enumerate(self._layout.buckets):
            with tf.control_dependencies(submitted[-1:]):
                submitted += self._submit(values, [sent[index] for index in bucket], number)
        if metrics is not None:
            with tf.control_dependencies(submitted[-1:]):
                submitted += self._submit_from_host(values, [metrics], len(self._layout.buckets))
        return submitted

    def next_update(self) -> tuple[Any, Any, list[Any]]:
        """The kind of what comes next, its hyperparameters, and of each variable the mean gradient."""
        if self._device:
            return self._next_update_on_device()
        order = [index for bucket in self._layout.buckets for index in bucket]
        gradients = [self._layout.gradients[index] for index in order]
        kind, values, means = ops().hvd_backup_next_update(
            stream=self._stream.number,
            dtypes=[tf.as_dtype(gradient.dtype) for gradient in gradients],
            shapes=[gradient.shape for gradient in gradients],
        )
        return kind, values, _in_order(order, means)

    def _submit(self, values: Any, gradients: list[Any], bucket: int) -> list[Any]:
        if not self._device:
            return self._submit_from_host(values, gradients, bucket)
        with tf.device(self._device):
            contribution = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)
            finite = tf.reduce_all(tf.math.is_finite(contribution)) if self._judged else _in_host_memory(True)
            submitted = ops().hvd_backup_submit_on_device(
                values, finite, contribution, stream=self._stream.number, bucket=bucket
            )
        return [] if submitted is None else [submitted]

    def _submit_from_host(self, values: Any, tensors: list[Any], bucket: int) -> list[Any]:
        submitted = ops().hvd_backup_submit(values, tensors, stream=self._stream.number, bucket=bucket)
        return [] if submitted is None else [submitted]

    def _next_update_on_device(self) -> tuple[Any, Any, list[Any]]:
        layout = self._layout
        with tf.device(self._device):
            kind, values, results = ops().hvd_backup_next_update_on_device(
                stream=self._stream.number,
                dtypes=[tf.as_dtype(dtype) for _, dtype in layout.sizes],
                counts=[elements for elements, _ in layout.sizes],
            )
            parts = [part for b, result in enumerate(results) for part in tf.split(result, layout.elements(b))]
            order = [index for bucket in layout.buckets for index in bucket]
            means = [tf.reshape(part, layout.gradients[i].shape) for i, part in zip(order, parts, strict=True)]
        return kind, values, _in_order(order, means)


def none_to_send() -> Any:
    """No hyperparameters."""
    return _in_host_memory(np.zeros(0))


def _in_host_memory(value: Any) -> Any:
    """A constant that is on the CPU: from a GPU it would have to be copied, after all that the GPU does before."""
    with tf.device("/CPU:0"):
        return tf.constant(value)


def _in_order(order: list[int], means: Sequence[Any]) -> list[Any]:
    """Of each variable its mean; order: the variable of each."""
    return [mean for _, mean in sorted(zip(order, means, strict=True), key=lambda each: each[0])]
