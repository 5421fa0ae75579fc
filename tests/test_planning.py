"""Choosing b: planted distributions are recovered, late work is carried over, noise decides what an update is worth."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from hvd_backup.arrivals import Noise
from hvd_backup.errors import UsageError
from hvd_backup.planning import noise_scale_of, plan

RANKS = 100
STEPS = 20_000


def best_of(took: NDArray[np.float64]) -> int:
    made = plan(took, carry_over=False, noise_scale=math.inf, resampled=0, min_contributors=RANKS // 2)
    return made.best.backup_workers


@pytest.mark.parametrize(("shift", "best"), [(1, 31), (5, 12), (10, 7), (15, 5), (20, 4), (30, 2)])
def test_shifted_exponential_arrivals(shift: int, best: int) -> None:
    """Xu et al. 2020: arrivals are a constant plus an exponential time, here of mean 1; an update is worth N."""
    took = shift + np.random.default_rng(shift).exponential(size=(STEPS, RANKS))
    assert abs(best_of(took) - best) <= 1


@pytest.mark.parametrize(("sigma", "best"), [(0.05, 1), (0.1, 4), (0.15, 7), (0.2, 10), (0.3, 16), (0.5, 30)])
def test_lognormal_arrivals(sigma: float, best: int) -> None:
    took = np.random.default_rng(7).lognormal(0.0, sigma, size=(STEPS, RANKS))
    assert abs(best_of(took) - best) <= 1


def test_independent_steps_take_the_mean_of_the_nth_arrival() -> None:
    took = np.random.default_rng(1).exponential(size=(500, 6))
    made = plan(took, tail_s=0.25, carry_over=False, resampled=0)
    for choice in made.choices:
        expected = np.mean(np.sort(took, axis=1)[:, choice.required - 1]) + 0.25
        assert choice.update_s == pytest.approx(expected, rel=1e-6)


def test_a_rank_that_is_always_slow_costs_nothing_with_one_backup() -> None:
    took = np.full((200, 4), 0.02)
    took[:, 3] = 0.2
    made = plan(took, tail_s=0.001, noise_scale=1.0)
    assert made.choices[0].update_s == pytest.approx(0.201, rel=0.01)
    assert made.choices[1].update_s == pytest.approx(0.021, rel=0.01)
    assert made.best.backup_workers == 1
    assert made.confidence == 1.0
    assert made.best.contributed[3] < 0.15, "it is late for most updates"
    low, high = made.best.interval
    assert low <= made.best.speedup <= high


def test_late_work_is_carried_over_into_the_next_steps() -> None:
    """Each rank is slow at every fourth step, in turn. Without carrying over, one backup would make all steps fast."""
    took = np.full((400, 4), 1.0)
    for step in range(400):
        took[step, step % 4] = 3.5
    independent = plan(took, carry_over=False, resampled=0).choices[1].update_s
    carried = plan(took, resampled=0).choices[1].update_s
    assert independent == pytest.approx(1.0)
    assert carried > 1.2, "while a slow rank ends its old step, the next one is slow, too"


def test_without_stragglers_nobody_is_left_out() -> None:
    took = np.random.default_rng(3).normal(1.0, 0.001, size=(300, 8))
    made = plan(took, noise_scale=math.inf)
    assert made.best.backup_workers == 0
    assert "b = 0" in str(made)


def test_noise_decides_what_an_update_is_worth() -> None:
    """At no noise the batch does not matter: fewer contributors are as good. At infinite noise half of them is half."""
    took = np.random.default_rng(4).exponential(size=(400, 8)) + 3.0
    quiet, loud = (plan(took, noise_scale=scale, resampled=0) for scale in (0.0, math.inf))
    assert quiet.best.backup_workers > loud.best.backup_workers
    assert [choice.updates for choice in quiet.choices] == [1.0] * 8
    assert loud.choices[4].updates == pytest.approx(2.0)
    between = plan(took, noise_scale=8.0, resampled=0).choices[4].updates
    assert between == pytest.approx((1 + 8 / 4) / (1 + 8 / 8))


def test_the_noise_scale_is_recovered_from_squared_norms() -> None:
    """Gradients of mean (|G|^2 = 4) with noise of variance S = 36 in all per sample, over batches of unequal size."""
    generator = np.random.default_rng(5)
    elements, weights = 400, np.array([1.0, 2.0, 4.0])
    mean = np.full(elements, math.sqrt(4 / elements))
    noise = []
    for _ in range(400):
        gradients = mean + generator.normal(size=(3, elements)) * np.sqrt(36 / elements / weights)[:, None]
        together = weights @ gradients / weights.sum()
        squares = float(np.sum(gradients**2)), float(np.sum(together**2))
        noise.append(Noise(3, *squares, tuple(weights)))
    per_sample = 36 / 4
    assert noise_scale_of(noise) == pytest.approx(per_sample / weights.mean(), rel=0.1)


def test_the_noise_scale_of_nothing() -> None:
    assert noise_scale_of([]) is None
    assert noise_scale_of([Noise(1, 2.0, 2.0, (1.0,))]) is None, "one contribution says nothing about noise"
    assert noise_scale_of([Noise(2, 4.0, 1.0, (1.0, 1.0))]) == math.inf, "two opposite gradients: noise alone"


def test_gaps_are_filled_and_unknown_ranks_are_refused() -> None:
    took = np.full((40, 3), 1.0)
    took[0] = np.nan
    took[1:30, 2] = np.nan
    assert plan(took).choices[0].update_s == pytest.approx(1.0)
    took[:, 2] = np.nan
    with pytest.raises(UsageError, match="rank 2 computes"):
        plan(took)


@pytest.mark.parametrize("options", [{"noise_scale": -1.0}, {"noise_scale": math.nan}, {"min_contributors": 4}])
def test_what_cannot_be_planned_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected"):
        plan(np.ones((10, 3)), **options)  # type: ignore[arg-type]
