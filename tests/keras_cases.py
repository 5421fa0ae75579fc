"""What the ranks of test_keras.py do. TensorFlow takes long to start, so one launch of ranks runs all cases, those of
tensorflow_cases.py, too.

Each case is a function of this module that returns what the test looks at; an exception is returned as its text.
"""

import gc
import hashlib
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import hvd_backup.keras as hvd
from hvd_backup import context, faults
from tests import tensorflow_cases, torch_training

BATCH = 4  # samples of each rank in a step
STEPS = 20  # of an epoch

CASES: dict[str, Callable[[], Any]] = {}


def run_cases(folder: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """All cases (or those that are named) in order; results by name, each with the seconds that it took."""
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")
    tf.config.threading.set_inter_op_parallelism_threads(1)  # so a blocked thread of the executor would be noticed
    tf.config.threading.set_intra_op_parallelism_threads(1)
    os.chdir(folder)
    hvd.init()
    results = {}
    for name, case in {**CASES, **tensorflow_cases.CASES}.items():
        if names and name not in names:
            continue
        started = time.monotonic()
        hvd.barrier()
        try:
            results[name] = case()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            if "UsageError" not in results[name] and "HvdBackupError" not in results[name]:
                traceback.print_exc()
        faults.clear()
        gc.collect()  # models are cycles; their channels close now, in the same place on all ranks
        keras.config.set_dtype_policy("float32")
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return results


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [STEPS * ranks * BATCH, 6] and targets [..., 3], the same on all ranks."""
    random = np.random.default_rng(5)
    x = random.normal(size=(STEPS * hvd.size() * BATCH, 6)).astype(np.float32)
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1], np.abs(x).max(1)], 1).astype(np.float32)


def shard() -> tf.data.Dataset:
    """This rank's batches: together with those of the others, step by step, the batches of `data`."""
    return tf.data.Dataset.from_tensor_slices(data()).batch(BATCH).shard(hvd.size(), hvd.rank())


def model(optimizer: Any, **options: Any) -> Any:
    """Two layers with 163 weights, the same at each call, compiled."""
    keras.utils.set_random_seed(3)
    layers = [keras.Input((6,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(3)]
    made = keras.Sequential(layers)
    made.compile(optimizer=optimizer, loss="mse", **options)
    return made


def digest(trained: Any) -> str:
    """SHA-256 of the weights and the optimizer's variables, bit for bit."""
    sha = hashlib.sha256()
    for variable in [*trained.variables, *trained.optimizer.variables]:
        sha.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return sha.hexdigest()


# --- without backup workers: the same as one process --------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.2),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=7),
    "accumulation": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
}


@case
def as_one_process() -> dict[str, float]:
    """On rank 0, by optimizer, the largest difference between the weights of four ranks and of one process."""
    x, y = data()
    differences = {}
    for name, make in OPTIMIZERS.items():
        together = model(hvd.DistributedOptimizer(make()))
        together.fit(shard(), epochs=1, verbose=0)
        if hvd.rank() > 0:
            continue
        alone = model(make())
        alone.fit(x, y, batch_size=BATCH * hvd.size(), epochs=1, shuffle=False, verbose=0)
        pairs = zip(together.variables, alone.variables, strict=True)
        differences[name] = max(float(np.abs(a.numpy() - b.numpy()).max()) for a, b in pairs)
    return differences


# --- with backup workers: one history ------------------------------------------------------------------------------


def train_with_delays(optimizer: Any, epochs: int = 2, callbacks: Any = None, **options: Any) -> dict[str, Any]:
    """Trains under rotating delays."""
    faults.inject(*faults.parse("rank=rotate:1,ms=12,p=0.6"))
    trained = model(hvd.DistributedOptimizer(optimizer, backup_workers=1), **options)
    before = digest(trained)
    followed = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.FollowCallback()]
    trained.fit(shard(), epochs=epochs, verbose=0, callbacks=followed if callbacks is None else callbacks)
    return {
        "digest": digest(trained),
        "trained": digest(trained) != before,
        "step": trained.optimizer.global_step,
        "counters": trained.optimizer.counters(),
        "contributors": trained.optimizer.last_update.contributors,
        "rate": float(trained.optimizer.learning_rate),
    }


@case
def delayed_momentum() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["momentum"]())


@case
def delayed_adam_several_steps_in_one_call() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["adam"](), steps_per_execution=3)


@case
def delayed_ema() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["ema"]())


@case
def delayed_accumulation() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["accumulation"]())


@case
def delayed_schedule() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["schedule"]())


@case
def delayed_eagerly() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["momentum"](), epochs=1, run_eagerly=True)


@case
def delayed_mixed_precision() -> dict[str, Any]:
    keras.config.set_dtype_policy("mixed_float16")
    return train_with_delays(keras.optimizers.Adam(0.01))


@case
def delayed_without_callbacks() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["adam"](), callbacks=[])


@case
def delayed_with_a_rate_that_is_set_in_every_step() -> dict[str, Any]:
    """Each rank sets another rate; an update is applied with the rate of one contributor, on all ranks."""

    class Own(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.model.optimizer.learning_rate = 0.01 * (1 + hvd.rank()) / (1 + batch)

    return train_with_delays(OPTIMIZERS["momentum"](), callbacks=[hvd.callbacks.FollowCallback(), Own()])


@case
def a_rank_that_is_always_slow() -> dict[str, float]:
    """Seconds of fit with one rank 100 ms late in each step."""
    faults.inject(*faults.parse("rank=3,ms=100"))
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["momentum"](), backup_workers=1))
    follow = hvd.callbacks.FollowCallback()
    started = time.monotonic()
    trained.fit(shard(), epochs=2, verbose=0, callbacks=[follow])
    return {"seconds": time.monotonic() - started, "digest": digest(trained), "step": trained.optimizer.global_step}


