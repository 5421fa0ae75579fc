"""A Horovod script for TensorFlow with a loop of its own and a DistributedGradientTape: a linear model.

    mpirun -np 4 python examples/tensorflow_tape.py --backup-workers 1
    HVD_BACKUP_DELAY="rank=3,ms=200" mpirun -np 4 python examples/tensorflow_tape.py --backup-workers 1

Whatever a script for Horovod would not have is marked with `# hvd_backup:`. The second line makes rank 3 slow: the
others do not wait for it, it skips the batches of what it has missed, and all ranks have the same weights at the end.
"""

import argparse
import hashlib
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # ranks share the cores of this machine

import keras
import numpy as np
import tensorflow as tf

import hvd_backup.tensorflow as hvd  # hvd_backup: was `import horovod.tensorflow as hvd`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backup-workers", type=int, default=0, help="ranks that no update waits for")
    args = parser.parse_args()

    hvd.init()
    random = np.random.default_rng(hvd.rank())
    x = random.normal(size=(32 * args.steps, 10)).astype(np.float32)
    y = x @ np.arange(10, dtype=np.float32)[:, None]
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)

    weights = tf.Variable(tf.random.normal([10, 1]))
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, backup_workers=args.backup_workers)  # hvd_backup: this line
    hvd.broadcast_variables([weights], root_rank=0)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.matmul(x, weights) - y))
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer)  # hvd_backup: with the optimizer
        optimizer.apply_gradients(zip(tape.gradient(loss, [weights]), [weights], strict=True))
        return loss

    computed = 0
    began = time.perf_counter()
    for x_batch, y_batch in hvd.follow(batches, optimizer):  # hvd_backup: was `in batches`
        loss = step(x_batch, y_batch)
        computed += 1
    seconds = time.perf_counter() - began

    state = b"".join(np.ascontiguousarray(each).tobytes() for each in [weights, *optimizer.variables])
    identical = len(set(hvd.allgather_object(hashlib.sha256(state).hexdigest()))) == 1
    gradients = hvd.allgather_object(computed)
    if hvd.rank() == 0:
        print(f"loss                {float(loss):.6f} after {optimizer.global_step} updates in {seconds:.1f} s")
        print(f"batches computed    {', '.join(map(str, gradients))} (rank 0, 1, ...)")
        print(f"weights identical   {'yes' if identical else 'NO'}, SHA-256 {hashlib.sha256(state).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
