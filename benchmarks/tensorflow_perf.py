"""TensorFlow: the allreduce op and a training step, beside Horovod's, and a step of fit with a rank that is late.

    python benchmarks/tensorflow_perf.py [--ranks 4] [--json FILE]

Definition. Ops: a block is a tf.function with a number of allreduces, one after the other; its time is that of the
slowest rank, the time of an op is that of the block divided by the ops. Results are verified in every block. Horovod's
op is measured in the same rounds when Horovod is there with TensorFlow; it is
started and shut down in every round, since its background thread takes part of the cores.

step: a tf.function with two layers of 150,000 weights, a batch of 8, and momentum, nobody late, no backup workers: with
DistributedOptimizer, and with Horovod's allreduce for each gradient and a plain optimizer. (That is what Horovod's
DistributedGradientTape does. Its Keras optimizer does not average under Keras 3, so its fit is none to compare with.)
Seconds per step of the slowest rank; all ranks must have the weights that one process gets with all the data, whoever
averages.

fit: the same layers; each gradient takes 20 ms more, asleep, so that ranks do not compete for cores.
The time of a step is that of an epoch on rank 0, which is never late, divided by the updates. The last rank is late by
200 ms in each step, or nobody is. Ideal: nobody late.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from mpi4py import MPI

import hvd_backup.keras
import hvd_backup.tensorflow as hvd
import measurement
from hvd_backup import faults
from hvd_backup.tensorflow.horovod_names import HOROVOD

KIB, MIB = 1024, 1024**2
SIZES = [1 * KIB, 64 * KIB, 1 * MIB, 16 * MIB]
WORK_MS, LATE_MS = 20, 200
REFERENCE: dict[int, Any] = {}  # by the number of steps, the weights that one process gets with all the data
Samples = dict[tuple[str, str], list[float]]


def op_seconds(comm: MPI.Intracomm, reduce: Callable[[Any, str], Any], size: int) -> float:
    """Seconds per op, of the slowest rank."""
    calls = int(np.clip(8 * MIB // size, 3, 50))

    @tf.function
    def block(tensor: Any) -> Any:
        for number in range(calls):  # each takes the result of the one before, so they come one after the other
            tensor = reduce(tensor, f"perf.{size}.{number}") / comm.size
        return tensor

    tensor = tf.fill([size // 4], float(comm.rank))
    block(tensor)
    measurement.quiet_barrier(comm)
    block(tensor)
    started = time.perf_counter()
    result = block(tensor).numpy()
    seconds = float(comm.allreduce(time.perf_counter() - started, MPI.MAX)) / calls
    assert (result == (comm.size - 1) / 2).all(), f"wrong mean of {size} bytes"
    return seconds


def ours(tensor: Any, name: str) -> Any:
    return hvd.first_n_allreduce(tensor, op=hvd.Sum, name=name).result


def theirs(tensor: Any, name: str) -> Any:
    return HOROVOD.module().allreduce(tensor, op=HOROVOD.module().Sum, name=name)


def new_model() -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((256,)), keras.layers.Dense(512, "relu"), keras.layers.Dense(32)])


def step_seconds(comm: MPI.Intracomm, who: str, steps: int) -> float:
    """Seconds per training step, of the slowest rank. who: "hvd_backup", "Horovod", or "alone", which only computes."""
    faults.clear()
    model = new_model()
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    if who == "hvd_backup":
        optimizer = hvd_backup.keras.DistributedOptimizer(optimizer)
    x = tf.constant(np.random.default_rng(2).normal(size=(comm.size, 8, 256)).astype(np.float32))
    batch = tf.reshape(x, [-1, 256]) if who == "alone" else x[comm.rank]

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(batch, training=True) - batch[:, :32]))
        gradients = tape.gradient(loss, model.trainable_variables)
        if who == "Horovod":
            theirs = HOROVOD.module()
            gradients = [
                theirs.allreduce(each, op=theirs.Average, name=f"step.{i}") for i, each in enumerate(gradients)
            ]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step()
    measurement.quiet_barrier(comm)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - started) / steps
    weights = np.concatenate([variable.numpy().ravel() for variable in model.variables])
    if who == "alone":
        REFERENCE[steps] = weights
    elif comm.rank == 0:
        assert np.allclose(weights, REFERENCE[steps], rtol=1e-3, atol=1e-4), f"{who} does not average"
    assert len(set(comm.allgather(weights.tobytes()))) == 1, f"{who}: weights differ"
    return float(comm.allreduce(seconds, MPI.MAX))


def fit_seconds(backup_workers: int, late: bool, steps: int) -> float:
    """Seconds per update on rank 0."""
    faults.inject(*faults.parse(f"rank=*,ms={WORK_MS}" + (f";rank={hvd.size() - 1},ms={LATE_MS}" if late else "")))
    model = new_model()
    optimizer = hvd_backup.keras.DistributedOptimizer(keras.optimizers.SGD(0.01), backup_workers=backup_workers)
    model.compile(optimizer=optimizer, loss="mse")
    x = np.random.default_rng(hvd.rank()).normal(size=(steps * 8, 256)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :32])).batch(8)
    times: list[
        float
    ] = []  # of the newest epoch: its beginning, and the end of each batch, of which a late rank has few

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            times[:] = [time.perf_counter()]

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            times.append(time.perf_counter())

    callbacks = [hvd_backup.keras.callbacks.FollowCallback(), Clock()]
    model.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=callbacks)  # the first epoch compiles
    weights = b"".join(variable.numpy().tobytes() for variable in model.variables)
    assert len(set(hvd.allgather_object(weights))) == 1, "weights differ"
    return (times[-1] - times[0]) / steps


def one_round(comm: MPI.Intracomm, samples: Samples, sizes: list[int], steps: int) -> None:
    """Every contestant once."""
    for size in sizes:
        samples[f"op {size}", "hvd_backup"].append(op_seconds(comm, ours, size))
    samples["step", "hvd_backup"].append(step_seconds(comm, "hvd_backup", steps))
    for b, late in ((0, False), (0, True), (1, False), (1, True)):
        who = f"hvd_backup, b = {b}, {'one rank late' if late else 'nobody late'}"
        samples["fit", who].append(fit_seconds(b, late, steps))
    hvd.barrier()
    if HOROVOD.usable():
        HOROVOD.module().init()
        for size in sizes:
            samples[f"op {size}", "Horovod"].append(op_seconds(comm, theirs, size))
        samples["step", "Horovod"].append(step_seconds(comm, "Horovod", steps))
        comm.Barrier()
        HOROVOD.module().shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each contestant (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="updates of an epoch (default 40)")
    args = measurement.parse(parser)
    sizes = SIZES
    if args.quick:
        sizes, args.rounds, args.steps = SIZES[:2], 1, 8
    comm = MPI.COMM_WORLD
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")  # each block is a function of its own on purpose
    hvd.init()
    samples: Samples = defaultdict(list)
    step_seconds(comm, "alone", args.steps)
    for _ in range(args.rounds):
        one_round(comm, samples, sizes, args.steps)
    if comm.rank == 0:
        results = []
        for (what, name), seconds in samples.items():
            base = "hvd_backup, b = 0, nobody late" if what == "fit" else "Horovod"
            p50 = measurement.percentile(seconds, 50)
            results.append(
                {
                    "what": what,
                    "contestant": name,
                    "blocks": len(seconds),
                    "p50_us": 1e6 * p50,
                    "p90_us": 1e6 * measurement.percentile(seconds, 90),
                    "ratio": p50 / measurement.percentile(samples[what, base], 50) if (what, base) in samples else None,
                }
            )
        cells = [
            (
                *(r["what"], r["contestant"], f"{r['p50_us']:,.0f}", f"{r['p90_us']:,.0f}"),
                "-" if r["ratio"] is None else f"{r['ratio']:.2f}",
            )
            for r in results
        ]
        facts = measurement.machine()
        measurement.print_table(
            f"TensorFlow {tf.__version__} on {comm.size} ranks",
            ["what [bytes]", "contestant", "p50 [us]", "p90 [us]", "to Horovod; fit: to nobody late"],
            cells,
            f"{facts['mpi']}, {facts['cores']} cores, {facts['cpu']}; verified"
            + ("" if HOROVOD.usable() else f"; without Horovod: {HOROVOD.why_not().splitlines()[0]}"),
        )
        settings = {"ranks": comm.size, "rounds": args.rounds, "steps": args.steps, "work_ms": WORK_MS}
        measurement.write_json(args.json, "tensorflow_perf", {**settings, "late_ms": LATE_MS}, results)
    hvd.shutdown()


if __name__ == "__main__":
    main()
