"""Processes that die (SIGKILL): where MPI survives it, the others go on; elsewhere all end, and have saved."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import context, failures
from hvd_backup.errors import HvdBackupError, UsageError
from tests.launch import start_ranks
from tests.outcome import Outcome
from tests.rank_main import mark
from tests.torch_training import batch, digest, loss_of, make_model

STEPS = 150


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def of_living(outcome: Outcome, *dead: int) -> list[Any]:
    """What the others have returned."""
    for rank in outcome.ranks:
        assert rank.state == ("died" if rank.rank in dead else "returned"), outcome.describe()
    return [rank.value for rank in outcome.ranks if rank.rank not in dead]


def make_optimizer(model: torch.nn.Module, b: int) -> Any:
    hvd.broadcast_parameters(model.state_dict(), 0)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), backup_workers=b)


def train_while_two_die() -> dict[str, Any]:
    """Rank 3 dies in the middle of a backward pass, with a bucket handed over; rank 2 while rank 4 fetches from it."""
    hvd.init()
    rank = hvd.rank()
    model = make_model()
    optimizer = make_optimizer(model, b=2)
    for _ in hvd.follow(range(STEPS), optimizer):
        step = optimizer.global_step
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, step))
        if rank == 3 and step >= 20:
            next(model.parameters()).register_hook(lambda _: die())  # its gradient is the last one
        if rank == 4 and 30 <= step < 60:
            time.sleep(0.5)
            mark("comes back")
        time.sleep(0.005)
        loss.backward()
        optimizer.step()
    total = hvd.allreduce(torch.tensor([2.0**rank]), op=hvd.Sum, name="who")
    try:
        hvd.broadcast_object("no", root_rank=3)
        refused = ""
    except HvdBackupError as error:
        refused = str(error)
    return {
        "digest": digest(model, optimizer),
        "step": optimizer.global_step,
        "caught_up": optimizer.counters()["caught_up"],
        "total": total.item(),
        "gathered": hvd.allgather(torch.tensor([rank])).tolist(),
        "objects": hvd.allgather_object(rank),
        "word": hvd.broadcast_object(f"of rank {rank}", root_rank=4),
        "refused": refused,
        "report": str(hvd.straggler_report()) + hvd.straggler_report().summary(),
    }


def test_i4_the_others_go_on_when_ranks_die() -> None:
    with start_ranks(
        5, train_while_two_die, env={"HVD_BACKUP_BUCKET_BYTES": "200"}, survive_losses=True, timeout_s=60
    ) as job:
        job.wait_for_mark(4, "comes back")
        job.kill(2)
        outcome = job.wait()
    values = of_living(outcome, 2, 3)
    assert outcome.exit_code == 0, outcome.describe()
    assert len({value["digest"] for value in values}) == 1
    assert [value["step"] for value in values] == [STEPS] * 3
    assert values[-1]["caught_up"] > 10, "rank 4 had nothing to fetch when rank 2 died"
    for value in values:
        assert value["total"] == 2**0 + 2**1 + 2**4
        assert value["gathered"] == value["objects"] == [0, 1, 4]
        assert value["word"] == "of rank 4"
        assert "rank 3, whose process has died" in value["refused"]
    assert "died at step 2" in values[0]["report"] and "rank 3 died at step" in values[0]["report"]
    assert "rank 2 has died at step" in outcome.describe() + outcome.ranks[0].output


def lose_the_coordinator(folder: str) -> str:
    hvd.init()
    model = make_model()
    optimizer = make_optimizer(model, b=1)
    hvd.on_failure(lambda reason: Path(folder, f"{hvd.rank()}").write_text(f"{digest(model)} {reason}"))
    try:
        for _ in hvd.follow(range(STEPS), optimizer):
            if hvd.rank() == 0 and optimizer.global_step >= 20:
                die()
            optimizer.zero_grad()
            loss_of(model, batch(hvd.rank(), optimizer.global_step)).backward()
            optimizer.step()
    except HvdBackupError as error:
        return f"{digest(model)} {error}"
    return "went on"


def test_without_rank_0_all_end_with_an_error_that_says_so(tmp_path: Path) -> None:
    with start_ranks(3, lose_the_coordinator, [str(tmp_path)], survive_losses=True, timeout_s=60) as job:
        values = of_living(job.wait(), 0)
    for rank, value in enumerate(values, start=1):
        assert "the process of rank 0 has died" in value and "last checkpoint" in value
        assert (tmp_path / str(rank)).read_text() == value  # on_failure had run, with the same weights


def lose_a_rank_that_is_needed() -> str:
    hvd.init()
    model = make_model()
    optimizer = make_optimizer(model, b=0)
    try:
        for step in range(STEPS):
            if hvd.rank() == 1 and step == 5:
                die()
            optimizer.zero_grad()
            loss_of(model, batch(hvd.rank(), step)).backward()
            optimizer.step()
    except HvdBackupError as error:
        return str(error)
    return "went on"


def test_without_backup_workers_a_lost_rank_is_an_error() -> None:
    with start_ranks(3, lose_a_rank_that_is_needed, survive_losses=True, timeout_s=60) as job:
        for value in of_living(job.wait(), 1):
            assert re.search(r"rank 1 has left at step [45] \(its process has died\).*no backup workers", value), value


def die_in_collectives() -> list[Any]:
    hvd.init()
    rank, seen = hvd.rank(), []
    hvd.allreduce(torch.zeros(1), name="open")
    if rank == 3:
        time.sleep(0.3)
        die()
    large = torch.full((300_000,), float(rank + 1))
    seen.append(hvd.allreduce(large, op=hvd.Sum, name="large")[[0, -1]].tolist())
    try:
        with context.current().full_collective("one that is never completed") as left:
            if rank == 2:
                die()
            left.comm.allgather(rank)
        seen.append("completed")
    except HvdBackupError as error:
        seen.append(str(error))
    seen.append(hvd.allgather_object(rank))
    hvd.barrier()
    return seen


def test_collectives_of_all_ranks_are_those_of_the_survivors() -> None:
    with start_ranks(4, die_in_collectives, survive_losses=True, timeout_s=60) as job:
        for value in of_living(job.wait(), 2, 3):
            assert value == [[6.0, 6.0], "a process has died in the middle of this collective: call it again", [0, 1]]


def train_until_the_launcher_ends_it(folder: str) -> None:
    hvd.init()
    model = make_model()
    optimizer = make_optimizer(model, b=1)
    digests = {}
    optimizer.on_update(lambda _: digests.update({optimizer.global_step: digest(model)}))

    def save(reason: str) -> None:
        whole = digests[optimizer.global_step] == digest(model)
        Path(folder, f"{hvd.rank()}").write_text(f"{'whole' if whole else 'torn'} {reason}")

    hvd.on_failure(save)
    told = False
    for _ in hvd.follow(range(1_000_000), optimizer):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), optimizer.global_step)).backward()
        optimizer.step()
        if not told and optimizer.global_step >= 20:  # a rank that was late may have made many updates in one step
            told = True
            mark("trains")


def test_where_mpi_does_not_survive_it_all_end_and_have_saved_what_they_had(tmp_path: Path) -> None:
    with start_ranks(3, train_until_the_launcher_ends_it, [str(tmp_path)], timeout_s=60) as job:
        job.wait_for_mark(0, "trains")
        job.kill(2)
        killed = time.monotonic()
        outcome = job.wait()
    assert time.monotonic() - killed < 20
    assert outcome.exit_code != 0 and [rank.state for rank in outcome.ranks] == ["died"] * 3, outcome.describe()
    assert "rank 2" in outcome.launcher_output, outcome.describe()
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text().startswith("whole SIGTERM")


def test_on_failure_takes_functions_in_the_main_thread() -> None:
    with pytest.raises(UsageError, match="expected a function"):
        failures.on_failure("save")  # type: ignore[arg-type]
    found = []

    def elsewhere() -> None:
        try:
            failures.on_failure(print)
        except UsageError as error:
            found.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found and "main" in found[0]


HANDLED = """
import os, signal, sys, time
from hvd_backup import failures
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"own handler\\n"))
failures.on_failure(lambda reason: os.write(1, f"saved: {reason[:7]}\\n".encode()))
child = os.fork()
if child == 0:
    time.sleep(60)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
print("goes on")
"""

CHILD = """
import os, signal, time
from hvd_backup import failures
failures.on_failure(lambda reason: print("saved", flush=True))
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
time.sleep(0.3)
print("child ended by", os.WTERMSIG(status), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_sigterm_outside_of_mpi() -> None:
    """The program's own handler stays; a child's SIGTERM is not ours, and ends it."""
    own = subprocess.run([sys.executable, "-c", HANDLED], capture_output=True, text=True, timeout=60, check=False)
    assert sorted(own.stdout.splitlines()) == ["goes on", "own handler", "saved: SIGTERM"], own
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60, check=False)
    assert child.stdout.splitlines() == ["child ended by 15", "saved"] and child.returncode == 143, child
