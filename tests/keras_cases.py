"""What the ranks of test_keras.py do, on both of Keras's backends.

A backend takes long to start, so one launch of ranks for each runs all cases, and those of keras_tensorflow_cases.py
and tensorflow_cases.py, or of keras_torch_cases.py. Each case is a function that returns what the test looks at; an
exception is returned as its text.
"""

import gc
import hashlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ.get("KERAS_BACKEND") == "torch":
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # as in an environment without TensorFlow

import keras
import numpy as np

import hvd_backup.keras as hvd
from hvd_backup import context, faults, training

BATCH = 4  # samples of each rank in a step
STEPS = 20  # of an epoch
BACKEND = keras.backend.backend()

CASES: dict[str, Callable[[], Any]] = {}


def run_cases(folder: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """All cases (or those that are named) in order; results by name, each with the seconds that it took."""
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")
    if BACKEND == "tensorflow":
        from tests import keras_tensorflow_cases as own
    else:
        from tests import keras_torch_cases as own  # type: ignore[no-redef]
    own.use_one_thread()
    os.chdir(folder)
    hvd.init()
    results = {}
    for name, case in {**CASES, **own.CASES, **LAST}.items():
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
    """Registers a case."""
    CASES[function.__name__] = function
    return function


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [STEPS * ranks * BATCH, 6] and targets [..., 3], the same on all ranks."""
    random = np.random.default_rng(5)
    x = random.normal(size=(STEPS * hvd.size() * BATCH, 6)).astype(np.float32)
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1], np.abs(x).max(1)], 1).astype(np.float32)


def shard(batches: int = STEPS, spoiled: tuple[int, ...] = ()) -> Any:
    """This rank's first batches: together with those of the others, step by step, the batches of `data`.

    spoiled: batches whose inputs are NaN.
    """
    x, y = (each.reshape(STEPS, hvd.size(), BATCH, -1)[:batches, hvd.rank()] for each in data())
    x[list(spoiled)] = np.nan
    pairs = (np.ascontiguousarray(each).reshape(-1, each.shape[-1]) for each in (x, y))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(tuple(pairs)).batch(BATCH)
    import torch

    tensors = torch.utils.data.TensorDataset(*(torch.from_numpy(each) for each in pairs))
    return torch.utils.data.DataLoader(tensors, BATCH)


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
        sha.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return sha.hexdigest()


# --- without backup workers: the same as one process --------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.05, clipnorm=0.2),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.2),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=7),
    "accumulation": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
}


@case
def as_one_process() -> dict[str, float]:
    """By optimizer, the largest difference between the weights of four ranks and of one process.

    Each rank is that process for some optimizers.
    """
    x, y = data()
    together = {}
    for name, make in OPTIMIZERS.items():
        together[name] = model(hvd.DistributedOptimizer(make()))
        together[name].fit(shard(), epochs=1, verbose=0)
    differences = {}
    for name in list(OPTIMIZERS)[hvd.rank() :: hvd.size()]:
        alone = model(OPTIMIZERS[name]())
        alone.fit(x, y, batch_size=BATCH * hvd.size(), epochs=1, shuffle=False, verbose=0)
        pairs = zip(together[name].variables, alone.variables, strict=True)
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
    return account(trained, before)


class AwayForLong(keras.callbacks.Callback):
    """The last rank sleeps, first beyond the end of its epoch, then within one; notes the statistics of BatchNorm.

    Attributes:
        seen: bits of the statistics after each batch.
        taken_over: those after each batch in which this rank took over another one's state.
        told: for how many updates, by `last_update` and by `counters()`, where the former says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.taken_over: list[str] = []
        self.told: list[tuple[int, int]] = []
        self._naps = {(0, 4): 1.5, (2, 3): 0.3}  # by epoch and batch: seconds
        self._resynced = 0
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        nap = self._naps.get((self._epoch, batch), 0.0) if hvd.rank() == hvd.size() - 1 else 0.0
        time.sleep(nap or 0.01)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        statistics = [keras.ops.convert_to_numpy(each) for each in self.model.non_trainable_weights]
        self.seen.append(
            hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in statistics)).hexdigest()
        )
        resynced = self.model.optimizer.counters()["resynced"]
        if resynced > self._resynced:
            self.taken_over.append(self.seen[-1])
        if told := self.model.optimizer.last_update.resynced:
            self.told.append((told, resynced - self._resynced))
        self._resynced = resynced


