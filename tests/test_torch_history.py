"""The invariants I1 (one history), I2 (fresh) and I3 (first N), with real ranks that are late in turn."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import faults
from tests.launch import run_ranks, start_ranks
from tests.rank_main import mark
from tests.torch_training import batch, decisions, digest, loss_of, make_model

STEPS = 60
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
}


class Witness(torch.nn.Module):
    """A model whose gradients tell who computed them, and from which weights.

    The gradient of `who` is 1 at the contributor's rank, so the mean is 1/k at the k contributors; that of `base` is
    the number of updates that the contributor had applied when it computed the loss.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.model = make_model()
        self.who = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.base = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def loss(self, rank: int, step: int) -> torch.Tensor:
        return loss_of(self.model, batch(rank, step)) + self.who[rank].float() + self.base[0].float() * step


Case = tuple[str, str, str, str]
CASES: list[Case] = [
    ("sgd", "step", "first", "drop"),
    ("adam", "step", "last", "drop"),
    ("sgd", "bucket", "last", "drop"),
    ("adam", "bucket", "first", "carry"),
]


def train_through_delays(cases: list[Case]) -> list[dict[str, Any]]:
    """For each case one epoch in which every rank is late at times, some several steps in a row."""
    faults.inject(
        faults.Delay(rank="rotate:7", ms=12, p=0.7, seed=1),
        faults.Delay(rank="*", ms=4, p=0.3, distribution="exponential", seed=2),
    )
    hvd.init()
    return [train_one_case(*case) for case in cases]


def train_one_case(kind: str, scope: str, arrive: str, late: str) -> dict[str, Any]:
    rank, size = hvd.rank(), hvd.size()
    model = Witness(size)
    optimizer = hvd.DistributedOptimizer(
        OPTIMIZERS[kind](model.parameters()),
        model.named_parameters(),
        backup_workers=1,
        scope=scope,
        arrive=arrive,
        late=late,
    )
    updates: list[Any] = []

    def check(update: Any) -> None:
        updates.append((update.step, update.by_scope, update.samples))
        if late == "drop":
            contributors = model.who.grad.nonzero().flatten().tolist()
            assert len(contributors) >= size - 1
            share = torch.tensor(1 / len(contributors), dtype=torch.float64)
            assert torch.allclose(model.who.grad[contributors], share)
            assert abs(model.base.grad.item() - update.step) < 1e-9, f"update {update.step}: {model.base.grad}"
            if scope == "step":
                assert tuple(contributors) == update.contributors

    optimizer.on_update(check, when="before")
    for step in hvd.follow(range(STEPS), optimizer):
        assert step == optimizer.global_step
        optimizer.zero_grad()
        model.loss(rank, optimizer.global_step).backward()
        optimizer.step()
    return {
        "digest": digest(model, optimizer),
        "updates": updates,
        "counters": optimizer.counters(),
        "step": optimizer.global_step,
    }


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[dict[str, Any]]], Path]:
    """What each of four ranks saw in each case, and the trace: all cases in one program, which are its optimizers."""
    trace = tmp_path_factory.mktemp("histories") / "trace.jsonl"
    env = {"HVD_BACKUP_TRACE": str(trace), "HVD_BACKUP_BUCKET_BYTES": "256"}
    return run_ranks(4, train_through_delays, [CASES], env=env), trace


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_i1_one_history_under_rotating_delays(number: int, histories: Any) -> None:
    values = [of_rank[number] for of_rank in histories[0]]
    assert [value["step"] for value in values] == [STEPS] * 4
    assert len({value["digest"] for value in values}) == 1
    assert all(value["updates"] == values[0]["updates"] for value in values)
    assert [update[0] for update in values[0]["updates"]] == list(range(STEPS))
    assert all(value["counters"]["contributed"] > 0 for value in values)
    assert any(value["counters"]["dropped"] > 0 for value in values)
    for value in values:
        assert value["counters"]["contributed"] + value["counters"]["caught_up"] == STEPS


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_i2_i3_fresh_and_first_n_in_the_trace(number: int, histories: Any) -> None:
    made = decisions(histories[1], f"optimizer.{number}")
    scopes = {record["scope"] for record in made}
    assert len(scopes) > 2 if CASES[number][1] == "bucket" else scopes == {0}
    assert {(record["step"], record["scope"]) for record in made} == {(s, c) for s in range(STEPS) for c in scopes}
    for record in made:
        assert len(record["ranks"]) >= 3
        assert record["bases"] == [record["step"]] * len(record["ranks"])


