"""The updates of one Keras optimizer, in TensorFlow's graph: gradients go out, and all updates that come are applied.

    submit each bucket -> while: next update -> apply it; until it is this rank's own, or there is none

The loop is part of the graph: a late rank applies what it has missed within the same call, each update with the
optimizer's own rules and the learning rate that came with it. All ranks apply updates by the same loop, also between
steps (`take_updates`), so that TensorFlow compiles it alike and the weights stay equal bit for bit.

What it is not: the optimizer's face (hvd_backup/keras/optimizer.py), rounds (hvd_backup/training.py).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_backup import faults
from hvd_backup.applied import AppliedUpdate
from hvd_backup.context import Context
from hvd_backup.errors import UsageError
from hvd_backup.keras.updates import Appliable, KerasUpdates, UpdateOptions, name_of
from hvd_backup.policy import Policy
from hvd_backup.tensorflow.layout import Gradient, Layout
from hvd_backup.tensorflow.library import ops, refuse_xla
from hvd_backup.tensorflow.streams import Stream
from hvd_backup.tensorflow.training import GraphTraining

__all__ = ["GraphUpdates"]

MISSED, OWN = 1, 2  # kinds of an update, as csrc/bindings/tensorflow_ops.cpp has them


class GraphUpdates(KerasUpdates):
    """See KerasUpdates. Also the GraphFramework of its training."""

    training: GraphTraining

    def __init__(self, place: Context, policy: Policy, options: UpdateOptions, optimizer: Appliable) -> None:
        super().__init__(options, optimizer)  # a cycle; tf.function makes others, so the two are collected together
        self.training = GraphTraining(place, policy, self)
        self._place = place
        self._scalars: dict[str, Any] = {}  # for the next gradients
        self._traced = False
        self._layout: Layout | None = None
        self._stream: Stream | None = None
        self._step_function = tf.function(self._trace_step, autograph=False)
        self._take_all = tf.function(lambda: self._take(False), autograph=False)
        self._take_just_one = tf.function(lambda: self._take(True), autograph=False)

    def exchange(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """See KerasUpdates; in a graph or eagerly."""
        refuse_xla()
        self._traced = True
        super().exchange(gradients, variables)

    def metrics(self, scalars: dict[str, Any]) -> None:
        """See KerasUpdates."""
        self.training.metrics(dict.fromkeys(scalars, math.nan))  # the names; values are symbols of a graph, maybe
        self._scalars |= {name: tf.cast(value, tf.float64) for name, value in scalars.items()}

    def on_update(self, function: Callable[[AppliedUpdate], object]) -> None:
        """See KerasUpdates."""
        if self._traced:
            raise UsageError("on_update() after the first apply(), whose graph knows nothing of it: call it before")
        super().on_update(function)

    # --- KerasUpdates ---

    def _prepare(self, gradient: Any, variable: Any) -> Any:
        """Dense, scaled, compressed."""
        name = name_of(variable)
        if isinstance(gradient, tf.IndexedSlices) and not self._options.sparse_as_dense:
            raise UsageError(
                f"the gradient of {name} is a tf.IndexedSlices (of an embedding, say): give "
                "DistributedOptimizer(..., sparse_as_dense=True), which sends it as a dense tensor"
            )
        gradient = tf.convert_to_tensor(gradient)
        shape = tuple(variable.shape)
        if not gradient.shape.is_compatible_with(shape):
            raise UsageError(f"the gradient of {name} has shape {gradient.shape}, the variable {shape}")
        if self._options.prescale != 1.0:
            gradient = gradient * tf.cast(self._options.prescale, gradient.dtype)
        compressed, _ = self._options.compression.compress(gradient)
        return compressed

    def _restore(self, mean: Any, variable: Any) -> Any:
        """The opposite of `_prepare`."""
        gradient = self._options.compression.decompress(mean, tf.as_dtype(variable.dtype))
        if self._options.postscale != 1.0:
            gradient = gradient * tf.cast(self._options.postscale, gradient.dtype)
        return gradient

    def _zeros(self, variable: Any) -> Any:
        return tf.zeros(variable.shape, variable.dtype)

    def _open(self, variables: list[Any], sent: list[Any]) -> None:
        """The first gradients are there, maybe as symbols of a graph."""
        gradients = [
            Gradient(name_of(variable), tuple(variable.shape), tf.as_dtype(tensor.dtype).name)
            for variable, tensor in zip(variables, sent, strict=True)
        ]
        told = [(gradient.shape, gradient.dtype) for gradient in gradients]
        update_bytes = sum(gradient.bytes for gradient in gradients)
        self.training.open(self._describe(variables, told), b"", update_bytes)
        layout = Layout(gradients, self._options.bucket_bytes)
        self.training.set_layout(layout.sizes, layout.result_addresses, layout)
        stream = Stream(
            self._place,
            self.training.opened,
            [*layout.buffers, *self.training.metrics_buffers()],
            hyperparameters=[] if self._rate_to_send() is None else ["learning_rate"],
        )
        self._variables, self._layout, self._stream = variables, layout, stream
        self.training.attach(stream)

    def _step(self, sent: list[Any]) -> None:
        scalars, self._scalars = self._scalars, {}
        if not tf.executing_eagerly() and any(
            tf.is_tensor(each) and hasattr(each, "numpy") for each in scalars.values()
        ):
            raise UsageError(
                "metrics() was called eagerly, but apply() within a tf.function, which would send these numbers for "
                "ever: call it in that function (in train_step(), before apply())"
            )
        self._step_function(sent, scalars)

    # --- GraphFramework ---

    def take_updates(self, one: bool) -> None:
        """See GraphFramework."""
        (self._take_just_one if one else self._take_all)()

    # --- inside ---

    def _trace_step(self, sent: list[Any], scalars: dict[str, Any]) -> None:
        assert self._layout is not None and self._stream is not None
        with tf.control_dependencies(self._delay()):
            rate = self._learning_rate()
            values = tf.zeros([0], tf.float64) if rate is None else tf.cast(tf.reshape(rate, [1]), tf.float64)
        buckets = [[sent[index] for index in bucket] for bucket in self._layout.buckets]
        if names := self.training.metric_names:
            buckets.append([_counted([scalars.get(name, math.nan) for name in names])])
        submitted: list[Any] = []
        for number, tensors in enumerate(buckets):
            with tf.control_dependencies(submitted[-1:]):
                submitted.append(ops().hvd_backup_submit(values, tensors, stream=self._stream.number, bucket=number))
        with tf.control_dependencies([operation for operation in submitted if operation is not None]):
            self._take(False)

    def _take(self, one: bool) -> None:
        def missed(_: Any) -> tuple[Any]:
            again = self._take_one()
            return (tf.logical_and(again, not one),)

        tf.while_loop(lambda going: going, missed, (tf.constant(True),), parallel_iterations=1)

    def _take_one(self) -> Any:
        """Takes the next update and applies it; whether there may be more."""
        assert self._layout is not None and self._stream is not None
        order = [index for bucket in self._layout.buckets for index in bucket]
        gradients = [self._layout.gradients[index] for index in order]
        kind, values, means = ops().hvd_backup_next_update(
            stream=self._stream.number,
            dtypes=[tf.as_dtype(gradient.dtype) for gradient in gradients],
            shapes=[gradient.shape for gradient in gradients],
        )
        mean_of = dict(zip(order, means, strict=True))
        restored = [self._restore(mean_of[i], variable) for i, variable in enumerate(self._variables)]

        def apply() -> Any:
            rate = self._learning_rate()
            if rate is not None:
                told = tf.cast(values[0], rate.dtype)
                self._optimizer._learning_rate_variable().assign(tf.where(tf.math.is_nan(told), rate, told))
            self._optimizer._apply_update(restored, self._variables)
            with tf.control_dependencies(self._functions()):
                return tf.equal(kind, MISSED)

        return tf.cond(kind > 0, apply, lambda: tf.constant(False))

    def _functions(self) -> list[Any]:
        """The functions of on_update, after all that this graph has done so far."""
        if not self.training.after_update:
            return []
        this = weakref.ref(self.training)

        def run() -> None:
            training = this()
            if training is not None:
                for function in training.after_update:
                    function(training.last_update)

        with tf.control_dependencies(tf.compat.v1.get_default_graph().get_operations()):
            return [tf.py_function(run, [], [])]

    def _learning_rate(self) -> Any:
        """Its value, when it travels with updates."""
        variable = self._rate_to_send()
        return None if variable is None else tf.convert_to_tensor(variable)

    def _delay(self) -> list[Any]:
        """The artificial delay of this rank, if there are any (faults.py)."""
        if not faults.injected().delays:
            return []
        this, place = weakref.ref(self.training), self._place

        def sleep() -> None:
            training = this()
            if training is not None:
                faults.injected().sleep(place.rank, training.global_step, place.size)

        return [tf.py_function(sleep, [], [])]


def _counted(values: list[Any]) -> Any:
    """Scalars as hvd_backup/metrics.py sends them: (value, 1) each, (0, 0) for NaN."""
    numbers = tf.stack([tf.reshape(tf.cast(value, tf.float64), []) for value in values])
    given = tf.logical_not(tf.math.is_nan(numbers))
    pairs = tf.stack([tf.where(given, numbers, tf.zeros_like(numbers)), tf.cast(given, tf.float64)], axis=1)
    return tf.reshape(pairs, [-1])
