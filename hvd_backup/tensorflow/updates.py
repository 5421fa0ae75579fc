"""The updates of one Keras optimizer, in TensorFlow's graph: gradients go out, and all updates that come are applied.

    submit each bucket -> while: next update -> apply it; until it is this rank's own, or there is none

The loop is part of the graph: a late rank applies what it has missed within the same call, each update with the
optimizer's own rules and the learning rate that came with it. All ranks apply updates by the same loop, also between
steps (`take_updates`), so that TensorFlow compiles it alike and the weights stay equal bit for bit.

What it is not: the optimizer's face (hvd_backup/keras/optimizer.py), rounds (hvd_backup/training.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # no public name says whether a graph is compiled by XLA

from hvd_backup import faults
from hvd_backup.context import Context
from hvd_backup.errors import UsageError
from hvd_backup.policy import Policy
from hvd_backup.tensorflow.layout import Gradient, Layout
from hvd_backup.tensorflow.library import ops
from hvd_backup.tensorflow.streams import Stream
from hvd_backup.tensorflow.training import GraphTraining

__all__ = ["GraphUpdates", "UpdateOptions"]

MISSED, OWN = 1, 2  # kinds of an update, as csrc/bindings/tensorflow_ops.cpp has them


@dataclass(frozen=True)
class UpdateOptions:
    """How gradients are sent.

    Attributes:
        bucket_bytes: a bucket is closed before it exceeds this.
        prescale, postscale: factors before and after the mean.
        compression: Horovod's interface: compress(tensor) -> (tensor, context), decompress(tensor, context) -> tensor.
        sparse_as_dense: tf.IndexedSlices are sent dense; otherwise refused.
        description: lines that must be equal on all ranks.
    """

    bucket_bytes: int
    prescale: float
    postscale: float
    compression: Any
    sparse_as_dense: bool
    description: tuple[str, ...]


class Appliable(Protocol):
    """The optimizer."""

    def _apply_update(self, gradients: list[Any], variables: list[Any]) -> None:
        """Applies gradients to the variables, as the wrapped optimizer does."""

    def _learning_rate_variable(self) -> Any:
        """The variable whose value travels with updates; None: the learning rate follows from the iterations."""

    def _known_variables(self) -> list[Any]:
        """The trainable variables that it was built with; empty before."""


class GraphUpdates:
    """Owned by its optimizer.

    Attributes:
        training: the optimizer's updates and rounds.
    """

    def __init__(self, place: Context, policy: Policy, options: UpdateOptions, optimizer: Appliable) -> None:
        self.training = GraphTraining(place, policy, self)
        self._place = place
        self._options = options
        self._optimizer = optimizer  # a cycle; tf.function makes others, so the two are collected together
        self._variables: list[Any] = []
        self._layout: Layout | None = None
        self._stream: Stream | None = None
        self._step_function = tf.function(self._step, autograph=False)
        self._take_all = tf.function(lambda: self._take(False), autograph=False)
        self._take_just_one = tf.function(lambda: self._take(True), autograph=False)

    def apply(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Sends the gradients, and applies this update and those missed before; in a graph or eagerly.

        Args:
            gradients: one for each variable, or None where there is none.
            variables: the same, in the same order, at every call and on every rank.
        """
        self.training.check_usable()
        _refuse_xla()
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if not pairs:
            raise UsageError("apply(): there is no gradient for any variable: is the loss computed from the model?")
        present = [variable for _, variable in pairs]
        sent = [self._prepare(gradient, variable) for gradient, variable in pairs]
        if self._layout is None:
            self._open(present, sent)
        elif [id(variable) for variable in present] != [id(variable) for variable in self._variables]:
            raise UsageError(
                f"apply() with gradients for {_names(present)}, but the first call had {_names(self._variables)}: "
                "every update has the same variables; use one DistributedOptimizer for each set of variables"
            )
        self.training.gradient_begins()
        self._step_function(sent)

    def _prepare(self, gradient: Any, variable: Any) -> Any:
        """The gradient as it is sent: dense, scaled, compressed."""
        name = _name(variable)
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

    # --- GraphFramework ---

    def open(self) -> None:
        """See GraphFramework: this rank has no gradient to tell dtypes by; those of the variables do."""
        variables = self._optimizer._known_variables()
        if not variables:
            raise UsageError(
                "this rank has not computed a single gradient, and its optimizer was not built, so it does not know "
                "what the others send: optimizer.build(model.trainable_variables) before the loop"
            )
        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
        self._open(variables, [self._prepare(g, v) for g, v in zip(zeros, variables, strict=True)])

    def gradient_started(self) -> bool:
        """See GraphFramework."""
        return False

    def take_updates(self, one: bool) -> None:
        """See GraphFramework."""
        (self._take_just_one if one else self._take_all)()

    # --- inside ---

    def _open(self, variables: list[Any], sent: list[Any]) -> None:
        """Agrees with all ranks on what is sent. The first gradients are there, maybe as symbols of a graph."""
        gradients = [
            Gradient(_name(variable), tuple(variable.shape), tf.as_dtype(tensor.dtype).name)
            for variable, tensor in zip(variables, sent, strict=True)
        ]
        # Without the names of layers, which Keras numbers: a rank may have made more of them than the others.
        lines = [
            f"variable {number}: {gradient.name.rpartition('/')[2]} {gradient.shape} {gradient.dtype}"
            for number, gradient in enumerate(gradients)
        ]
        update_bytes = sum(gradient.bytes for gradient in gradients)
        self.training.open([*self._options.description, *lines], b"", update_bytes)
        layout = Layout(gradients, self._options.bucket_bytes)
        self.training.set_layout(layout.sizes, layout.result_addresses, layout)
        travels = self.training.backup_workers > 0 and self._optimizer._learning_rate_variable() is not None
        stream = Stream(
            self._place,
            self.training.opened,
            layout.bytes,
            layout.contribution_addresses,
            layout.result_addresses,
            ["learning_rate"] if travels else [],
        )
        self._variables, self._layout, self._stream = variables, layout, stream
        self.training.attach(stream)

    def _step(self, sent: list[Any]) -> None:
        assert self._layout is not None and self._stream is not None
        with tf.control_dependencies(self._delay()):
            rate = self._learning_rate()
            values = tf.zeros([0], tf.float64) if rate is None else tf.cast(tf.reshape(rate, [1]), tf.float64)
        submitted: list[Any] = []
        for number, bucket in enumerate(self._layout.buckets):
            with tf.control_dependencies(submitted[-1:]):
                submitted.append(
                    ops().hvd_backup_submit(
                        values, [sent[index] for index in bucket], stream=self._stream.number, bucket=number
                    )
                )
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
            return tf.equal(kind, MISSED)

        return tf.cond(kind > 0, apply, lambda: tf.constant(False))

    def _learning_rate(self) -> Any:
        """Its value, when it travels with updates."""
        if self.training.backup_workers == 0:
            return None
        variable = self._optimizer._learning_rate_variable()
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


def _refuse_xla() -> None:
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise UsageError(
            "a function that XLA compiles cannot exchange gradients: model.compile(..., jit_compile=False), or "
            "tf.function without jit_compile=True; layers may be compiled by functions of their own"
        )
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        raise UsageError(
            "a tf.distribute strategy with several replicas is at work: hvd_backup needs one process for each device"
        )


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", None) or variable.name)


def _names(variables: list[Any]) -> str:
    return ", ".join(_name(variable) for variable in variables)