# --- loops of one's own --------------------------------------------------------------------------------------------


def own_loop(decorate: Callable[[Any], Any], sparse: bool = False) -> dict[str, Any]:
    """A loop over follow() with a GradientTape."""
    faults.inject(*faults.parse("rank=rotate:1,ms=12,p=0.6"))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), backup_workers=1, sparse_as_dense=sparse)
    keras.utils.set_random_seed(3)
    first = keras.layers.Embedding(10, 6) if sparse else keras.layers.Dense(6)
    net = keras.Sequential([keras.Input((6,)), first, keras.layers.Flatten(), keras.layers.Dense(3)])
    optimizer.build(net.trainable_variables)

    @decorate
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            inputs = tf.cast(tf.clip_by_value(tf.abs(x) * 3, 0, 9), tf.int32) if sparse else x
            loss = tf.reduce_mean(tf.square(net(inputs, training=True) - y))
        gradients = tape.gradient(loss, net.trainable_variables)
        optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
        return loss

    computed = 0
    for _ in range(2):
        for x, y in hvd.follow(shard(), optimizer):
            step(x, y)
            computed += 1
    net.optimizer = optimizer
    return {"digest": digest(net), "step": optimizer.global_step, "computed": computed}


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
def uneven_data() -> dict[str, Any]:
    """Rank r has 3 r batches less: all end at the longest, with equal weights."""
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["adam"](), backup_workers=1))
    mine = shard().take(STEPS - 3 * hvd.rank())
    trained.fit(mine, epochs=2, verbose=0, callbacks=[hvd.callbacks.FollowCallback()])
    return {"digest": digest(trained), "step": trained.optimizer.global_step}


# --- callbacks, files, other frameworks ----------------------------------------------------------------------------


@case
def callbacks_of_horovod() -> dict[str, Any]:
    trained = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.4, momentum=0.9)))
    trained.layers[0].kernel.assign(trained.layers[0].kernel + hvd.rank())
    best = hvd.callbacks.BestModelCheckpoint("best.keras", monitor="loss")
    history = trained.fit(
        shard(),
        epochs=3,
        verbose=0,
        validation_data=shard().take(2),
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.FollowCallback(),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2),
            hvd.callbacks.LearningRateScheduleCallback(0.4, 0.5, start_epoch=2),
            best,
        ],
    ).history
    hvd.barrier()
    return {"digest": digest(trained), "history": history, "saved": Path("best.keras").exists()}


@case
def saved_and_loaded() -> dict[str, Any]:
    trained = model(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), backup_workers=1))
    trained.fit(shard(), epochs=1, verbose=0, callbacks=[hvd.callbacks.FollowCallback()])
    before = digest(trained)
    if hvd.rank() == 0:
        trained.save("saved.keras")
    hvd.barrier()
    plain = keras.models.load_model("saved.keras")
    loaded = hvd.load_model("saved.keras", backup_workers=1)
    equal = digest(loaded) == before == digest(plain)
    kinds = (
        type(plain.optimizer).__name__,
        hasattr(plain.optimizer, "training"),
        hasattr(loaded.optimizer, "training"),
    )
    loaded.fit(shard(), epochs=1, verbose=0, callbacks=[hvd.callbacks.FollowCallback()])
    return {"equal": equal, "kinds": kinds, "digest": digest(loaded), "step": loaded.optimizer.global_step}


@case
def beside_pytorch() -> dict[str, Any]:
    """Both frameworks train in turns in one process, on one engine."""
    import torch

    import hvd_backup.torch as hvd_torch

    engine = context.current().engine
    hvd_torch.init()
    net = torch_training.make_model()
    other = hvd_torch.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters())
    trained = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.05)))
    for step, (x, y) in enumerate(shard().take(5)):
        trained.train_on_batch(x, y)
        other.zero_grad()
        torch_training.loss_of(net, torch_training.batch(hvd.rank(), step)).backward()
        other.step()
    return {
        "one": context.current().engine is engine,
        "digest": digest(trained) + torch_training.digest(net),
        "steps": (trained.optimizer.global_step, other.global_step),
    }


# --- errors --------------------------------------------------------------------------------------------------------


@case
def jit_compile() -> None:
    model(hvd.DistributedOptimizer(keras.optimizers.SGD()), jit_compile=True).fit(shard(), verbose=0)


@case
def loss_scale_outside() -> None:
    keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(keras.optimizers.SGD()))


@case
def sparse_gradient() -> None:
    table = keras.layers.Embedding(10, 3)
    net = keras.Sequential([keras.Input((2,), dtype="int32"), table, keras.layers.Flatten(), keras.layers.Dense(1)])
    net.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD()), loss="mse")
    net.fit(np.zeros((8, 2), np.int32), np.zeros((8, 1), np.float32), verbose=0)


@case
def other_variables_than_before() -> None:
    a, b = tf.Variable([1.0, 2.0], name="a"), tf.Variable([3.0], name="b")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([a, b])
    optimizer.apply([tf.ones([2]), tf.ones([1])], [a, b])
    optimizer.apply([tf.ones([2])], [a])


@case
def wrapped_twice() -> None:
    hvd.DistributedOptimizer(hvd.DistributedOptimizer(keras.optimizers.SGD()))


@case
def no_optimizer() -> None:
    hvd.DistributedOptimizer("adam")


@case
def variables_that_differ_between_ranks() -> None:
    """Last: the channel is of no use any more on any rank."""
    variable = tf.Variable(tf.ones([3 if hvd.rank() == 2 else 2]), name="w")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.apply([tf.ones_like(variable)], [variable])
