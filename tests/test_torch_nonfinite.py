"""nonfinite="drop" with real ranks: a gradient with NaN or Inf is in no sum, nobody waits for it, and it is counted.

Rank r sends 2^r, so that the sum names who is in it. One launch of four ranks runs all cases.
"""

import json
import math
import warnings
from typing import Any

import pytest
import torch
from hvd_backup._core_testing import HostDevice

import hvd_backup.torch as hvd
from hvd_backup import context
from tests.delayed_transfers import DelayedTransfers, HostLibrary, use
from tests.launch import run_ranks
from tests.torch_training import batch, digest, loss_of, make_model

SIZE = 4
STEPS = 12
ALL_SPOILED = 7  # the step in which all ranks send NaN or Inf
Spoils = dict[int, tuple[int, float]]  # by step: the rank that does, and what it sends
SPOILS: Spoils = {2: (3, math.nan), 3: (3, math.nan), 4: (0, math.inf), 5: (1, -math.inf), STEPS - 1: (2, math.nan)}

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "b=0": {},
    "b=1": {"backup_workers": 1},
    "buckets": {"scope": "bucket"},
    "carry": {"late": "carry"},
    "held": {"clips": True},
    "large": {"elements": 40_000},  # does not travel with the arrival, but through a collective
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "unfollowed": {"follows": False},
    "metrics": {"score": math.inf},  # is no gradient
}


class Powers(torch.nn.Module):
    """The gradient of `bits` is 2^rank in every element; that of `last` likewise."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = torch.nn.Parameter(torch.zeros(elements, dtype=dtype))
        self.last = torch.nn.Parameter(torch.zeros(3, dtype=dtype))

    def loss(self, rank: int, factor: float) -> torch.Tensor:
        return 2.0**rank * (self.bits.sum() + self.last[:2].sum() + self.last[2] * factor)


def spoils(step: int, rank: int) -> float:
    """What the rank's gradient is multiplied by in one element."""
    if step == ALL_SPOILED:
        return math.nan if rank % 2 else math.inf
    who, value = SPOILS.get(step, (-1, 1.0))
    return value if who == rank else 1.0


def train(case: Case) -> dict[str, Any]:
    options = dict(case)
    clips, follows, score = options.pop("clips", False), options.pop("follows", True), options.pop("score", None)
    dtype = options.pop("dtype", torch.float32)
    model = Powers(options.pop("elements", 5), dtype)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), nonfinite="drop", **options
    )
    rank = hvd.rank()
    seen: list[Any] = []
    told: list[Any] = []
    optimizer.on_update(
        lambda update: seen.append((update.step, update.by_scope, model.bits.grad[0].item(), model.last.grad.tolist())),
        when="before",
    )
    with warnings.catch_warnings(record=True) as caught:
        for step in hvd.follow(range(STEPS), optimizer) if follows else range(STEPS):
            optimizer.zero_grad()
            if score is not None:
                optimizer.metrics(score=score)
            model.loss(rank, spoils(step, rank)).backward()
            if clips:
                optimizer.synchronize()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
            told.append((step, optimizer.last_update.dropped))
        hvd.barrier()
    return {
        "warnings": [str(each.message) for each in caught],
        "seen": seen,
        "told": told,
        "counters": optimizer.counters(),
        "step": optimizer.global_step,
        "digest": digest(model.double()),
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    }


def momentum_and_schedule() -> dict[str, Any]:
    """A real model, one rank spoiled at times; a scheduler steps once for every update that there was."""
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), nonfinite="drop"
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    optimizer.register_scheduler(schedule)
    for step in hvd.follow(range(STEPS), optimizer):
        optimizer.zero_grad()
        (loss_of(model, batch(hvd.rank(), step)) * spoils(step, hvd.rank())).backward()
        optimizer.step()
    return {"digest": digest(model, optimizer), "rate": optimizer.param_groups[0]["lr"]}


def passed_on() -> bool:
    """Without the option, the default: NaN of one rank is NaN for all."""
    model = Powers(5, torch.float32)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    model.loss(hvd.rank(), math.nan if hvd.rank() == 1 else 1.0).backward()
    optimizer.step()
    return bool(model.last.isnan().any())


