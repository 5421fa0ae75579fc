"""The updates of one Keras optimizer, in TensorFlow's graph: gradients go out, and all updates that come are applied.

    submit each bucket -> while: next update -> apply it; until it is this rank's own, or there is none

The loop is part of the graph: a late rank applies what it has missed within the same call, each update with the
optimizer's own rules and the learning rate that came with it. All ranks apply updates by the same loop, also between
steps (`take_updates`), so that TensorFlow compiles it alike and the weights stay equal bit for bit. That is why a
DistributedGradientTape which is given the optimizer leaves applying to it, too (`apply_and_show`).

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
from hvd_backup.tensorflow import data_plane
from hvd_backup.tensorflow.exchange import Exchange, none_to_send
from hvd_backup.tensorflow.gradient_tape import AVERAGED
from hvd_backup.tensorflow.layout import Gradient, Layout
from hvd_backup.tensorflow.library import refuse_xla
from hvd_backup.tensorflow.streams import Stream
from hvd_backup.tensorflow.training import GraphTraining

__all__ = ["GraphUpdates"]

MISSED, OWN, OFFER, RESYNC = 1, 2, 3, 4  # kinds of an update, as csrc/bindings/tensorflow_ops.h has them
APPLIED_TO = "_hvd_backup_applied_to"  # of a gradient that apply_and_show() has returned: the id of its variable


class GraphUpdates(KerasUpdates):
    """See KerasUpdates. Also the GraphFramework of its training."""

    training: GraphTraining

    def __init__(self, place: Context, policy: Policy, options: UpdateOptions, optimizer: Appliable) -> None:
        super().__init__(options, optimizer)  # a cycle; tf.function makes others, so the two are collected together
        self.training = GraphTraining(place, policy, self)
        self._place = place
        self._scalars: dict[str, Any] = {}  # for the next gradients
        self._traced = False
        self._by_tape = False
        self._layout: Layout | None = None
        self._exchange: Exchange | None = None
        self._step_function = tf.function(self._trace_step, autograph=False)
        self._take_function = tf.function(self._take, autograph=False)

    @tf.autograph.experimental.do_not_convert
    def exchange(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        """See KerasUpdates; in a graph or eagerly. What comes from apply_and_show() has been applied already."""
        refuse_xla()
        if self._by_tape:
            self._check_applied(gradients, variables)
            return None
        if self.training.backup_workers > 0 and any(hasattr(gradient, AVERAGED) for gradient in gradients):
            raise UsageError(
                "gradients of a DistributedGradientTape are averaged already, over another set of ranks than this "
                "DistributedOptimizer would: give the tape the optimizer, DistributedGradientTape(tape, "
                "optimizer=optimizer), or leave the tape plain"
            )
        self._traced = True
        return super().exchange(gradients, variables)

    @tf.autograph.experimental.do_not_convert
    def apply_and_show(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """As exchange(), for a tape. From then on exchange() takes nothing but what this returns.

        Returns:
            Of each gradient the mean in the newest update applied; zeros when the round is over and there was none.
        """
        refuse_xla()
        self._traced = self._by_tape = True
        means: list[Any] = super().exchange(gradients, variables)
        for mean, variable in zip(means, self._variables, strict=True):
            setattr(mean, APPLIED_TO, id(variable))
        return means

    def _check_applied(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Raises unless these are what apply_and_show() has returned for these variables."""
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if len(pairs) != len(self._variables) or any(getattr(g, APPLIED_TO, None) != id(v) for g, v in pairs):
            raise UsageError(
                "apply() of an optimizer that was given to DistributedGradientTape(tape, optimizer=...), with other "
                "gradients than tape.gradient() has returned in the same function, as they were. It has applied those "
                "to the weights, on all ranks alike, so what is made of them afterwards is lost. To clip, give the "
                "optimizer clipnorm, clipvalue or global_clipnorm; for anything else leave the tape as it is: "
                "apply() then averages what it is given"
            )

    @tf.autograph.experimental.do_not_convert
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
        direct = data_plane.engage(self._place, self.training.policy, variables)
        self.training.open(self._describe(variables, told), b"", update_bytes, direct)
        layout = Layout(gradients, self._options.bucket_bytes, self._place.engine.device if direct else None)
        self.training.set_layout(layout.sizes, layout.result_addresses, layout)
        stream = Stream(
            self._place,
            self.training.opened,
            [*layout.buffers, *self.training.metrics_buffers()],
            hyperparameters=[] if self._rate_to_send() is None else ["learning_rate"],
        )
        device = data_plane.device_of(variables[0]) if direct else ""
        self._exchange = Exchange(stream, layout, device, judged=self.training.policy.nonfinite == "drop")
        self._variables, self._layout = variables, layout
        self.training.attach(stream)

    def _step(self, sent: list[Any]) -> Any:
        scalars, self._scalars = self._scalars, {}
        if not tf.executing_eagerly() and any(
            tf.is_tensor(each) and hasattr(each, "numpy") for each in scalars.values()
        ):
            raise UsageError(
                "metrics() was called eagerly, but apply() within a tf.function, which would send these numbers for "
                "ever: call it in that function (in train_step(), before apply())"
            )
        return self._step_function(sent, scalars, self._by_tape)

    # --- GraphFramework ---

    def take_updates(self, one: bool) -> None:
        """See GraphFramework."""
        self._take_function(one)

    # --- inside ---

    def _trace_step(self, sent: list[Any], scalars: dict[str, Any], show: bool) -> list[Any]:
        assert self._exchange is not None
        with tf.control_dependencies(self._delay()):
            rate = self._learning_rate()
            values = none_to_send() if rate is None else tf.cast(tf.reshape(rate, [1]), tf.float64)
        names = self.training.metric_names
        metrics = _counted([scalars.get(name, math.nan) for name in names]) if names else None
        with tf.control_dependencies(self._exchange.submit(values, sent, metrics)):
            return self._take(False, show)

    def _take(self, one: bool, show: bool = False) -> list[Any]:
        """Applies updates until there are no more; one: just one; show: returns the mean gradients of the last one."""
        assert self._layout is not None

        def missed(_: Any, *shown: Any) -> list[Any]:
            again, *means = self._take_one(shown)
            return [tf.logical_and(again, not one), *means]

        none = [tf.zeros(gradient.shape, gradient.dtype) for gradient in self._layout.gradients if show]
        shown = [self._restore(zeros, variable) for zeros, variable in zip(none, self._variables, strict=False)]
        return list(
            tf.while_loop(lambda going, *_: going, missed, [tf.constant(True), *shown], parallel_iterations=1)[1:]
        )

    def _take_one(self, shown: Sequence[Any]) -> list[Any]:
        """Takes the next update and applies it; whether there may be more, and its means in place of `shown`."""
        assert self._exchange is not None
        kind, values, means = self._exchange.next_update()
        restored = [self._restore(mean, variable) for mean, variable in zip(means, self._variables, strict=True)]

        def apply() -> list[Any]:
            rate = self._learning_rate()
            if rate is not None:
                told = tf.cast(values[0], rate.dtype)
                self._optimizer._learning_rate_variable().assign(tf.where(tf.math.is_nan(told), rate, told))
            self._optimizer._apply_update(restored, self._variables)
            with tf.control_dependencies(self._functions()):
                return [tf.equal(kind, MISSED), *(restored if shown else ())]

        def resync() -> list[Any]:
            with tf.control_dependencies([tf.py_function(self._resync, [kind], [])]):
                return [tf.constant(True), *(tf.identity(mean) for mean in shown)]

        def nothing() -> list[Any]:
            return [tf.constant(False), *shown]

        if self.training.backup_workers == 0 or self.training.policy.on_max_lag != "resync":
            return list(tf.cond(kind > 0, apply, nothing))
        return list(tf.cond(kind > 0, lambda: tf.cond(kind > OWN, resync, apply), nothing))

    @property
    def _resync(self) -> Callable[[Any], None]:
        """What is not in the graph: a copy of all variables for another rank, or its copy in their place."""
        this = weakref.ref(self.training)

        def run(kind: Any) -> None:
            training = this()
            if training is not None:
                training.resync(int(kind) == RESYNC)

        return run

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
