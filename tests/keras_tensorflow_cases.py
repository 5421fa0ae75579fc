"""What the ranks of test_keras.py do with Keras on TensorFlow alone: graphs, tapes, sparse gradients."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_backup.keras as hvd
import hvd_backup.tensorflow as hvd_tensorflow
from hvd_backup import faults
from tests import tensorflow_cases
from tests.keras_cases import OPTIMIZERS, digest, model, shard, train_with_delays, watched

CASES: dict[str, Callable[[], Any]] = {}


def use_one_thread() -> None:
    """Ranks share cores; and a thread of the executor that is blocked would be noticed."""
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Registers a case."""
    CASES[function.__name__] = function
    return function


@case
def delayed_adam_several_steps_in_one_call() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["adam"](), steps_per_execution=3)


@case
def delayed_eagerly() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["momentum"](), epochs=1, run_eagerly=True)


def own_loop(decorate: Callable[[Any], Any], sparse: bool = False) -> dict[str, Any]:
    """A loop over follow() with a GradientTape."""
    faults.inject(*faults.parse("rank=rotate:1,ms=12,p=0.6"))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), backup_workers=1, sparse_as_dense=sparse)
    keras.utils.set_random_seed(3)
    first = keras.layers.Embedding(10, 6) if sparse else keras.layers.Dense(6)
    net = keras.Sequential([keras.Input((6,)), first, keras.layers.Flatten(), keras.layers.Dense(3)])
    optimizer.build(net.trainable_variables)
    seen = watched(optimizer)

    @decorate
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            inputs = tf.cast(tf.clip_by_value(tf.abs(x) * 3, 0, 9), tf.int32) if sparse else x
            loss = tf.reduce_mean(tf.square(net(inputs, training=True) - y))
        gradients = tape.gradient(loss, net.trainable_variables)
        optimizer.metrics(rank=tf.reduce_max(tf.fill([2], hvd.rank())))
        optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
        return loss

    computed = 0
    for _ in range(2):
        for x, y in hvd.follow(shard(), optimizer):
            step(x, y)
            computed += 1
    net.optimizer = optimizer
    return {"digest": digest(net), "step": optimizer.global_step, "computed": computed, "seen": seen}


@case
def own_loop_in_a_function() -> dict[str, Any]:
    return own_loop(tf.function)


@case
def own_loop_eagerly() -> dict[str, Any]:
    return own_loop(lambda function: function)


@case
def own_loop_with_an_embedding() -> dict[str, Any]:
    return own_loop(tf.function, sparse=True)


def taped_loop(decorate: Callable[[Any], Any], name: str) -> dict[str, Any]:
    """A loop with a DistributedGradientTape that has the optimizer. Rank 3 is always slow."""
    faults.inject(*faults.parse("rank=3,ms=200"))
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[name](), backup_workers=1)
    net = model("sgd")
    optimizer.build(net.trainable_variables)
    seen = watched(optimizer)

    @decorate
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as plain:
            loss = tf.reduce_mean(tf.square(net(x, training=True) - y))
        tape = hvd_tensorflow.DistributedGradientTape(plain, optimizer=optimizer)
        optimizer.metrics(rank=hvd.rank())
        gradients = tape.gradient(loss, net.trainable_variables)
        optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
        return tf.linalg.global_norm(gradients)

    norms = {}
    computed = 0
    for _ in range(2):
        for x, y in hvd.follow(shard(), optimizer):
            norm = float(step(x, y))
            norms[optimizer.global_step] = norm
            computed += 1
    net.optimizer = optimizer
    told = {"digest": digest(net), "step": optimizer.global_step, "computed": computed, "seen": seen}
    return {**told, "norms": norms, "counters": optimizer.counters()}


@case
def tape_in_a_function_with_momentum() -> dict[str, Any]:
    return taped_loop(tf.function, "momentum")


