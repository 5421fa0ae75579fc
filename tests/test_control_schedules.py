"""The control layer under adversarial schedules: every invariant, after every event, in whatever order they come.

Hypothesis finds and shrinks (the failing plan and schedule are printed); the seeded runs are for volume, and `make
simulate` for more. That all this would notice: tests/test_control_bugs.py.
"""

import itertools
import multiprocessing
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import control_plans
from tests.control_runs import KINDS, drawn, failure_of, random_choices, run, run_with_one_stopped

SEEDS = 1250  # for each of the eight kinds


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(
    rng=st.randoms(use_true_random=False),
    choices=st.lists(st.integers(0, (1 << 16) - 1), min_size=1, max_size=400),
    gpus=st.sampled_from([False, False, True]),
)
def test_every_schedule_keeps_the_invariants(kind: str, rng: Random, choices: list[int], gpus: bool) -> None:
    plan_from, how = KINDS[kind]
    plan = plan_from(rng)
    how(control_plans.on_gpus(rng, plan) if gpus else plan, choices, None)


def test_many_schedules_keep_the_invariants() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for failure in pool.imap_unordered(failure_of, range(SEEDS), chunksize=50):
            assert not failure, failure


def test_i4_a_rank_is_stopped_in_the_middle_of_its_contribution_often_enough() -> None:
    """What the seeded runs above are worth."""
    replaced = ended_without = 0
    for seed in range(300):
        rng = Random(seed)
        world = run_with_one_stopped(control_plans.without_one(rng), random_choices(rng))
        events = [each["event"] for each in world.log if isinstance(each, dict) and "event" in each] if world else []
        replaced += "replaced" in events
        ended_without += "stopped" in events
    assert replaced > 10 and ended_without > 10


def test_groups_of_gpus_are_used_broken_up_and_replaced_often_enough() -> None:
    """Likewise."""
    used = begun_anew = replaced = 0
    for kind, seed in itertools.product(KINDS, range(100)):
        plan, choices = drawn(kind, seed)
        world = KINDS[kind][1](plan, choices, None) if plan.gpus is not None else None
        said = (
            [each for each in world.log if isinstance(each, dict) and each.get("message") == "Decision"]
            if world
            else []
        )
        served = {(body["channel"], body["step"], body["scope"]) for body in said if body["group"]}
        again = {(body["channel"], body["step"], body["scope"]) for body in said if body["attempt"] == 1}
        used += bool(served)
        begun_anew += bool(served & again)
        replaced += world is not None and world.groups_replaced()
    assert used > 40 and begun_anew > 20 and replaced > 2, (used, begun_anew, replaced)


def test_a_schedule_can_be_repeated() -> None:
    """Nothing but the choices decides what happens: what is printed of a failure is all that is needed."""
    plan = control_plans.training(Random(3))
    choices = random_choices(Random(4))
    assert run(plan, choices).log == run(plan, choices).log
