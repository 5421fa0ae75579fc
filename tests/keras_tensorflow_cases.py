"""What the ranks of test_keras.py do with Keras on TensorFlow alone: graphs, tapes, sparse gradients."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_backup.keras as hvd
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


@case
def jit_compile() -> None:
    model(hvd.DistributedOptimizer(keras.optimizers.SGD()), jit_compile=True).fit(shard(), verbose=0)


@case
def sparse_gradient() -> None:
    table = keras.layers.Embedding(10, 3)
    net = keras.Sequential([keras.Input((2,), dtype="int32"), table, keras.layers.Flatten(), keras.layers.Dense(1)])
    net.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD()), loss="mse")
    net.fit(np.zeros((8, 2), np.int32), np.zeros((8, 1), np.float32), verbose=0)


CASES.update(tensorflow_cases.CASES)