def train_synchronously(batch_sizes: list[int], steps: int) -> dict[str, Any]:
    """Without backup workers, twice; the batch of each rank has a size of its own, which is its weight."""
    hvd.init()
    outcomes: dict[str, Any] = {}
    for kind in (*OPTIMIZERS, *OPTIMIZERS):
        model = make_model(dtype=torch.float64)
        optimizer = hvd.DistributedOptimizer(OPTIMIZERS[kind](model.parameters()), model.named_parameters())
        for step in range(steps):
            own = batch(hvd.rank(), step, batch_sizes[hvd.rank()], torch.float64)
            optimizer.samples = len(own[0])
            optimizer.zero_grad()
            loss_of(model, own).backward()
            optimizer.step()
            assert optimizer.last_update.contributors == tuple(range(hvd.size()))
            assert optimizer.last_update.samples == sum(batch_sizes)
        now = {"digest": digest(model, optimizer), "weights": [p.detach().clone() for p in model.parameters()]}
        assert now["digest"] == outcomes.setdefault(kind, now)["digest"], "a repeated run gave other bits"
    return outcomes


@pytest.mark.parametrize("batch_sizes", [[8], [8, 3], [8, 8, 5, 1]], ids=["1rank", "2ranks", "4ranks"])
def test_b0_is_training_on_the_union_batch(batch_sizes: list[int]) -> None:
    steps = 25
    values = run_ranks(len(batch_sizes), train_synchronously, [batch_sizes, steps])
    for kind, make_optimizer in OPTIMIZERS.items():
        assert len({value[kind]["digest"] for value in values}) == 1
        model = make_model(dtype=torch.float64)
        optimizer = make_optimizer(model.parameters())
        for step in range(steps):
            parts = [batch(rank, step, size, torch.float64) for rank, size in enumerate(batch_sizes)]
            optimizer.zero_grad()
            loss_of(model, (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))).backward()
            optimizer.step()
        for ours, single in zip(values[0][kind]["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(ours, single.detach(), rtol=0, atol=1e-12)


def train_with_a_stop(steps: int, stop_at: int) -> dict[str, Any]:
    hvd.init()
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), backup_workers=1, arrive="last"
    )
    contributed: list[bool] = []
    optimizer.on_update(lambda update: contributed.append(3 in update.contributors))
    times = []
    for _ in hvd.follow(range(steps), optimizer):
        began = time.monotonic()
        optimizer.zero_grad()
        loss = loss_of(model, batch(hvd.rank(), optimizer.global_step))
        if hvd.rank() == 3 and stop_at <= optimizer.global_step < stop_at + 60:
            stop_at = steps
            mark("computing")
            time.sleep(0.3)  # is stopped here
        time.sleep(0.01)
        loss.backward()
        optimizer.step()
        times.append(time.monotonic() - began)
    return {"digest": digest(model, optimizer), "times": times, "contributed": contributed}


def test_i4_a_rank_stopped_while_it_computes_costs_the_others_nothing() -> None:
    with start_ranks(4, train_with_a_stop, [400, 30]) as job:
        job.wait_for_mark(3, "computing")
        job.stop(3)
        time.sleep(2.0)
        job.resume(3)
        values = job.wait().values()
    assert len({value["digest"] for value in values}) == 1
    contributed = values[0]["contributed"]
    missed = contributed.index(False, 30)
    back = contributed.index(True, missed + 20)
    assert back - missed > 50, "the others did not go on without it"
    assert sum(contributed[back:]) > (len(contributed) - back) / 8, "it came back, but hardly took part"
    assert max(max(value["times"][1:]) for value in values[:3]) < 1.0  # of a stop of 2 s, on a machine that is shared
