"""Gradients that go from GPU to GPU: which do, and what happens when a rank stops or dies amid an exchange.

The GPUs are stand-ins whose memory is the host's (csrc/bindings/testing_device.cpp), so ranks are real processes, and
what they exchange are files in a folder; or, by CUDA-aware MPI, messages of the MPI that is here.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hvd_backup._core_testing import HostDevice

import hvd_backup.torch as hvd
from hvd_backup import data_plane
from hvd_backup.errors import ConfigError
from tests.delayed_transfers import DelayedTransfers, use
from tests.gpu_double import init
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


def train_while_one_stops(folder: str, plane: str, journal: str) -> dict[str, Any]:
    os.environ["HVD_BACKUP_DATA_PLANE"] = plane
    os.environ["HVD_BACKUP_JOURNAL"] = journal
    init(hvd, takes_gpu_memory=True)
    device, model = on_a_gpu(folder), make_model()
    optimizer = make_optimizer(model)
    train(optimizer, model, device, STEPS, pause_s=0.005 + 0.005 * hvd.rank())  # the stopped one need not be late
    return {
        "digest": digest(model, optimizer),
        "step": optimizer.global_step,
        "exchanges": device.exchanges,
        "groups": device.groups,  # by NCCL
        "reads": device.reads,
    }


both_planes = pytest.mark.parametrize("plane", ["nccl", "mpi"])


@pytest.mark.parametrize(("plane", "journal"), [("nccl", "host"), ("nccl", "device"), ("mpi", "host")])
def test_i4_a_process_that_stops_amid_an_exchange_is_left_behind_and_comes_back(
    plane: str, journal: str, tmp_path: Path
) -> None:
    with start_ranks(4, train_while_one_stops, [str(tmp_path), plane, journal], timeout_s=120) as job:
        job.wait_for_mark(0, "exchanged")
        job.stop_now_and_then(1, STOPS, STOPPED_S)
        values = job.wait().values()
    assert len({value["digest"] for value in values}) == 1
    assert [value["step"] for value in values] == [STEPS] * 4
    assert values[0]["exchanges"] >= 10
    assert all((value["groups"] > 0) == (plane == "nccl") for value in values)
    assert any(value["reads"] > 0 for value in values) == (journal == "device")


def train_while_one_dies(folder: str, plane: str) -> dict[str, Any]:
    os.environ["HVD_BACKUP_DATA_PLANE"] = plane
    init(hvd, takes_gpu_memory=True)
    device, model = on_a_gpu(folder), make_model()
    optimizer = make_optimizer(model)
    for _ in hvd.follow(range(STEPS), optimizer):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), optimizer.global_step)).backward()
        if hvd.rank() == 2 and device.exchanges >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        time.sleep(0.003)
    return {
        "digest": digest(model, optimizer),
        "step": optimizer.global_step,
        "aborts": device.aborts,
        "in_use": device.in_use,
    }


@both_planes
def test_i4_the_others_leave_the_group_of_a_process_that_dies_and_go_on(plane: str, tmp_path: Path) -> None:
    with start_ranks(4, train_while_one_dies, [str(tmp_path), plane], survive_losses=True, timeout_s=120) as job:
        outcome = job.wait()
    values = [rank.value for number, rank in enumerate(outcome.ranks) if number != 2]
    assert outcome.exit_code == 0, outcome.describe()
    assert len({value["digest"] for value in values}) == 1
    assert all(value["step"] == STEPS and value["in_use"] == 0 for value in values)
    assert all(value["aborts"] == (plane == "nccl") for value in values)


# HVD_BACKUP_DATA_PLANE, options, why not NCCL, whether MPI takes GPU memory; what then
CHOICES: dict[str, tuple[str, dict[str, Any], str, bool, str]] = {
    "auto": ("auto", {}, "", False, "by NCCL"),
    "auto, though MPI could": ("auto", {}, "", True, "by NCCL"),
    "asked for": ("nccl", {}, "", True, "by NCCL"),
    "MPI asked for": ("mpi", {}, "", True, "by MPI"),
    "not wanted": ("host", {}, "", True, "through host memory"),
    "no NCCL": ("auto", {}, "NCCL cannot be loaded", True, "by MPI"),
    "neither": ("auto", {}, "NCCL cannot be loaded", False, "through host memory"),
    "asked for, but no NCCL": (
        *("nccl", {}, "NCCL cannot be loaded", True),
        "HVD_BACKUP_DATA_PLANE=nccl on rank 0: NCCL cannot be loaded. With 'auto' or 'host' gradients go through",
    ),
    "MPI asked for, which cannot": (
        *("mpi", {}, "", False),
        "HVD_BACKUP_DATA_PLANE=mpi on rank 0: MPI says that it does not take GPU memory (is not CUDA-aware). With",
    ),
    "by bucket": ("auto", {"scope": "bucket"}, "", True, "through host memory"),
    "asked for, by bucket": ("nccl", {"scope": "bucket"}, "", True, "scope='bucket' decides for each bucket by itself"),
    "nonfinite": ("auto", {"nonfinite": "drop"}, "", True, "by NCCL"),
    "asked for, b = 0": ("mpi", {"backup_workers": 0}, "", True, "without backup workers"),
}


def choose(folder: str) -> dict[str, str]:
    chosen = {}
    means_of = data_plane.means_of
    means: list[str] = []

    def chosen_means(*args: Any) -> tuple[str, str]:
        answer = means_of(*args)
        means.extend({"nccl": ["by NCCL"], "mpi": ["by MPI"]}.get(answer[0], []))
        return answer

    data_plane.means_of = chosen_means
    for name, (plane, options, why_no_groups, takes_gpu_memory, _) in CHOICES.items():
        os.environ["HVD_BACKUP_DATA_PLANE"] = plane
        means.clear()
        init(hvd, takes_gpu_memory)
        device, model = on_a_gpu(folder, why_no_groups), make_model()
        optimizer = make_optimizer(model, grace=5.0, **options)  # so that each contributes
        try:
            loss_of(model, batch(hvd.rank(), 0)).backward()
            optimizer.step()
            (chosen[name],) = means or ["through host memory"]
            assert (device.copies > 0) == bool(means), "the engine has the gradients"
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
