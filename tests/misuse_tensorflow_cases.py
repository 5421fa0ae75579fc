"""Misuses of hvd_backup.tensorflow and hvd_backup.keras, four ranks. See tests/misuse.py.

They run in the launch of ranks that serves all tests of TensorFlow (keras_tensorflow_cases.py), so everything that
needs TensorFlow is imported when a case runs: the page is made without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.misuse import Scene, table_of

misuse = table_of("tensorflow")

KERAS = "Keras (`hvd_backup.keras`)"
TENSORFLOW = "TensorFlow (`hvd_backup.tensorflow`)"


def variable(scene: Scene, *names: str, length: int = 2) -> Any:
    """Variables whose values must not change silently."""
    import keras

    made = [keras.Variable(np.ones(length, np.float32), name=name) for name in names or ("w",)]
    scene.weights = lambda: b"".join(np.asarray(each).tobytes() for each in made)
    return made if names else made[0]


def optimizer(**options: Any) -> Any:
    import keras

    import hvd_backup.keras as hvd

    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **options)


def odd() -> bool:
    import hvd_backup.keras as hvd

    return bool(hvd.rank() == 1)


@misuse(KERAS, '`DistributedOptimizer("adam")`', "UsageError", "(str): expected a keras.optimizers.Optimizer")
def no_keras_optimizer(scene: Scene) -> None:
    import hvd_backup.keras as hvd

    with scene.misuse():
        hvd.DistributedOptimizer("adam")


@misuse(KERAS, "wrapping a Keras optimizer twice", "UsageError", "one already: wrap a plain one, once")
def keras_wrapped_twice(scene: Scene) -> None:
    import hvd_backup.keras as hvd

    with scene.misuse():
        hvd.DistributedOptimizer(optimizer())


@misuse(KERAS, '`nonfinite="drop"` with a LossScaleOptimizer', "ConfigError", "so the scale would only grow")
def keras_scale_and_drop(scene: Scene) -> None:
    import keras

    import hvd_backup.keras as hvd

    with scene.misuse():
        hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), nonfinite="drop")


@misuse(KERAS, "`LossScaleOptimizer` around a DistributedOptimizer", "UsageError", "Wrap it the other way round")
def loss_scale_around(scene: Scene) -> None:
    import keras

    with scene.misuse():
        keras.optimizers.LossScaleOptimizer(optimizer())


@misuse(KERAS, "`backward_passes_per_step=2`", "ConfigError", "give the optimizer gradient_accumulation_steps=2")
def keras_passes(scene: Scene) -> None:
    with scene.misuse():
        optimizer(backward_passes_per_step=2)


@misuse(KERAS, "`op=hvd.Max`", "ConfigError", "expected hvd.Average or hvd.Sum")
def keras_op(scene: Scene) -> None:
    with scene.misuse():
        optimizer(op=4)


@misuse(KERAS, "`compile(jit_compile=True)`: XLA cannot exchange gradients", "UsageError", "jit_compile=False")
def keras_jit(scene: Scene) -> None:
    import keras

    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    net.compile(optimizer(), loss="mse", jit_compile=True)
    scene.weights = lambda: net.get_weights()[0].tobytes()
    with scene.misuse():
        net.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


@misuse(KERAS, "the gradient of an embedding without `sparse_as_dense=True`", "UsageError", "sparse_as_dense=True")
def keras_sparse(scene: Scene) -> None:
    import tensorflow as tf

    weights = variable(scene)
    with scene.misuse():
        optimizer().apply([tf.IndexedSlices(tf.ones([1]), tf.constant([0]), tf.constant([2]))], [weights])


@misuse(KERAS, "a gradient of another shape than its variable", "UsageError", "has shape (3,), the variable (2,)")
def keras_shape(scene: Scene) -> None:
    import keras

    weights = variable(scene)
    with scene.misuse():
        optimizer().apply([keras.ops.ones([3])], [weights])


@misuse(KERAS, "other variables than in the first `apply()`", "UsageError", "apply() with gradients for …but the first")
def keras_other_variables(scene: Scene) -> None:
    import keras

    both = variable(scene, "a", "b")
    made = optimizer()
    made.build(both)
    made.apply([keras.ops.ones([2])] * 2, both)
    with scene.misuse():
        made.apply([keras.ops.ones([2])], both[:1])


@misuse(KERAS, "`on_update` after the first `apply()`", "UsageError", "on_update() after the first apply()")
def keras_late_on_update(scene: Scene) -> None:
    import keras

    weights = variable(scene)
    made = optimizer()
    made.apply([keras.ops.ones([2])], [weights])
    with scene.misuse():
        made.on_update(print)


@misuse(KERAS, "`FollowCallback` without a DistributedOptimizer", "UsageError", "compiled with SGD, expected a hvd.")
def keras_follow_plain(scene: Scene) -> None:
    import keras

    import hvd_backup.keras as hvd

    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    net.compile(keras.optimizers.SGD(), loss="mse")
    with scene.misuse():
        net.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[hvd.callbacks.FollowCallback()])


@misuse(KERAS, "a variable of another shape on rank 1", "HvdBackupError", "differ in 'optimizer.…variable 0: w (3,)")
def keras_ranks_differ(scene: Scene) -> None:
    import keras

    weights = variable(scene, length=2 + odd())
    scene.weights = lambda: b""
    with scene.misuse():
        optimizer().apply([keras.ops.ones([2 + odd()])], [weights])


@misuse(TENSORFLOW, "a tensor of bools", "UsageError", "allreduce: dtype bool is not supported, only")
def tf_bool(scene: Scene) -> None:
    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    with scene.misuse():
        hvd.allreduce(tf.constant([True]))


@misuse(TENSORFLOW, "`broadcast(x, 7)` in a `tf.function`", "UsageError", "root_rank=7: expected 0 to 3")
def tf_root(scene: Scene) -> None:
    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    with scene.misuse():
        tf.function(lambda: hvd.broadcast(tf.ones([2]), 7))()


@misuse(
    TENSORFLOW, "a shape that a `tf.function` does not know", "UsageError", "say it with tf.ensure_shape(tensor, shape)"
)
def tf_unknown_shape(scene: Scene) -> None:
    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    function = tf.function(lambda x: hvd.allreduce(x), input_signature=[tf.TensorSpec([None], tf.float32)])
    with scene.misuse():
        function(tf.ones([2]))


@misuse(
    TENSORFLOW, "`tf.IndexedSlices` in `first_n_allreduce`", "UsageError", "make it dense with tf.convert_to_tensor"
)
def tf_slices(scene: Scene) -> None:
    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    with scene.misuse():
        hvd.first_n_allreduce(tf.IndexedSlices(tf.ones([1]), tf.constant([0]), tf.constant([2])), n=3)


@misuse(
    TENSORFLOW, "`DistributedGradientTape` of something that is no tape", "UsageError", "expected a tf.GradientTape"
)
def tf_no_tape(scene: Scene) -> None:
    import hvd_backup.tensorflow as hvd

    with scene.misuse():
        hvd.DistributedGradientTape(print)


@misuse(TENSORFLOW, "`DistributedGradientTape(tape, op=hvd.Max)`", "ConfigError", "expected hvd.Average or hvd.Sum")
def tf_tape_max(scene: Scene) -> None:
    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    with scene.misuse():
        hvd.DistributedGradientTape(tf.GradientTape(), op=4)


@misuse(
    TENSORFLOW,
    "a tensor of another shape on rank 1",
    "HvdBackupError",
    "differ in 'tensorflow.allreduce…:misuse': line 1: …'dtype float32 shape (3,)'",
)
def tf_ranks_differ(scene: Scene) -> None:
    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    with scene.misuse():
        hvd.allreduce(tf.ones([2 + odd()]), name="misuse")
