"""Beside a Horovod with TensorFlow: what it does not do, and what of it our modules use."""

from typing import Any

from tests.launch import run_ranks

FIT = """
import importlib
import sys
import keras
import numpy as np

hvd = importlib.import_module(sys.argv[1])
hvd.init()
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse")
x = np.full((8, 3), 1.0 + hvd.rank(), np.float32)
model.fit(x, np.full((8, 1), hvd.rank(), np.float32), batch_size=4, verbose=0, shuffle=False)
result = [weights.tolist() for weights in model.get_weights()]
"""

BESIDE = """
import tensorflow as tf
import hvd_backup.keras
import hvd_backup.tensorflow as hvd

hvd.init()
rank = hvd.rank()
mine = tf.constant([1.0 + rank, 2.0])
only = hvd.add_process_set([1])
result = {
    "alltoall": hvd.alltoall(mine, splits=[1, 1])[0].numpy().tolist(),
    "grouped": [each.numpy().tolist() for each in hvd.grouped_allreduce([mine, mine], op=hvd.Sum)],
    "max": hvd.allreduce(mine, op=hvd.Max).numpy().tolist(),
    "sparse": tf.convert_to_tensor(
        hvd.allreduce(tf.IndexedSlices(mine[None], tf.constant([rank]), tf.constant([2, 2])), op=hvd.Sum)
    ).numpy().tolist(),
    "one": hvd.allreduce(mine, op=hvd.Sum, process_set=only).numpy().tolist() if rank == 1 else None,
    "reducescatter": hvd_backup.keras.reducescatter(mine, op=hvd.Sum).numpy().tolist(),
    "ours": hvd.allreduce(mine, op=hvd.Sum).numpy().tolist(),
}
"""


def weights_after_fit(module: str) -> list[Any]:
    return run_ranks(2, FIT, [module], env={"TF_CPP_MIN_LOG_LEVEL": "2"})


def test_our_keras_optimizer_averages_in_fit() -> None:
    ours = weights_after_fit("hvd_backup.keras")
    assert ours[0] == ours[1]


def test_horovods_own_keras_optimizer_does_not() -> None:
    """0.28.1 under Keras 3: no error, and every rank trains for itself."""
    theirs = weights_after_fit("horovod.keras")
    assert theirs[0] != theirs[1], "Horovod averages by now: the README says that it does not"


def test_what_is_horovods_own() -> None:
    env = {"HVD_BACKUP_HOROVOD": "auto", "HOROVOD_DYNAMIC_PROCESS_SETS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    values = run_ranks(2, BESIDE, env=env)
    for rank, value in enumerate(values):
        assert isinstance(value, dict), value
        assert value["alltoall"] == ([1.0, 2.0] if rank == 0 else [2.0, 2.0])
        assert value["grouped"] == [[3.0, 4.0]] * 2
        assert value["max"] == [2.0, 2.0]
        assert value["sparse"] == [[1.0, 2.0], [2.0, 2.0]]
        assert value["one"] == ([2.0, 2.0] if rank == 1 else None)
        assert value["reducescatter"] == ([3.0] if rank == 0 else [4.0])
        assert value["ours"] == [3.0, 4.0]
