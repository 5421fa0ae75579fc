"""A recorded run with random delays, repeated without them, has the same weights, bit for bit. What does not fit says
where."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import trace
from tests.launch import run_ranks, start_ranks
from tests.torch_training import Unsized, batch, digest, loss_of, make_model

STEPS = 60
DELAYS = "rank=rotate:7,ms=12,p=0.7,seed=1;rank=*,ms=4,p=0.3,distribution=exponential,seed=2"


def train(
    scope: str, arrive: str, followed: str, hidden: int = 16, steps: int = STEPS, backup_workers: int | str = 1
) -> dict[str, Any]:
    """Dropout draws random numbers, so that also what is computed in vain has to be repeated."""
    hvd.init()
    model = torch.nn.Sequential(
        make_model(), torch.nn.Dropout(0.2), torch.nn.Linear(3, hidden), torch.nn.Linear(hidden, 3)
    )
    torch.manual_seed(hvd.rank())
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nonfinite = "drop" if followed == "followed with NaN" else "pass"
    optimizer = hvd.DistributedOptimizer(
        plain,
        model.named_parameters(),
        backup_workers=backup_workers,
        scope=scope,
        arrive=arrive,
        nonfinite=nonfinite,
    )
    optimizer.register_scheduler(torch.optim.lr_scheduler.StepLR(plain, 10, 0.8))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    updates: list[Any] = []
    optimizer.on_update(lambda update: updates.append((update.by_scope, update.required)))
    epochs = {
        "followed": lambda: hvd.follow(range(steps // 2), optimizer),
        "of unknown length": lambda: hvd.follow(Unsized(steps // 2 + 2 * hvd.rank()), optimizer),
        "not followed": lambda: range(steps // 2),
        "followed with NaN": lambda: hvd.follow(range(steps // 2), optimizer),
    }
    loop: Callable[[], Any] = epochs[followed]
    for _ in range(2):
        for _ in loop():
            own = batch(hvd.rank(), optimizer.global_step)
            optimizer.samples = 1 + hvd.rank()
            optimizer.zero_grad()
            spoiled = nonfinite == "drop" and optimizer.global_step % 10 in (hvd.rank(), 7)
            (loss_of(model, own) * (math.nan if spoiled else 1.0)).backward()
            optimizer.step()
        hvd.barrier()
    return {"digest": digest(model, optimizer), "updates": updates, "counters": optimizer.counters()}


CASES = [
    ("step", "first", "followed"),
    ("bucket", "last", "followed"),
    ("step", "last", "of unknown length"),
    ("step", "first", "not followed"),
    ("step", "last", "followed with NaN"),
]


def train_all() -> list[dict[str, Any]]:
    """All cases in one program, which are its optimizers."""
    return [train(*case) for case in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[dict[str, Any]]]]:
    """By run, rank and case: recorded, repeated, and repeated with delays of another kind."""
    path = tmp_path_factory.mktemp("replay") / "trace.jsonl"
    replay = {"HVD_BACKUP_REPLAY": str(path)}
    environments = [
        {"HVD_BACKUP_TRACE": str(path), "HVD_BACKUP_DELAY": DELAYS},
        replay,
        replay | {"HVD_BACKUP_DELAY": "rank=0,ms=3"},
    ]
    return [run_ranks(4, train_all, env=env | {"HVD_BACKUP_BUCKET_BYTES": "256"}) for env in environments]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_a_replayed_run_has_the_same_weights(number: int, runs: list[list[list[dict[str, Any]]]]) -> None:
    recorded, again, other = ([of_rank[number] for of_rank in run] for run in runs)
    assert {value["digest"] for value in (*recorded, *again)} == {recorded[0]["digest"]}
    assert [value["updates"] for value in again] == [value["updates"] for value in recorded]
    assert sum(value["counters"]["dropped"] for value in recorded) > 0, "somebody was late"
    assert [value["counters"] for value in again] == [value["counters"] for value in recorded]
    # Delays of another kind change nothing: the slowest are waited for where the trace says so.
    assert other[0]["digest"] == recorded[0]["digest"]


def test_a_replayed_run_has_the_number_of_contributors_that_was_chosen(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    case = ("step", "last", "followed", 16, STEPS, "auto")
    slow = {"HVD_BACKUP_TRACE": str(path), "HVD_BACKUP_DELAY": "rank=3,ms=30"}
    recorded = run_ranks(4, train, case, env=slow)
    again = run_ranks(4, train, case, env={"HVD_BACKUP_REPLAY": str(path)})
    assert {value["digest"] for value in (*recorded, *again)} == {recorded[0]["digest"]}
    assert again[0]["updates"] == recorded[0]["updates"]
    assert len({required for _, required in recorded[0]["updates"]}) > 1, "another N was chosen"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "trace.jsonl"
    run_ranks(3, train, ("step", "first", "followed"), env={"HVD_BACKUP_TRACE": str(path), "HVD_BACKUP_DELAY": DELAYS})
    return path


def failure(path: Path, size: int, *arguments: Any) -> str:
    with start_ranks(size, train, arguments, env={"HVD_BACKUP_REPLAY": str(path)}) as job:
        outcome = job.wait()
    assert all(rank.error for rank in outcome.ranks), "every rank says so"
    return str(outcome.ranks[size - 1].error)


def test_another_number_of_ranks(recording: Path) -> None:
    assert "recorded with 3 ranks, but this run has 2" in failure(recording, 2, "step", "first", "followed")


def test_another_model(recording: Path) -> None:
    told = failure(recording, 3, "step", "first", "followed", 8)
    assert "does not fit 'optimizer.0'" in told
    assert "given '2.weight (8, 3) float32', expected '2.weight (16, 3) float32'" in told


def test_a_round_of_another_length(recording: Path) -> None:
    told = failure(recording, 3, "step", "first", "followed", 16, STEPS + 20)
    assert "the round from step 0 on ends at step 30, in this run at step 40" in told


def test_a_trace_that_ends_early(recording: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    lines = recording.read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if json.loads(line).get("step") == 40)
    short.write_text("".join(lines[:last]))
    assert len(trace.read(short).channel().decisions) == 40
    assert "ends before step 40 of 'optimizer.0'" in failure(short, 3, "step", "first", "followed")


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    assert "is not a trace of hvd_backup" in failure(path, 2, "step", "first", "followed")
