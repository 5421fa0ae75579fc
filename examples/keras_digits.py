"""A Horovod script for Keras with backup workers: a small CNN learns scikit-learn's handwritten digits with fit().

    mpirun -np 4 python examples/keras_digits.py --backup-workers 1
    HVD_BACKUP_DELAY="rank=3,ms=200" mpirun -np 4 python examples/keras_digits.py --backup-workers 1
    KERAS_BACKEND=torch mpirun -np 4 python examples/keras_digits.py --backup-workers 1

Whatever a script for Horovod would not have is marked with `# hvd_backup:`. The second line makes rank 3 slow; the
third trains with PyTorch in place of TensorFlow, which need not be installed then.
"""

import argparse
import hashlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # ranks share the cores of this machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
from sklearn.datasets import load_digits

import hvd_backup.keras as hvd  # hvd_backup: was `import horovod.keras as hvd`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    parser.add_argument("--backup-workers", type=int, default=0, help="ranks that no update waits for")
    args = parser.parse_args()

    hvd.init()
    keras.utils.set_random_seed(1)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    order = np.random.default_rng(1).permutation(len(labels))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    mine = train[hvd.rank() :: hvd.size()]
    mine = mine[: len(mine) // args.batch_size * args.batch_size]  # whole batches

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    contributors = hvd.size() - args.backup_workers  # hvd_backup: the learning rate follows N, not the number of ranks
    optimizer = keras.optimizers.SGD(0.01 * contributors, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        backup_workers=args.backup_workers,  # hvd_backup: the one option that is needed
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        images[mine],
        labels[mine],
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=(images[test], labels[test]),
        verbose=2 if hvd.rank() == 0 else 0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.FollowCallback(),  # hvd_backup: a late rank ends its epoch with the others
            hvd.callbacks.MetricAverageCallback(),
        ],
    )

    variables = [*model.variables, *optimizer.variables]
    digest = hashlib.sha256(
        b"".join(np.ascontiguousarray(keras.ops.convert_to_numpy(v)).tobytes() for v in variables)
    ).hexdigest()
    identical = len(set(hvd.allgather_object(digest))) == 1
    dropped = hvd.allgather_object(optimizer.counters()["dropped"])
    if hvd.rank() == 0:
        print(f"updates             {optimizer.global_step}")
        print(f"gradients dropped   {', '.join(map(str, dropped))} (rank 0, 1, ...)")
        print(f"weights identical   {'yes' if identical else 'NO'}, SHA-256 {digest[:16]}")


if __name__ == "__main__":
    main()