@case
def beyond_the_journal() -> dict[str, Any]:
    """A rank that is away for more updates than are kept takes over another one's weights, statistics and optimizer."""
    keras.utils.set_random_seed(3)
    layers = [keras.Input((6,)), keras.layers.Dense(16), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    trained = keras.Sequential(layers)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9)), backup_workers=1, max_lag=2
    )
    trained.compile(optimizer=optimizer, loss="mse")
    away = AwayForLong()
    followed = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.FollowCallback()]
    trained.fit(shard(), epochs=3, verbose=0, callbacks=[*followed, hvd.callbacks.MetricAverageCallback(), away])
    sha = hashlib.sha256()
    for variable in [*trained.trainable_variables, *optimizer.variables]:
        sha.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return {
        "digest": sha.hexdigest(),
        "step": optimizer.global_step,
        "counters": optimizer.counters(),
        "seen": away.seen,
        "taken_over": away.taken_over,
        "told": away.told,
    }


def watched(optimizer: Any) -> list[Any]:
    """Of each update that the optimizer will apply: its step, its contributors, the mean of their metric `rank`."""
    seen: list[Any] = []
    optimizer.on_update(lambda update: seen.append((update.step, update.contributors, update.metrics["rank"])))
    return seen


def account(trained: Any, before: str) -> dict[str, Any]:
    """What the optimizer says of its updates; before: the digest before training."""
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
def delayed_adam() -> dict[str, Any]:
    return train_with_delays(OPTIMIZERS["adam"]())


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
def a_rank_that_is_always_slow() -> dict[str, Any]:
    """An epoch with one rank 200 ms late in each step."""
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["momentum"](), backup_workers=1))
    follow = hvd.callbacks.FollowCallback()
    faults.inject(*faults.parse("rank=3,ms=0.001"))  # so that the graph that is traced now has the delays of later
    trained.fit(shard(), verbose=0, callbacks=[follow])
    faults.inject(*faults.parse("rank=3,ms=200"))
    before = trained.optimizer.counters()["caught_up"]
    trained.fit(shard(), verbose=0, callbacks=[follow])
    return {
        "missed": trained.optimizer.counters()["caught_up"] - before,
        "digest": digest(trained),
        "step": trained.optimizer.global_step,
    }


ALL_SPOILED = 9  # the step in which every rank's gradient is NaN
SPOILED = {1: (3, 4, STEPS - 1), 2: (11,)}  # by rank, further ones


@case
def spoiled_gradients() -> dict[str, Any]:
    """nonfinite="drop", without backup workers."""
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["momentum"](), nonfinite="drop"))
    before = digest(trained)
    trained.fit(
        shard(spoiled=(ALL_SPOILED, *SPOILED.get(hvd.rank(), ()))),
        epochs=1,
        verbose=0,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.FollowCallback()],
    )
    finite = all(bool(np.isfinite(keras.ops.convert_to_numpy(each)).all()) for each in trained.variables)
    return {**account(trained, before), "finite": finite}


@case
def delayed_in_train_on_batch() -> dict[str, Any]:
    """A loop of one's own without follow: ranks that are late have steps left, which change nothing."""
    faults.inject(*faults.parse("rank=rotate:1,ms=12,p=0.6"))
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["adam"](), backup_workers=1))
    before = digest(trained)
    for x, y in shard():
        trained.train_on_batch(x, y)
    hvd.barrier()
    return account(trained, before)


@case
def uneven_data() -> dict[str, Any]:
    """Rank r has 3 r batches less: all end at the longest, with equal weights."""
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["adam"](), backup_workers=1))
    mine = shard(STEPS - 3 * hvd.rank())
    trained.fit(mine, epochs=2, verbose=0, callbacks=[hvd.callbacks.FollowCallback()])
    return {"digest": digest(trained), "step": trained.optimizer.global_step}


