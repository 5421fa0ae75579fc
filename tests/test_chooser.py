"""backup_workers="auto": N follows from computing times and gradient noise, in virtual time."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from hvd_backup import _core_testing as core
from hvd_backup.planning import plan

RANKS = 6
US = 1e6


class Run:
    """A training in virtual time: steps of the forecast's model, one by one, told to the chooser as they happen."""

    def __init__(self, least: int, noise_scale: float, seconds: Callable[[int, int], float]) -> None:
        self.chooser = core.RequiredChooser(RANKS, least)
        self.noise_scale = noise_scale
        self.seconds = seconds
        self.reasons: list[str] = []

    def steps(self, begin: int, end: int) -> list[float]:
        """How long each step takes, and what each is worth; ranks that are late carry their work over."""
        progress = []
        for step in range(begin, end):
            took = [self.seconds(step, rank) for rank in range(RANKS)]
            required = self.chooser.required
            for rank, seconds in enumerate(took):
                self.chooser.computed(rank, step, round(seconds * US))
            self.chooser.finished(1000)
            # |G|^2 = 1, S = the noise scale: E|g_i|^2 = 1 + S and E|mean|^2 = 1 + S / k
            noise = self.noise_scale
            self.chooser.measured(required * (1 + noise), 1 + noise / required, [1.0] * required)
            progress.append(sorted(took)[required - 1])
            if reason := self.chooser.look(step + 1, [0] * RANKS):
                self.reasons.append(reason)
        return progress


def one_slow(step: int, rank: int) -> float:
    return 0.2 if rank == 3 else 0.05


def test_it_begins_with_all_ranks_and_leaves_out_the_slow_one() -> None:
    run = Run(3, 20.0, one_slow)
    assert run.chooser.required == RANKS
    run.steps(0, 40)
    assert run.chooser.required == RANKS - 1
    (reason,) = run.reasons
    assert "waits for 5 of 6 ranks instead of 6: 51.0 ms per update instead of 201.0 ms" in reason
    assert "gradient noise scale 20 batches of a rank" in reason


def test_without_stragglers_everybody_is_waited_for() -> None:
    generator = np.random.default_rng(1)
    times = generator.normal(0.05, 0.0005, size=(300, RANKS))
    run = Run(1, 100.0, lambda step, rank: float(times[step, rank]))
    run.steps(0, 300)
    assert (run.chooser.required, run.reasons) == (RANKS, [])


def test_it_comes_back_when_the_slow_rank_is_on_time_again() -> None:
    run = Run(3, 1e6, lambda step, rank: one_slow(step, rank) if step < 100 else 0.05)
    run.steps(0, 100)
    assert run.chooser.required == RANKS - 1
    run.steps(100, 300)
    assert run.chooser.required == RANKS
    assert len(run.reasons) == 2


def test_it_follows_delays_that_change() -> None:
    def seconds(step: int, rank: int) -> float:
        slow = (4, 5) if step >= 150 else (1,)
        return 0.3 if rank in slow else 0.05

    run = Run(3, 50.0, seconds)
    run.steps(0, 150)
    assert run.chooser.required == RANKS - 1
    run.steps(150, 300)
    assert run.chooser.required == RANKS - 2


def test_min_contributors_is_kept() -> None:
    run = Run(5, 0.0, lambda step, rank: 0.05 * (1 + rank))
    run.steps(0, 100)
    assert run.chooser.required == 5


def test_noise_decides() -> None:
    """A batch twice as large in 1.4 times the time: worth it for noisy gradients, not for others."""

    def seconds(step: int, rank: int) -> float:
        return 0.05 if rank < 3 else 0.07

    quiet, loud = Run(3, 0.1, seconds), Run(3, 1000.0, seconds)
    for run in (quiet, loud):
        run.steps(0, 100)
    assert quiet.chooser.required == 3
    assert loud.chooser.required == RANKS


def test_it_does_not_follow_noise_in_the_times() -> None:
    """Where several N are about as good, it settles."""
    times = np.random.default_rng(2).lognormal(math.log(0.05), 0.3, size=(2000, RANKS))
    run = Run(1, 10.0, lambda step, rank: float(times[step, rank]))
    run.steps(0, 2000)
    assert len(run.reasons) < 40
    fixed = plan(times, tail_s=0.001, noise_scale=10.0, resampled=0)
    chosen = fixed.choices[RANKS - run.chooser.required]
    assert chosen.speedup > 0.95 * fixed.best.speedup


def test_the_noise_scale_is_that_of_the_plan() -> None:
    chooser = core.RequiredChooser(3, 1)
    assert chooser.noise_scale is None
    generator = np.random.default_rng(5)
    weights = [1.0, 2.0, 4.0]
    for _ in range(2000):
        gradients = 0.1 + generator.normal(size=(3, 100)) * np.sqrt(0.36 / np.array(weights))[:, None]
        mean = np.array(weights) @ gradients / 7
        chooser.measured(float(np.sum(gradients**2)), float(np.sum(mean**2)), weights)
    assert chooser.noise_scale == pytest.approx(36 / 1 / (7 / 3), rel=0.25)


def test_a_rank_that_is_stuck_is_not_waited_for_again() -> None:
    """It was slow and is left out; then nothing is heard of it, until long after the last time that is known."""
    chooser = core.RequiredChooser(3, 2)
    for step in range(200):
        stuck = step >= 32
        for rank in range(2 if stuck else 3):
            chooser.computed(rank, step, 200_000 if rank == 2 else 50_000)
        chooser.look(step + 1, [0, 0, 50_000 * (step - 31) if stuck else 0])
        assert chooser.required == (3 if step + 1 < 8 else 2)