def all_cases(gpus: str) -> dict[str, Any]:
    """gpus: where stand-ins for them exchange data; empty: on the CPU."""
    hvd.init()
    torch.set_flush_denormal(True)  # what is small may not stand for what is not finite
    device = HostDevice(gpus, hvd.rank() + 1) if gpus else None
    if device is not None:  # rank 1 was built without the GPU library, which looks while it packs
        use(DelayedTransfers(device=device), library=None if hvd.rank() == 1 else HostLibrary)
    results: dict[str, Any] = {name: train(case) for name, case in CASES.items()}
    results["exchanges"] = 0 if device is None else device.exchanges
    results["model"] = momentum_and_schedule()
    results["passed on"] = passed_on()
    results["recorded"] = context.current().engine.recorded(10_000)
    return results


@pytest.fixture(scope="module", params=["on the CPU", "on GPUs"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank what each case gave; of rank 0 also what was recorded. No trace, so small buckets go with arrivals."""
    gpus = str(tmp_path_factory.mktemp("gpus")) if request.param == "on GPUs" else ""
    results: list[dict[str, Any]] = run_ranks(SIZE, all_cases, [gpus], env={"HVD_BACKUP_BUCKET_BYTES": "16"})
    assert all((of_rank["exchanges"] > 0) == bool(gpus) for of_rank in results)
    return results


def contributors(step: int) -> list[int]:
    return [rank for rank in range(SIZE) if math.isfinite(spoils(step, rank))]


each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_the_others_make_the_update_and_all_apply_it(name: str, outcomes: Any) -> None:
    values = [of_rank[name] for of_rank in outcomes]
    assert all(value["finite"] for value in values)
    assert len({value["digest"] for value in values}) == 1
    assert [value["step"] for value in values] == [STEPS] * SIZE, "a step without an update counts as one, too"
    backups = CASES[name].get("backup_workers", 0)
    for value in values:
        assert value["warnings"] == []
        if name == "buckets":
            continue
        assert [step for step, *_ in value["seen"]] == [step for step in range(STEPS) if step != ALL_SPOILED]
        for step, by_scope, bits, last in value["seen"]:
            (ranks,) = by_scope
            allowed = contributors(step)
            assert set(ranks) <= set(allowed)
            assert len(ranks) >= min(SIZE - backups, len(allowed))
            mean = sum(2.0**rank for rank in ranks) / len(ranks)
            tolerance = 0.01 if name == "bfloat16" else 1e-3
            assert all(abs(each - mean) <= tolerance * mean for each in (bits, *last)), f"{step}: {bits} of {ranks}"


def test_with_scope_bucket_only_the_bucket_is_left_out(outcomes: Any) -> None:
    for step, by_scope, bits, last in outcomes[0]["buckets"]["seen"]:
        left = len(contributors(step))
        assert sorted(map(len, by_scope)) == sorted([left, SIZE]), "the bucket of `last` alone holds NaN"
        assert bits == 15 / 4
        mean = sum(2.0**rank for rank in contributors(step)) / max(left, 1)
        assert last == pytest.approx([mean] * 3), "zero, when nobody has any"


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("b=1", "buckets")])
def test_every_drop_is_counted_and_told(name: str, outcomes: Any) -> None:
    for rank, of_rank in enumerate(outcomes):
        value = of_rank[name]
        lost = [step for step in range(STEPS) if not math.isfinite(spoils(step, rank))]
        assert [step for step, dropped in value["told"] if dropped] == lost
        assert value["counters"]["dropped"] == len(lost)
        assert value["counters"]["contributed"] == STEPS - len(lost)
        assert value["counters"]["caught_up"] == len(lost) - 1, "nothing is applied when all are spoiled"


def test_i7_every_drop_is_on_record_with_its_reason(outcomes: Any) -> None:
    lines = [json.loads(line) for line in outcomes[0]["recorded"].splitlines()]
    drops = [line for line in lines if line["event"] == "dropped" and line["channel"] == "optimizer.0"]
    assert {line["reason"] for line in drops} == {"non-finite"}
    spoiled = [(step, rank) for step in range(STEPS) for rank in range(SIZE) if not math.isfinite(spoils(step, rank))]
    assert sorted((line["step"], line["ranks"][0]) for line in drops) == spoiled


def test_a_scheduler_steps_once_for_each_update(outcomes: Any) -> None:
    values = [of_rank["model"] for of_rank in outcomes]
    assert len({value["digest"] for value in values}) == 1
    assert values[0]["rate"] == pytest.approx(0.1 * 0.9 ** (STEPS - 1))


def test_by_default_it_is_passed_on(outcomes: Any) -> None:
    assert all(of_rank["passed on"] for of_rank in outcomes)
