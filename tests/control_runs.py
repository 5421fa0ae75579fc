"""Runs of tests/control_world.py: a plan and a schedule, both from a seed; and a failing one made short.

python -m tests.control_runs [--schedules 1000000] [--first-seed 0] [--jobs 2]    (or: make simulate)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

from tqdm import tqdm

from tests import control_plans
from tests.control_programs import Plan
from tests.control_rank import Rank, Violation, check
from tests.control_world import Bug, World


def random_choices(rng: Random) -> list[int]:
    return [rng.randrange(1 << 16) for _ in range(rng.choice([30, 100, 300, 2000]))]


def run(plan: Plan, choices: list[int], bug: Bug | None = None) -> World:
    """Goes through the schedule, then brings everything to its end. AssertionError, with all that happened."""
    world = plan.world(bug)
    with reported(plan, world):
        go(world, choices)
        end(world)
    return world


def go(world: World, choices: list[int]) -> None:
    """The schedule, until nothing can happen any more."""
    for choice in choices:
        if not world.step(choice):
            return


def end(world: World) -> None:
    world.settle()
    world.check_end()


def run_with_one_stopped(plan: Plan, choices: list[int], bug: Bug | None = None) -> World | None:
    """Then stops a rank for ever, picked by the last choice: the others come to their end all the same (I4).

    Whenever it stops, also in the middle of its contribution, with some of its data sent, and some not. None: there is
    no rank to be stopped, besides the coordinator's.
    """
    world = plan.world(bug)
    with reported(plan, world):
        go(world, choices[:600])
        training = [rank for rank in world.ranks[1:] if not rank.left and is_training(rank, len(plan.specs))]
        if not training:
            return None
        victim = training[choices[-1] % len(training)]
        for rank in world.ranks:
            world.stop(rank.rank, rank is victim, choices[0])
        world.settle(resume=False)
        for rank in world.ranks:
            check(rank.left or rank is victim, f"I4: rank {rank.rank} waits for rank {victim.rank}")
        end(world)
    return world


def run_with_one_killed(plan: Plan, choices: list[int], bug: Bug | None = None) -> World | None:
    """A rank dies at any moment: what it has sent may have arrived or not, and it is some time before that is known.

    Everything comes to its end all the same, be it that a channel fails because too few are left.
    """
    world = plan.world(bug)
    if plan.size < 2:
        return None
    victim, dies_at = 1 + choices[0] % (plan.size - 1), choices[-1] % min(len(choices), 400)
    with reported(plan, world):
        go(world, choices[:dies_at])
        world.kill(victim, choices[dies_at])
        go(world, choices[dies_at:600])
        end(world)
    return world


def run_without_one(plan: Plan, choices: list[int], bug: Bug | None = None) -> World | None:
    """As run_with_one_killed, of a plan for which N ranks are enough: the others see it through (I4)."""
    world = run_with_one_killed(plan, choices, bug)
    with reported(plan, world or plan.world()):
        for rank in world.ranks if world else ():
            for line in rank.lines.values():
                check(not line.failure, f"I4: rank {rank.rank} fails: {line.failure}")
    return world


def is_training(rank: Rank, channels: int) -> bool:
    """All its channels are open, and it has applied something in each."""
    return len(rank.lines) == channels and all(line.history for line in rank.lines.values())


@contextmanager
def reported(plan: Plan, world: World) -> Iterator[None]:
    """What happened is added to a Violation; any other exception of a state machine counts as one."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, Violation) else f"{type(error).__name__}: {error}"
        raise AssertionError("\n".join([what, str(plan), world.text(), what])) from error


Run = Callable[[Plan, list[int], "Bug | None"], "World | None"]
KINDS: dict[str, tuple[Callable[[Random], Plan], Run]] = {
    "training": (control_plans.training, run),
    "behind": (control_plans.behind, run),
    "failing": (control_plans.failing, run),
    "collectives": (control_plans.collectives, run),
    "one stopped": (control_plans.without_one, run_with_one_stopped),
    "one killed": (control_plans.without_one, run_without_one),
    "killed in training": (control_plans.training, run_with_one_killed),
    "killed in collectives": (control_plans.collectives, run_with_one_killed),
}


def drawn(kind: str, seed: int) -> tuple[Plan, list[int]]:
    """A plan and a schedule; one in four with GPUs."""
    rng = Random(seed)
    plan, choices = KINDS[kind][0](rng), random_choices(rng)
    rng = Random(f"GPUs of {kind}, {seed}")  # one of its own: what is drawn above stays what it is without GPUs
    return (control_plans.on_gpus(rng, plan) if rng.randrange(4) == 0 else plan), choices


def run_seed(kind: str, seed: int, bug: Bug | None = None) -> None:
    """AssertionError, with the seed and a short schedule that fails in the same way, if an invariant is broken."""
    how = KINDS[kind][1]
    plan, choices = drawn(kind, seed)
    try:
        how(plan, choices, bug)
    except AssertionError as error:
        if bug is not None:
            raise
        short, last = shrink(plan, choices, how, error)
        raise AssertionError(
            f"{kind}, seed {seed}, {len(choices)} choices made {len(short)}: {short}\n{last}"
        ) from None


def shrink(plan: Plan, choices: list[int], how: Run, error: AssertionError) -> tuple[list[int], AssertionError]:
    """A schedule without what is not needed for it to fail: leaves out halves, quarters, ... and single choices."""
    piece = len(choices) // 2
    while piece > 0:
        at = 0
        while at < len(choices) > 1:
            shorter = choices[:at] + choices[at + piece :]
            try:
                how(plan, shorter or [0], None)
                at += piece
            except AssertionError as same:
                choices, error = shorter or [0], same
        piece //= 2
    return choices, error


def failure_of(seed: int) -> str:
    for kind in KINDS:
        try:
            run_seed(kind, seed)
        except AssertionError as error:
            return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, default=1_000_000, help="how many (default 1000000)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first of them (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + -(-args.schedules // len(KINDS)))
    failures = 0
    with multiprocessing.Pool(args.jobs) as pool:
        done = pool.imap_unordered(failure_of, seeds, chunksize=20)
        for failure in tqdm(done, total=len(seeds), unit_scale=len(KINDS), unit=" schedules", smoothing=0.01):
            if failure:
                failures += 1
                tqdm.write(failure)
    print(f"{len(seeds) * len(KINDS)} schedules, {failures} violate an invariant")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
