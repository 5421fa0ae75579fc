"""A Horovod script for TensorFlow with a loop of its own: a linear model, a GradientTape, any way to apply gradients.

    mpirun -np 4 python examples/tensorflow_tape.py --backup-workers 1

Whatever a script for Horovod would not have is marked with `# hvd_backup:`. One rank after the other is late by 20 ms;
the others do not wait for it, and all ranks have the same weights at the end. A rank that is always slow would have to
make every call of the tape that the others make: for that use DistributedOptimizer, as in keras_digits.py.
"""

import argparse
import hashlib
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

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
    truth = np.arange(10, dtype=np.float32)
    weights = tf.Variable(tf.random.normal([10, 1]))
    hvd.broadcast_variables([weights], root_rank=0)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.matmul(x, weights) - y))
        tape = hvd.DistributedGradientTape(tape, backup_workers=args.backup_workers)  # hvd_backup: the option
        (gradient,) = tape.gradient(loss, [weights])
        weights.assign_sub(0.05 * gradient)
        return loss

    began = time.perf_counter()
    for number in range(args.steps):
        if number % (4 * hvd.size()) == 4 * hvd.rank():
            time.sleep(0.02)
        x = random.normal(size=(32, 10)).astype(np.float32)
        loss = step(tf.constant(x), tf.constant(x @ truth[:, None]))
    hvd.barrier()
    seconds = time.perf_counter() - began

    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    identical = len(set(hvd.allgather_object(digest))) == 1
    if hvd.rank() == 0:
        print(f"loss                {float(loss):.6f} after {args.steps} steps in {seconds:.1f} s")
        print(f"weights identical   {'yes' if identical else 'NO'}, SHA-256 {digest[:16]}")


if __name__ == "__main__":
    main()