@case
def uneven_data_without_callbacks() -> dict[str, Any]:
    """Rank 0 has half of the batches. Weights are looked at without any collective in between."""
    training._warned_about_leftovers = False  # by a case before
    trained = model(hvd.DistributedOptimizer(OPTIMIZERS["adam"](), backup_workers=1))
    faults.inject(*faults.parse("rank=1-3,ms=30"))
    trained.fit(shard(1), verbose=0)  # tracing takes ranks unequally long
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained.fit(shard(STEPS // 2 if hvd.rank() == 0 else STEPS), verbose=0)
    said = [str(each.message) for each in told if "rank " in str(each.message)]
    return {"digest": digest(trained), "step": trained.optimizer.global_step, "said": said}


@case
def fit_that_raises() -> dict[str, Any]:
    """Rank 2 fails in the middle of an epoch, in a callback or in its data; then all go on together."""

    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if hvd.rank() == 2 and batch == 2:
                raise ValueError("on purpose")

    def broken_data() -> Any:
        for number, batch in enumerate(shard()):
            if hvd.rank() == 2 and number == 3:
                raise ValueError("on purpose")
            yield tuple(batch)

    faults.inject(*faults.parse("rank=*,ms=5"))  # so that rank 2 gets as far as that
    found: dict[str, Any] = {}
    for where, workers in (("callback", 0), ("callback", 1), ("data", 0), ("data", 1)):
        trained = model(hvd.DistributedOptimizer(OPTIMIZERS["momentum"](), backup_workers=workers))
        follow = [hvd.callbacks.FollowCallback()]
        data = broken_data() if where == "data" else shard()
        told = ""
        try:
            trained.fit(
                data, steps_per_epoch=STEPS, verbose=0, callbacks=follow + ([Fails()] if where == "callback" else [])
            )
        except Exception as error:
            told = str(error)
            in_handler = hvd.allgather_object("met")  # while the traceback holds the frames of fit()
        else:
            in_handler = hvd.allgather_object("met")
        first = trained.optimizer.global_step
        trained.fit(shard(), verbose=0, callbacks=follow)
        found[f"{where} {workers}"] = {
            "told": told,
            "met": in_handler,
            "steps": (first, trained.optimizer.global_step),
            "digest": digest(trained),
        }
    return found


# --- callbacks, files, other frameworks ----------------------------------------------------------------------------


@case
def callbacks_of_horovod() -> dict[str, Any]:
    trained = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.4, momentum=0.9)))
    trained.layers[0].kernel.assign(trained.layers[0].kernel + float(hvd.rank()))
    best = hvd.callbacks.BestModelCheckpoint("best.keras", monitor="loss")
    history = trained.fit(
        shard(),
        epochs=3,
        verbose=0,
        validation_data=shard(2),
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
    """A Keras optimizer and one of PyTorch's own train in turns in one process, on one engine."""
    import torch

    import hvd_backup.torch as hvd_torch
    from tests import torch_training

    engine = context.current().engine
    hvd_torch.init()
    net = torch_training.make_model()
    other = hvd_torch.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters())
    trained = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.05)))
    for step, (x, y) in enumerate(shard(5)):
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
def loss_scale_outside() -> None:
    keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(keras.optimizers.SGD()))


@case
def wrapped_twice() -> None:
    hvd.DistributedOptimizer(hvd.DistributedOptimizer(keras.optimizers.SGD()))


@case
def no_optimizer() -> None:
    hvd.DistributedOptimizer("adam")


@case
def other_variables_than_before() -> None:
    a, b = keras.Variable([1.0, 2.0], name="a"), keras.Variable([3.0], name="b")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([a, b])
    optimizer.apply([keras.ops.ones([2]), keras.ops.ones([1])], [a, b])
    optimizer.apply([keras.ops.ones([2])], [a])


@case
def variables_that_differ_in_fit() -> None:
    trained = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4 if hvd.rank() == 2 else 3)])
    trained.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD()), loss=lambda y, x: keras.ops.mean(x))
    trained.fit(shard(), verbose=0)


@case
def variables_that_differ_between_ranks() -> None:
    length = 3 if hvd.rank() == 2 else 2
    variable = keras.Variable(np.ones(length, np.float32), name="w")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.apply([keras.ops.ones([length])], [variable])


def after_shutdown() -> list[str]:
    """What is said to a fit() that went well before, to another one, and to the callbacks."""
    trained = model(hvd.DistributedOptimizer(keras.optimizers.SGD()))
    trained.fit(shard(2), verbose=0)
    hvd.shutdown()
    told = []
    for call in (
        lambda: trained.fit(shard(2), verbose=0),
        lambda: trained.fit(shard(2), verbose=0, callbacks=[hvd.callbacks.FollowCallback()]),
        lambda: model("sgd").fit(shard(2), verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()]),
        lambda: hvd.DistributedOptimizer(keras.optimizers.SGD()),
    ):
        try:
            call()
        except hvd.UsageError as error:
            told.append(str(error))
    return told


LAST = {"after_shutdown": after_shutdown}