@case
def tape_in_a_function_with_adam() -> dict[str, Any]:
    return taped_loop(tf.function, "adam")


@case
def tape_eagerly_with_momentum() -> dict[str, Any]:
    return taped_loop(lambda function: function, "momentum")


@case
def tape_eagerly_with_adam() -> dict[str, Any]:
    return taped_loop(lambda function: function, "adam")


@case
def tape_after_the_end_of_the_round() -> dict[str, Any]:
    """Without follow: rank 0 ends after three steps, and what the others compute then changes nothing."""
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["adam"](), backup_workers=1)
    weights = tf.Variable([1.0, 2.0])
    norms = []
    for _ in range(3 if hvd.rank() == 0 else 9):
        with tf.GradientTape() as plain:
            loss = tf.reduce_sum(tf.square(weights))
        (gradient,) = hvd_tensorflow.DistributedGradientTape(plain, optimizer=optimizer).gradient(loss, [weights])
        optimizer.apply_gradients([(gradient, weights)])
        norms.append(float(tf.norm(gradient)))
        time.sleep(0.02)
    hvd.barrier()
    state = [each.numpy().tobytes() for each in [weights, *optimizer.variables]]
    return {"digest": repr(state), "norms": norms, "step": optimizer.global_step}


@case
def tape_misused() -> list[str]:
    """What is said when gradients are changed between tape and optimizer, or the arguments do not fit."""
    weights = tf.Variable([1.0, 2.0])

    def gradient(optimizer: Any, **options: Any) -> Any:
        with tf.GradientTape() as plain:
            loss = tf.reduce_sum(tf.square(weights))
        return hvd_tensorflow.DistributedGradientTape(plain, optimizer=optimizer, **options).gradient(loss, [weights])

    def clipped(optimizer: Any) -> None:
        optimizer.apply_gradients([(tf.clip_by_norm(gradient(optimizer)[0], 1.0), weights)])

    told = []
    for call in (
        lambda: clipped(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))),
        lambda: tf.function(clipped)(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))),
        lambda: gradient(keras.optimizers.SGD(0.1)),
        lambda: gradient(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), op=hvd.Sum, backup_workers=1),
        lambda: hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backup_workers=1).apply(gradient(None), [weights]),
    ):
        try:
            call()
        except hvd.HvdBackupError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@case
def jit_compile() -> None:
    model(hvd.DistributedOptimizer(keras.optimizers.SGD()), jit_compile=True).fit(shard(), verbose=0)


@case
def jit_compiled_step() -> None:
    weights = tf.Variable([1.0, 2.0])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
    tf.function(lambda: optimizer.apply([weights + 0.0], [weights]), jit_compile=True)()


@case
def unknown_shape_in_fit() -> None:
    class Averages(keras.Sequential):
        def train_step(self, data: Any) -> Any:
            hvd_tensorflow.allreduce(data[0])  # batches may be of any size
            return super().train_step(data)

    trained = Averages([keras.layers.Dense(3)])
    trained.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD()), loss="mse")
    trained.fit(shard(), verbose=0)


@case
def variables_that_differ_in_a_function() -> None:
    variable = tf.Variable(tf.ones([3 if hvd.rank() == 2 else 2]), name="w")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
    tf.function(lambda: optimizer.apply([variable + 0.0], [variable]))()


@case
def sparse_gradient() -> None:
    table = keras.layers.Embedding(10, 3)
    net = keras.Sequential([keras.Input((2,), dtype="int32"), table, keras.layers.Flatten(), keras.layers.Dense(1)])
    net.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD()), loss="mse")
    net.fit(np.zeros((8, 2), np.int32), np.zeros((8, 1), np.float32), verbose=0)


@case
def misuses() -> Any:
    """Those of docs/misuse.md."""
    from tests import misuse, misuse_tensorflow_cases  # noqa: F401  (registers them)

    return misuse.run_all("tensorflow", nullcontext)


CASES.update(tensorflow_cases.CASES)
