"""What the ranks of test_tensorflow.py do, in the same launch of ranks as the cases of keras_cases.py."""

import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.kernels import get_registered_kernels_for_op

import hvd_backup.tensorflow as hvd
from hvd_backup import faults

CASES: dict[str, Callable[[], Any]] = {}
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


@case
def sums() -> dict[str, Any]:
    """Rank r gives 2^r, so a sum names its contributors. By dtype and mode: whether results fit contributors."""
    fits = {}
    for dtype in DTYPES:
        mine = tf.cast(tf.fill([2, 3], 2 ** hvd.rank()), dtype)

        def collectives(mine: Any = mine, dtype: str = dtype) -> Any:
            one = hvd.first_n_allreduce(mine, n=3, op=hvd.Sum, name=f"one.{dtype}")
            several = hvd.first_n_allreduce([mine, mine[0] * 2], n=4, op=hvd.Sum)
            mean = hvd.first_n_allreduce(mine, n=4)
            return one, several, mean

        for mode, function in (("eager", collectives), ("graph", tf.function(collectives))):
            one, several, mean = function()
            ranks = one.contributors.numpy().tolist()
            fits[f"{dtype} {mode}"] = (
                len(ranks) >= 3
                and np.all(one.result.numpy() == sum(2**rank for rank in ranks))
                and one.result.dtype == mine.dtype
                and np.all(several.result[0].numpy() == 15)
                and np.all(several.result[1].numpy() == 30)
                and several.result[1].shape == (3,)
                and np.all(mean.result.numpy() == (3 if mine.dtype.is_integer else 3.75))
            )
    return fits


@case
def ops_on_a_gpu() -> dict[str, list[str]]:
    """By op: which of its tensors its kernel for a GPU has in host memory."""
    ops = ("HvdBackupSubmit", "HvdBackupNextUpdate", "HvdBackupFirstN")
    kernels = {op: get_registered_kernels_for_op(op).kernel for op in ops}
    return {
        op: [name for kernel in found if kernel.device_type == "GPU" for name in kernel.host_memory_arg]
        for op, found in kernels.items()
    }


@case
def waiting_blocks_no_thread() -> dict[str, Any]:
    """The executor has one thread. While rank 0 waits for the others, that thread goes on with other ops."""

    @tf.function
    def both(x: Any) -> Any:
        other = x
        for _ in range(100):  # so the collective is under way before these have ended
            other = tf.tanh(other)
        moment = tf.numpy_function(lambda _: time.monotonic(), [other], tf.float64, stateful=False)
        return hvd.allreduce(x, name="wait"), moment

    both(tf.ones([4]))
    hvd.barrier()
    if hvd.rank() > 0:
        time.sleep(1.0)
    mean, moment = both(tf.fill([4], float(hvd.rank())))
    return {"mean": float(mean[0]), "ahead_s": time.monotonic() - float(moment)}


@case
def gradients() -> dict[str, Any]:
    """Of mean((rank + 1) * x): the mean over ranks of the upstream gradients, (rank + 1) = 2.5 everywhere."""
    x = tf.Variable([1.0, 2.0])
    found = {}
    for name, function in (
        ("allreduce", lambda: hvd.allreduce(x)),
        ("first_n", lambda: hvd.first_n_allreduce(x, n=hvd.size()).result),
        ("broadcast", lambda: hvd.broadcast(x, 1)),
        ("allgather", lambda: hvd.allgather(x)),
    ):

        def differentiate(function: Any = function) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(function()) * (hvd.rank() + 1.0)
            return tf.convert_to_tensor(tape.gradient(loss, x))

        found[name] = differentiate().numpy().tolist()
        found[f"{name} in a function"] = tf.function(differentiate)().numpy().tolist()
    return found


@case
def tape() -> dict[str, Any]:
    """A loop of one's own with a plain optimizer, with delays: weights are equal, dropped or not."""
    faults.clear()
    random = np.random.default_rng(hvd.rank())
    weights = tf.Variable(tf.ones([5, 2]))

    @tf.function
    def step(x: Any, workers: int) -> None:
        with tf.GradientTape() as plain:
            loss = tf.reduce_mean(tf.square(tf.matmul(x, weights) - 1.0))
        distributed = hvd.DistributedGradientTape(plain, backup_workers=workers)
        (gradient,) = distributed.gradient(loss, [weights])
        weights.assign_sub(0.1 * gradient)

    for number in range(30):
        if (number + hvd.rank()) % 4 == 0:
            time.sleep(0.01)
        step(tf.constant(random.normal(size=(4, 5)), tf.float32), 1)
    late = weights.numpy().tobytes()
    step(tf.fill([4, 5], float(hvd.rank())), 0)
    return {"late": late, "together": weights.numpy().tobytes(), "finite": bool(np.isfinite(weights.numpy()).all())}


