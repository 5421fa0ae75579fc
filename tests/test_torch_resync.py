"""A rank that is stopped until it is beyond the journal comes back with the state of another one, bit for bit.

Four real processes, backup_workers=1. Rank 3 is stopped with SIGSTOP, for as long as the others need for many more
updates than the journal holds.
"""

import hashlib
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup.config import Config
from hvd_backup.policy import Policy
from hvd_backup.resync import NumpyArrays, memory_at, pack, unpack
from hvd_backup.torch.resync import TorchArrays
from tests.launch import start_ranks
from tests.rank_main import mark
from tests.torch_training import batch, digest

LATE = 3
LAG = 4


class Ballast:
    """Something large that is part of the state."""

    def __init__(self, mebibytes: int) -> None:
        self.data = torch.full((mebibytes << 18,), float(hvd.rank()))

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.copy_(state["data"])


def bits_of(tensors: Any) -> str:
    """SHA-256 of tensors."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def train(epochs: int, steps: int, ballast: int = 0, stop_server: str = "", follow: bool = True) -> dict[str, Any]:
    """Marks every step. stop_server: the first one to be asked for its state stops "before" or "after" the copy."""
    hvd.init()
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    model = torch.nn.Sequential(*layers)
    hvd.broadcast_parameters(model.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
        model.named_parameters(),
        backup_workers=1,
        max_lag=LAG,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    optimizer.register_scheduler(scheduler)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer.on_update(lambda update: average.update_parameters(model))
    optimizer.resync_also(average=average)
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    if ballast:
        optimizer.resync_also(ballast=Ballast(ballast))
    if stop_server:
        stop_when_asked(optimizer, stop_server)
    buffers: list[str] = []
    taken_over: list[tuple[int, str]] = []
    for _ in range(epochs):
        for _ in hvd.follow(range(steps), optimizer) if follow else range(steps):
            data = batch(hvd.rank(), optimizer.global_step)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(data[0]), data[1]).backward()
            buffers.append(bits_of(model.buffers()))
            time.sleep(0.004)
            optimizer.step()
            mark("step", optimizer.global_step)
            if optimizer.last_update.resynced:
                taken_over.append((optimizer.last_update.resynced, bits_of(model.buffers())))
                mark("back", optimizer.last_update.resynced)
        mark("epoch")
        weights = hvd.allgather_object(digest(model, optimizer))
        assert len(set(weights)) == 1, weights
    assert addresses == [tensor.data_ptr() for tensor in model.state_dict().values()]
    return {
        "digest": digest(model, optimizer),
        "average": bits_of(average.parameters()),
        "averaged": int(average.n_averaged),
        "scheduler": pickle.dumps(sorted(scheduler.state_dict().items())),
        "step": optimizer.global_step,
        "last": optimizer.last_update.step,
        "counters": optimizer.counters(),
        "buffers": buffers,
        "taken_over": taken_over,
    }


def stop_when_asked(optimizer: Any, when: str) -> None:
    """The first rank that is asked for its state is stopped: before it has made a copy, or while that is taken."""
    exchange, flag = optimizer._exchange, Path(os.environ["RANK_TEST_FOLDER"]) / "stopped"
    make = exchange.state

    def state(own: dict[str, Any]) -> Any:
        try:
            flag.touch(exist_ok=False)
        except FileExistsError:
            return make(own)
        mark("asked")
        if when == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
            return make(own)
        packed = make(own)
        size = sum(length for _, length in packed.parts)
        # After the copy, which takes its time: the ranks share cores.
        threading.Thread(target=stop_while_it_is_taken, args=(optimizer.training.channel, size)).start()
        return packed

    exchange.state = state


def stop_while_it_is_taken(channel: Any, size: int) -> None:
    while channel.state_wanted:
        time.sleep(0.0005)
    time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGSTOP)


def check_equal(values: list[dict[str, Any]], steps: int) -> None:
    for key in ("digest", "average", "averaged", "scheduler", "step", "last"):
        assert len({value[key] for value in values}) == 1, [value[key] for value in values]
    assert values[0]["step"] == steps
    late = values[LATE]
    counters = late["counters"]
    assert counters["resynced"] > LAG
    assert counters["contributed"] + counters["caught_up"] + counters["resynced"] == steps
    others = {bits for value in values if value is not late for bits in value["buffers"]}
    assert late["taken_over"] and all(bits in others for _, bits in late["taken_over"])
    assert sum(count for count, _ in late["taken_over"]) <= counters["resynced"]


def stop_until(job: Any, at: int, others_at: int) -> None:
    """Stops the late rank when it is at a step, until another one has come to a later one."""
    wait_for_step(job, LATE, at)
    job.stop(LATE)
    wait_for_step(job, 0, others_at)
    job.resume(LATE)


def wait_for_step(job: Any, rank: int, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(each["name"] == "step" and each["value"] >= step for each in job.marks(rank)):
        assert time.monotonic() < deadline, f"rank {rank} does not come to step {step}"
        time.sleep(0.005)


def test_i4_a_stopped_rank_comes_back_bit_identical() -> None:
    """In the first epoch it falls behind within the epoch, in the second one again."""
    with start_ranks(4, train, args=(2, 60)) as job:
        stop_until(job, 5, 40)
        stop_until(job, 62, 90)
        outcome = job.wait()
    values = outcome.values()
    check_equal(values, 120)
    assert "rank 3 has taken over the state of rank" in outcome.ranks[0].output
    assert "beyond" not in outcome.ranks[LATE].output


@pytest.mark.parametrize("follow", [True, False])
def test_i6_it_is_stopped_beyond_the_end_of_the_epoch(follow: bool) -> None:
    """The others wait for it in a collective, in which they cannot make copies of their state."""
    with start_ranks(4, train, args=(2, 30), kwargs={"follow": follow}) as job:
        wait_for_step(job, LATE, 5)
        job.stop(LATE)
        job.wait_for_mark(0, "epoch")
        time.sleep(0.2)
        job.resume(LATE)
        values = job.wait().values()
    assert len({value["digest"] for value in values}) == 1
    assert values[LATE]["counters"]["resynced"] > LAG


@pytest.mark.parametrize("when", ["before", "after"])
def test_i4_the_server_is_stopped(when: str) -> None:
    """Before it has made a copy, or while that is taken: then the late rank gets it from another one."""
    with start_ranks(4, train, args=(1, 150), kwargs={"ballast": 200, "stop_server": when}) as job:
        stop_until(job, 5, 20)
        job.wait_for_mark(LATE, "back")
        for rank in range(3):
            if any(each["name"] == "asked" for each in job.marks(rank)):
                job.resume(rank)
        values = job.wait().values()
    assert len({value["digest"] for value in values}) == 1
    assert {value["step"] for value in values} == {150}


def test_wait_is_what_it_was() -> None:
    """on_max_lag="wait": the others wait at the bound."""
    rules = Policy.resolve(Config(), 4, backup_workers=1, on_max_lag="wait")
    assert "on_max_lag wait" in rules.description()
    assert Policy.resolve(Config(), 4, backup_workers=1).on_max_lag == "resync"


def test_a_state_comes_back_bit_for_bit() -> None:
    state = {
        "a": torch.randn(3, 5).t(),  # not contiguous
        "b": torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(7),
        "e": [1, (2.5, None), {"nested": torch.arange(6, dtype=torch.float64).reshape(2, 3)}],
        "f": torch.tensor([True, False]),
        "g": torch.complex(torch.ones(2), torch.ones(2)).conj(),
    }
    packed = pack(state, TorchArrays())
    memory = bytearray(b"".join(bytes(memory_at(*part)) for part in packed.parts))
    back = unpack(memoryview(memory), TorchArrays())
    assert back["e"][:2] == [1, (2.5, None)]
    for given, found in [(state[k], back[k]) for k in "abcdfg"] + [(state["e"][2]["nested"], back["e"][2]["nested"])]:
        assert given.dtype == found.dtype and given.shape == found.shape
        assert (
            given.resolve_conj().contiguous().view(-1).view(torch.uint8).tolist()
            == found.contiguous().view(-1).view(torch.uint8).tolist()
            if given.numel()
            else True
        )


def test_numpy_arrays_too() -> None:
    import numpy as np

    state = [np.arange(7, dtype=np.int64), np.float32(2.5), np.array(3.5), np.zeros((0, 2)), "text"]
    packed = pack(state, NumpyArrays())
    memory = bytearray(b"".join(bytes(memory_at(*part)) for part in packed.parts))
    back = unpack(memoryview(memory), NumpyArrays())
    for given, found in zip(state, back, strict=True):
        np.testing.assert_array_equal(given, found)
