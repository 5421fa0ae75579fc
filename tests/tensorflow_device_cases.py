"""What the ranks of test_tensorflow_device.py do: gradients that TensorFlow hands over on a GPU, which is a double.

Variables are on the CPU, since nothing else of TensorFlow runs on the double (tensorflow_gpu_double.cpp), but count as
on it. One launch of ranks runs all cases but the last one. Each begins with init() and ends with shutdown().
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import load_library
from tensorflow.python.framework.kernels import get_registered_kernels_for_op

import hvd_backup.keras as hvd
import hvd_backup.tensorflow as hvd_tensorflow
from hvd_backup import data_plane, faults
from hvd_backup.errors import ConfigError
from hvd_backup.tensorflow import data_plane as tensorflow_data_plane
from hvd_backup.tensorflow import gpus
from tests.gpu_double import Gpu, init
from tests.keras_cases import digest, watched
from tests.rank_main import mark

STEPS = 25
GPU_OF, DEVICE_OF = tensorflow_data_plane.gpu_of, tensorflow_data_plane.device_of
ALL_SPOILED = 9  # the step in which every rank's gradient is NaN
SPOILED = {1: (3, 4), 2: (11,)}  # by rank, further ones

CASES: dict[str, Callable[[str], Any]] = {}
begun = 0


def case(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Registers a case, which is given a folder of all ranks."""
    CASES[function.__name__] = function
    return function


def run_cases(folder: str, plugin: str) -> dict[str, Any]:
    """All cases in order; results by name."""
    prepare(plugin)
    results = {}
    for name, run in CASES.items():
        started = time.monotonic()
        with tf.device("/CPU:0"):
            results[name] = run(folder)
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return results


def prepare(plugin: str) -> None:
    """Ranks share cores, so they use one thread; and one of the executor that is blocked would be noticed."""
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    load_library.load_pluggable_device_library(plugin)


def begin(folder: str, way: str) -> Gpu:
    """way: how gradients travel from now on."""
    os.environ["HVD_BACKUP_DATA_PLANE"] = "nccl" if way == "no group" else way
    os.environ["HVD_BACKUP_BUCKET_BYTES"] = "400"  # several buckets
    init(hvd, takes_gpu_memory=way == "mpi")
    gpu = put_in_place(folder)
    gpu.device.failing_exchange = 1 if way == "no group" else 0
    return gpu


def put_in_place(folder: str, why_no_groups: str = "") -> Gpu:
    global begun
    begun += 1
    own = Path(folder) / str(begun)  # each time it names its groups alike
    own.mkdir(exist_ok=True)
    gpu = Gpu(str(own), hvd.rank(), why_no_groups)
    tensorflow_data_plane.gpu_of = lambda device, config: (gpu, "")
    tensorflow_data_plane.device_of = lambda variable: "/GPU:0"
    return gpu


def end() -> None:
    faults.clear()
    gc.collect()
    hvd.shutdown()


def make_net() -> Any:
    """163 weights, the same at each call."""
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(3)])


def batch(step: int, spoiled: bool = False) -> tuple[Any, Any]:
    """Inputs and targets of this rank; spoiled: at times NaN."""
    random = np.random.default_rng(100 * step + hvd.rank())
    x = random.normal(size=(4, 6)).astype(np.float32)
    if spoiled and step in (ALL_SPOILED, *SPOILED.get(hvd.rank(), ())):
        x[:] = np.nan
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1], np.abs(x).max(1)], 1)


def make_step(net: Any, optimizer: Any, by_tape: bool = False) -> Any:
    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(net(x, training=True) - y))
        optimizer.metrics(rank=hvd.rank())
        if by_tape:
            tape = hvd_tensorflow.DistributedGradientTape(tape, optimizer=optimizer)
        gradients = tape.gradient(loss, net.trainable_variables)
        optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))

    return step


def train(
    gpu: Gpu, steps: int = STEPS, by_tape: bool = False, pause_s: float = 0.0, spoiled: bool = False, **options: Any
) -> dict[str, Any]:
    """Trains from the same weights on, and says what became of it."""
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **({"backup_workers": 1} | options))
    net = make_net()
    optimizer.build(net.trainable_variables)
    seen = watched(optimizer)
    step = make_step(net, optimizer, by_tape)
    for _ in hvd.follow(range(steps), optimizer):
        time.sleep(pause_s)
        step(*batch(optimizer.global_step, spoiled))
        if gpu.device.exchanges >= 10:
            mark("exchanged")
    net.optimizer = optimizer
    told = {"digest": digest(net), "step": optimizer.global_step, "counters": optimizer.counters(), "seen": seen}
    device = gpu.device
    told |= {"exchanges": device.exchanges, "copies": device.copies, "groups": device.groups}
    return {**told, "host_bytes": gpu.host_bytes}


# --- nobody is left out ---------------------------------------------------------------------------------------------


def in_each_way(folder: str, ways: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """By way; all ranks contribute to each update, or it is tried again: a machine may be too busy for one of them."""
    found = {}
    for way in ways:
        for _ in range(3):
            found[way] = train(begin(folder, way), grace=20.0, **options)
            end()
            if "spoiled" in options or all(len(ranks) == 3 for _, ranks, _ in found[way]["seen"]):
                break
    return found


@case
def all_contribute(folder: str) -> dict[str, Any]:
    return in_each_way(folder, ("host", "nccl", "no group"))


@case
def compressed(folder: str) -> dict[str, Any]:
    return in_each_way(folder, ("host", "mpi"), compression=hvd.Compression.fp16)


@case
def spoiled(folder: str) -> dict[str, Any]:
    """Without backup workers, so that only what is not finite is left out."""
    return in_each_way(folder, ("host", "nccl"), spoiled=True, nonfinite="drop", backup_workers=0)


# --- some are -------------------------------------------------------------------------------------------------------


def with_delays(folder: str, way: str, delays: str, by_tape: bool = False) -> dict[str, Any]:
    gpu = begin(folder, way)
    faults.inject(*faults.parse(delays))
    found = train(gpu, 2 * STEPS, by_tape=by_tape)
    end()
    return found


@case
def delayed(folder: str) -> dict[str, Any]:
    return with_delays(folder, "nccl", "rank=rotate:1,ms=25,p=0.6")


@case
def one_late(folder: str) -> dict[str, Any]:
    """The last rank, in each step."""
    return with_delays(folder, "mpi", "rank=2,ms=40", by_tape=True)


# --- handing over ---------------------------------------------------------------------------------------------------


@case
def handing_over(folder: str) -> dict[str, Any]:
    """While nothing moves on the GPU gradients are handed over, and let go; the last rank's make the update."""
    gpu = begin(folder, "nccl")
    weights = [tf.Variable(tf.zeros([1000])), tf.Variable(tf.zeros([5000]))]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), backup_workers=1, grace=20.0)
    optimizer.apply([tf.zeros([1000]), tf.zeros([5000])], weights)
    hvd.barrier()
    if hvd.rank() == hvd.size() - 1:
        time.sleep(2.0)
    gpu.device.hangs = True
    started = time.monotonic()
    optimizer._exchange._exchange.submit(
        tf.constant([1.0], tf.float64), [tf.fill([count], hvd.rank() + 1.0) for count in (1000, 5000)], None
    )
    seconds = time.monotonic() - started
    gpu.device.hangs = False
    # In memory that would be that of gradients and results, had they been given back.
    with tf.device("/GPU:0"):
        others = [tf.identity(tf.fill([count], 7.0)) for count in (1000, 5000) for _ in range(20)]
    optimizer._exchange.take_updates(True)
    found = {
        "seconds": seconds,
        "weights": [np.unique(weight.numpy()).tolist() for weight in weights],
        "others": np.unique(np.concatenate([each.numpy() for each in others])).tolist(),
        "seen": optimizer.last_update.contributors,
    }
    del optimizer
    end()
    return found