@case
def tape_of_a_slow_rank() -> dict[str, Any]:
    """Rank 3 is late in every call: the others do not wait for it, and it is told what would be better."""
    weights = tf.Variable(tf.ones([5, 2]))

    @tf.function
    def step() -> None:
        with tf.GradientTape() as plain:
            loss = tf.reduce_sum(tf.square(weights))
        (gradient,) = hvd.DistributedGradientTape(plain, backup_workers=1).gradient(loss, [weights])
        weights.assign_sub(0.01 * gradient)

    step()
    hvd.barrier()
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(60):
            if hvd.rank() == 3:
                time.sleep(0.05)
            step()
    seconds = time.monotonic() - started
    hvd.barrier()
    said = [str(each.message) for each in told if "DistributedGradientTape" in str(each.message)]
    return {"seconds": seconds, "said": said, "weights": weights.numpy().tobytes()}


@case
def variables_are_broadcast() -> list[float]:
    one, two = tf.Variable(tf.fill([3], float(hvd.rank()))), tf.Variable(hvd.rank())
    hvd.broadcast_variables([one, two], root_rank=2)
    gathered = hvd.allgather(tf.fill([hvd.rank()], hvd.rank()))
    return [*one.numpy().tolist(), float(two), float(tf.reduce_sum(gathered)), hvd.broadcast_object(hvd.rank(), 3)]


@case
def facts_in_graphs() -> list[int]:
    @tf.function
    def facts() -> Any:
        return tf.stack([hvd.size_op(), hvd.rank_op(), hvd.local_size_op(), hvd.local_rank_op()])

    variable = tf.Variable(hvd.rank())
    tf.function(lambda: hvd.broadcast_([variable], 3))()
    return [*facts().numpy().tolist(), int(variable), hvd.broadcast_object_fn(1)(hvd.rank())]


@case
def horovods_names() -> str:
    try:
        return str(hvd.alltoall)
    except AttributeError as error:
        return str(error)


@case
def sparse() -> None:
    hvd.allreduce(tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([4, 2])))


@case
def sparse_as_dense() -> list[list[float]]:
    slices = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([hvd.rank() % 2]), tf.constant([2, 2]))
    rows: list[list[float]] = hvd.first_n_allreduce(slices, n=4, sparse_as_dense=True).result.numpy().tolist()
    return rows


@case
def unknown_shape() -> None:
    function = tf.function(hvd.allreduce, input_signature=[tf.TensorSpec([None], tf.float32)])
    function(tf.ones([3]))


@case
def jit_compiled_function() -> None:
    tf.function(hvd.allreduce, jit_compile=True)(tf.ones([3]))


@case
def a_dtype_that_is_not_there() -> None:
    hvd.allreduce(tf.constant([True]))


@case
def shapes_that_differ_between_ranks() -> None:
    hvd.allreduce(tf.ones([2 + hvd.rank() % 2]), name="differs")


@case
def wrong_root_in_a_function() -> None:
    tf.function(lambda: hvd.broadcast(tf.ones([2]), 7))()


@case
def another_shape_than_traced() -> dict[str, Any]:
    """What the op itself refuses, out of a function: the package's own error, and TensorFlow's."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def function(tensor: Any) -> Any:
        claimed = tf.compat.v1.placeholder_with_default(tensor, [None])
        claimed.set_shape([3])  # a promise that is broken
        return hvd.allreduce(claimed, name="promise")

    try:
        function(tf.ones([4]))
    except hvd.UsageError as error:
        return {"text": str(error), "theirs": isinstance(error, tf.errors.InvalidArgumentError)}
    return {}


@case
def before_init() -> str:
    code = """
import keras, tensorflow as tf
version, tf.__version__ = tf.__version__, "0.99.0"
try:
    import hvd_backup.keras
except ImportError as error:
    print(error)
tf.__version__ = version
import hvd_backup.keras, hvd_backup.tensorflow as hvd

def fit(callbacks):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    model.fit(tf.ones([1, 2]), tf.ones([1, 1]), verbose=0, callbacks=callbacks)

for call in (
    lambda: hvd.allreduce([2.0]),
    lambda: hvd.DistributedGradientTape(tf.GradientTape()),
    lambda: hvd_backup.keras.DistributedOptimizer(keras.optimizers.SGD()),
    tf.function(lambda: hvd.allreduce([2.0])),
    tf.function(hvd.size_op),
    lambda: fit([hvd_backup.keras.callbacks.MetricAverageCallback()]),
):
    try:
        call()
    except hvd.UsageError as error:
        print(error)
"""
    if hvd.rank() > 0:
        return ""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout
