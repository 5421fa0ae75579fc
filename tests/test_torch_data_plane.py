"""Gradients that go from GPU to GPU: which do, and what happens when a rank stops or dies amid an exchange.

The GPUs are stand-ins whose memory is the host's (csrc/bindings/testing_device.cpp), so ranks are real processes, and
what they exchange are files in a folder.
"""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hvd_backup._core_testing import HostDevice

import hvd_backup.torch as hvd
from hvd_backup.errors import ConfigError
from tests.delayed_transfers import DelayedTransfers, use
from tests.launch import run_ranks, start_ranks
from tests.rank_main import mark
from tests.torch_training import batch, digest, loss_of, make_model

STEPS = 150
STOPS = 3
STOPPED_S = 0.4


def on_a_gpu(folder: str, why_no_groups: str = "") -> HostDevice:
    """From now on parameters on the CPU count as on a GPU, which can exchange data with those of others."""
    device = HostDevice(folder, hvd.rank() + 1, why_no_groups)
    use(DelayedTransfers(device=device))
    return device


def make_optimizer(model: torch.nn.Module, **options: Any) -> Any:
    options = {"backup_workers": 1} | options
    return hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), **options)


def train(optimizer: Any, model: torch.nn.Module, device: HostDevice, steps: int, pause_s: float = 0.003) -> None:
    for _ in hvd.follow(range(steps), optimizer):
        time.sleep(pause_s)
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), optimizer.global_step)).backward()
        optimizer.step()
        if device.exchanges >= 10:
            mark("exchanged")


def train_while_one_stops(folder: str) -> dict[str, Any]:
    hvd.init()
    device, model = on_a_gpu(folder), make_model()
    optimizer = make_optimizer(model)
    train(optimizer, model, device, STEPS, pause_s=0.005 + 0.005 * hvd.rank())  # the stopped one need not be late
    return {
        "digest": digest(model, optimizer),
        "step": optimizer.global_step,
        "exchanges": device.exchanges,
        "aborts": device.aborts,
    }


def test_i4_a_process_that_stops_amid_an_exchange_is_left_behind_and_comes_back(tmp_path: Path) -> None:
    with start_ranks(4, train_while_one_stops, [str(tmp_path)], timeout_s=120) as job:
        job.wait_for_mark(0, "exchanged")
        chance = random.Random(1)
        for _ in range(STOPS):
            job.stop(1)
            time.sleep(STOPPED_S)
            job.resume(1)
            time.sleep(chance.random() * 0.2)
        values = job.wait().values()
    assert len({value["digest"] for value in values}) == 1
    assert [value["step"] for value in values] == [STEPS] * 4
    assert all(value["exchanges"] > 10 for value in values)


def train_while_one_dies(folder: str) -> dict[str, Any]:
    hvd.init()
    device, model = on_a_gpu(folder), make_model()
    optimizer = make_optimizer(model)
    for _ in hvd.follow(range(STEPS), optimizer):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), optimizer.global_step)).backward()
        if hvd.rank() == 2 and device.exchanges >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        time.sleep(0.003)
    return {"digest": digest(model, optimizer), "step": optimizer.global_step, "aborts": device.aborts}


def test_i4_the_others_leave_the_group_of_a_process_that_dies_and_go_on(tmp_path: Path) -> None:
    with start_ranks(4, train_while_one_dies, [str(tmp_path)], survive_losses=True, timeout_s=120) as job:
        outcome = job.wait()
    values = [rank.value for number, rank in enumerate(outcome.ranks) if number != 2]
    assert outcome.exit_code == 0, outcome.describe()
    assert len({value["digest"] for value in values}) == 1
    assert all(value["step"] == STEPS and value["aborts"] == 1 for value in values)


CHOICES: dict[str, tuple[str, dict[str, Any], str, str]] = {  # HVD_BACKUP_DATA_PLANE, options, why no groups; what then
    "auto": ("auto", {}, "", "direct"),
    "asked for": ("nccl", {}, "", "direct"),
    "not wanted": ("host", {}, "", "through host memory"),
    "no NCCL": ("auto", {}, "NCCL cannot be loaded", "through host memory"),
    "asked for, but no NCCL": (
        *("nccl", {}, "NCCL cannot be loaded"),
        "HVD_BACKUP_DATA_PLANE=nccl on rank 0: NCCL cannot be loaded. With 'auto' or 'host' gradients go through",
    ),
    "by bucket": ("auto", {"scope": "bucket"}, "", "through host memory"),
    "asked for, by bucket": ("nccl", {"scope": "bucket"}, "", "scope='bucket' decides for each bucket by itself"),
    "asked for, nonfinite": ("nccl", {"nonfinite": "drop"}, "", "nonfinite='drop' looks at gradients in host memory"),
    "asked for, b = 0": ("nccl", {"backup_workers": 0}, "", "without backup workers"),
}


def choose(folder: str) -> dict[str, str]:
    chosen = {}
    for name, (plane, options, why_no_groups, _) in CHOICES.items():
        os.environ["HVD_BACKUP_DATA_PLANE"] = plane
        hvd.init()
        device, model = on_a_gpu(folder, why_no_groups), make_model()
        optimizer = make_optimizer(model, grace=5.0, **options)  # so that each contributes
        try:
            loss_of(model, batch(hvd.rank(), 0)).backward()
            optimizer.step()
            chosen[name] = "direct" if device.copies + device.exchanges > 0 else "through host memory"
        except ConfigError as error:
            chosen[name] = str(error)
        del optimizer
        hvd.shutdown()
    return chosen


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What rank 0 of two has done."""
    values: list[dict[str, str]] = run_ranks(2, choose, [str(tmp_path_factory.mktemp("gpus"))])
    return values[0]


@pytest.mark.parametrize("name", CHOICES)
def test_the_data_plane_is_chosen(name: str, chosen: dict[str, str]) -> None:
    assert CHOICES[name][-1] in chosen[name]
