"""The control layer under adversarial schedules: every invariant, after every event, in whatever order they come.

Hypothesis finds and shrinks (the failing plan and schedule are printed); the seeded runs are for volume. More of both:

    CONTROL_SCHEDULES=20 pytest tests/test_control_schedules.py      # 20 times as many, with other seeds
"""

import os
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import control_plans
from tests.control_programs import Plan
from tests.control_rank import Rank, Violation, check
from tests.control_world import World

TIMES = int(os.environ.get("CONTROL_SCHEDULES", "1"))
PLANS: dict[str, Callable[[Random], Plan]] = {
    "training": control_plans.training,
    "failing": control_plans.failing,
    "collectives": control_plans.collectives,
}


def run(plan: Plan, choices: list[int]) -> World:
    """Goes through the schedule, then brings everything to its end."""
    world = plan.world()
    try:
        for choice in choices:
            if not world.step(choice):
                break
        world.settle()
        world.check_end()
    except Violation as violation:
        raise AssertionError(report(plan, world, str(violation))) from violation
    return world


def report(plan: Plan, world: World, what: str) -> str:
    return "\n".join([what, str(plan), *world.log[-200:], what])


def random_choices(rng: Random) -> list[int]:
    return [rng.randrange(1 << 16) for _ in range(rng.choice([30, 100, 300, 2000]))]


@pytest.mark.parametrize("kind", PLANS)
@settings(max_examples=300 * TIMES)
@given(rng=st.randoms(use_true_random=False), choices=st.lists(st.integers(0, (1 << 16) - 1), max_size=400))
def test_every_schedule_keeps_the_invariants(kind: str, rng: Random, choices: list[int]) -> None:
    run(PLANS[kind](rng), choices)


@pytest.mark.parametrize(("kind", "schedules"), [("training", 500), ("failing", 1500), ("collectives", 500)])
def test_many_schedules_keep_the_invariants(kind: str, schedules: int) -> None:
    for seed in range(schedules * TIMES):
        rng = Random(seed)
        try:
            run(PLANS[kind](rng), random_choices(rng))
        except Exception as error:
            error.add_note(f"seed {seed}") if hasattr(error, "add_note") else print(f"seed {seed}")
            raise


def test_i4_a_rank_that_is_stopped_for_ever_costs_the_others_nothing() -> None:
    """Whenever it stops, also in the middle of its contribution: with some of its data sent, and some not."""
    stopped = amid = 0
    for seed in range(400 * TIMES):
        rng = Random(seed)
        plan = control_plans.without_one(rng)
        world = plan.world()
        for choice in random_choices(rng)[:600]:
            if not world.step(choice):
                break
        training = [rank for rank in world.ranks[1:] if not rank.left and is_training(rank, len(plan.specs))]
        if not training:
            continue
        victim = rng.choice(training)
        stopped += 1
        amid += any(line.reductions for line in victim.lines.values())
        for rank in world.ranks:
            world.stop(rank.rank, rank is victim, rng.randrange(1 << 16))
        try:
            world.settle(resume=False)
            for rank in world.ranks:
                check(rank.left or rank is victim, f"I4: rank {rank.rank} waits for rank {victim.rank}, seed {seed}")
            world.settle()
            world.check_end()
        except Violation as violation:
            raise AssertionError(report(plan, world, str(violation))) from violation
    assert stopped > 150 * TIMES
    assert amid > 20 * TIMES


def is_training(rank: Rank, channels: int) -> bool:
    """All its channels are open, and it has applied something in each."""
    return len(rank.lines) == channels and all(line.history for line in rank.lines.values())


def test_a_schedule_can_be_repeated() -> None:
    """Nothing but the choices decides what happens: what is printed of a failure is all that is needed."""
    plan = control_plans.training(Random(3))
    choices = random_choices(Random(4))
    assert run(plan, choices).log == run(plan, choices).log
