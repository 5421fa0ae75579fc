"""What the ranks of test_keras.py do with Keras on PyTorch alone: loops of one's own."""

import sys
from collections.abc import Callable
from typing import Any

import keras
import torch

import hvd_backup.keras as hvd
from hvd_backup import faults
from tests.keras_cases import digest, model, shard, watched

CASES: dict[str, Callable[[], Any]] = {}


def use_one_thread() -> None:
    """Ranks share cores."""
    torch.set_num_threads(1)


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Registers a case."""
    CASES[function.__name__] = function
    return function


@case
def own_loop_eagerly() -> dict[str, Any]:
    """A loop over follow() with backward(). p.grad is the user's before and after."""
    faults.inject(*faults.parse("rank=rotate:1,ms=12,p=0.6"))
    net = model("sgd")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), backup_workers=1)
    optimizer.build(net.trainable_variables)
    seen = watched(optimizer)
    computed, untouched = 0, True
    for _ in range(2):
        for x, y in hvd.follow(shard(), optimizer):
            net.zero_grad()
            torch.mean((net(x, training=True) - y) ** 2).backward()
            gradients = [variable.value.grad for variable in net.trainable_variables]
            copies = [gradient.clone() for gradient in gradients]
            optimizer.metrics(rank=hvd.rank())
            optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
            untouched &= all(v.value.grad is g for v, g in zip(net.trainable_variables, gradients, strict=True))
            untouched &= all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True))
            computed += 1
    net.optimizer = optimizer
    told = {"digest": digest(net), "step": optimizer.global_step, "computed": computed, "seen": seen}
    return {**told, "untouched": untouched}


@case
def without_tensorflow() -> bool:
    """Nothing has imported it."""
    return sys.modules["tensorflow"] is None and not any(name.startswith("tensorflow.") for name in sys.modules)


@case
def wrong_shape() -> None:
    variable = keras.Variable([1.0, 2.0], name="a")
    hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)).apply([torch.ones(3)], [variable])