@case
def kernels(folder: str) -> dict[str, list[str]]:
    """By op: where it has a kernel, and which of its tensors are in host memory."""
    ops = ("HvdBackupSubmitOnDevice", "HvdBackupNextUpdateOnDevice")
    found = {op: get_registered_kernels_for_op(op).kernel for op in ops}
    return {
        op: [name for each in kernels for name in (each.device_type, *each.host_memory_arg)]
        for op, kernels in found.items()
    }


# --- which way ------------------------------------------------------------------------------------------------------


class Library:
    """See _gpu. GPU 3 is of a kind that it was not compiled for."""

    class Device:
        why_no_groups = ""
        nccl_version = "2.28.0"

        def __init__(self, number: int, nccl_library: str) -> None:
            self.number = number

    @staticmethod
    def try_on(number: int) -> None:
        if number == 3:
            raise RuntimeError("CUDA: no kernel image")


def on(device: str) -> Any:
    """A variable of Keras."""
    return SimpleNamespace(value=SimpleNamespace(device=f"/job:localhost/replica:0/task:0/device:{device}"))


@contextmanager
def machine(library: Any) -> Iterator[None]:
    """Of its GPUs TensorFlow sees two, and takes the first for two."""
    visible = [SimpleNamespace(name=f"/physical_device:GPU:{number}") for number in (1, 3)]
    with (
        mock.patch.object(tensorflow_data_plane, "gpu_of", GPU_OF),
        mock.patch.object(tensorflow_data_plane, "device_of", DEVICE_OF),
        mock.patch.object(data_plane, "library", lambda: library),
        mock.patch.object(tf.config, "get_visible_devices", lambda kind: visible),
        mock.patch.object(
            tf.config, "get_logical_device_configuration", lambda gpu: [1, 2] if gpu is visible[0] else None
        ),
    ):
        yield


@case
def chosen(folder: str) -> dict[str, Any]:
    """By plane, variables and library: which GPU is used, or why none is."""
    found: dict[str, Any] = {}
    for plane, devices, library in (
        ("auto", ["CPU:0"], Library),
        ("nccl", ["CPU:0"], Library),
        ("mpi", ["GPU:0", "GPU:1"], Library),
        ("mpi", ["GPU:0"], None),
        ("auto", ["GPU:0"], None),
        ("nccl", ["GPU:2"], Library),
        ("host", ["GPU:1"], Library),
        ("nccl", ["GPU:1"], Library),
    ):
        engine = SimpleNamespace(takes_device_memory=False, device=None)
        engine.use_device = lambda gpu, *_, engine=engine, **__: setattr(engine, "device", gpu)
        config = SimpleNamespace(data_plane=plane, nccl_library="", journal="host")
        place: Any = SimpleNamespace(size=2, rank=1, engine=engine, config=config)
        policy: Any = SimpleNamespace(may_leave_out=True, scope="step", nonfinite="pass")
        with machine(library):
            try:
                used = tensorflow_data_plane.engage(place, policy, [on(device) for device in devices])
                told = engine.device.number if used else "none"
            except ConfigError as error:
                told = str(error)
        found[f"{plane} {' '.join(devices)}{'' if library else ' without the library'}"] = told
    with machine(Library):
        found["told"] = gpus.facts()
    found["here"] = [DEVICE_OF(each) for each in (tf.Variable(1.0), keras.Variable(1.0))]
    return found


@case
def refused(folder: str) -> str:
    """What apply() says."""
    begin(folder, "nccl")
    gpu = put_in_place(folder, "NCCL cannot be loaded")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), backup_workers=1)
    told = ""
    try:
        optimizer.apply([tf.ones([2])], [keras.Variable([1.0, 2.0])])
    except ConfigError as error:
        told = str(error)
    del optimizer
    end()
    assert gpu.host_bytes == 0
    return told


# --- in a launch of its own -----------------------------------------------------------------------------------------


def train_while_one_stops(folder: str, plugin: str, steps: int) -> dict[str, Any]:
    prepare(plugin)
    with tf.device("/CPU:0"):
        return train(begin(folder, "nccl"), steps, pause_s=0.005 + 0.005 * hvd.rank())  # the other need not be late
