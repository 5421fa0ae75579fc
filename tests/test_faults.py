"""Artificial delays: the grammar, who is late when, determinism, and the means of the distributions."""

import itertools
import math
import statistics
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup import faults
from hvd_backup.errors import ConfigError
from hvd_backup.faults import Delay, Injection

DISTRIBUTIONS = ("constant", "exponential", "lognormal", "pareto")
PLACES = {"rank": st.integers(0, 15), "step": st.integers(0, 10**9), "size": st.just(16)}


@pytest.fixture(autouse=True)
def _nobody_stays_late() -> Iterator[None]:
    yield
    faults.clear()


def late_ranks(delay: Delay, step: int, size: int = 4) -> list[int]:
    return [rank for rank in range(size) if delay.ms_at(rank, step, size) > 0]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(3, [3]), ("3", [3]), ("1-2", [1, 2]), ("0,2-3", [0, 2, 3]), ("*", [0, 1, 2, 3]), ("7", [])],
)
def test_ranks(rank: int | str, expected: list[int]) -> None:
    assert late_ranks(Delay(rank=rank, ms=1), step=5) == expected


def test_delays_of_ranks_that_do_not_exist_are_found() -> None:
    delays = [Delay(rank=4, ms=1), Delay(rank="rotate:2", ms=1), Delay(rank="3-9", ms=1)]
    assert Injection(tuple(delays)).without_effect(size=4) == delays[:1]


def test_rotating_stragglers() -> None:
    delay = Delay(rank="rotate:3", ms=1)
    assert [late_ranks(delay, step) for step in range(0, 15, 3)] == [[0], [1], [2], [3], [0]]
    assert late_ranks(delay, 2) == [0]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, list(range(12))),
        (4, [4]),
        ("2-4", [2, 3, 4]),
        ("1,10-11", [1, 10, 11]),
        ("every:5", [0, 5, 10]),
        (range(3, 5), [3, 4]),
        ([7], [7]),
    ],
)
def test_steps(steps: object, expected: list[int]) -> None:
    delay = Delay(rank=0, ms=1, steps=steps)  # type: ignore[arg-type]
    assert [step for step in range(12) if delay.ms_at(0, step, 1) > 0] == expected


def test_the_environments_grammar() -> None:
    text = "rank=3,ms=200,p=0.3; rank=rotate:5, ms=50, steps=10,30,distribution=pareto ;rank=0-1,2,ms=1,seed=9;"
    assert faults.parse(text) == (
        Delay(rank="3", ms=200, p=0.3, seed=0),
        Delay(rank="rotate:5", ms=50, steps="10,30", distribution="pareto", seed=1),
        Delay(rank="0-1,2", ms=1, seed=9),
    )
    assert faults.parse("") == ()


@pytest.mark.parametrize(
    "text",
    [
        "rank=3",
        "ms=3",
        "3,200",
        "rank=3,ms=200,p",
        "rank=3,ms=200,sm=3",
        "rank=3,ms=200,ms=100",
        "rank=3,ms=fast",
        "rank=3,ms=-1",
        "rank=3,ms=nan",
        "rank=3,ms=1,p=1.5",
        "rank=-1,ms=1",
        "rank=3-1,ms=1",
        "rank=rotate:0,ms=1",
        "rank=every:2,ms=1",
        "rank=,ms=1",
        "rank=3,ms=1,steps=10-",
        "rank=3,ms=1,steps=every:x",
        "rank=3,ms=1,distribution=normal",
        "rank=3,ms=1,seed=1.5",
    ],
)
def test_a_bad_specification_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        faults.parse(text)
    assert faults.GRAMMAR in str(caught.value)


@given(text=st.text(alphabet="rankmsp=,;0123456789.-*:eoty ", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        delays = faults.parse(text)
    except ConfigError:
        return
    assert all(delay.ms_at(0, 0, 4) >= 0 for delay in delays)


@given(
    ms=st.floats(0, 1e6), p=st.floats(0, 1), distribution=st.sampled_from(DISTRIBUTIONS), seed=st.integers(), **PLACES
)
def test_a_delay_depends_on_seed_rank_and_step_alone(
    ms: float, p: float, distribution: str, seed: int, rank: int, step: int, size: int
) -> None:
    delay = Delay("*", ms, p, None, distribution, seed)
    first = delay.ms_at(rank, step, size)
    delay.ms_at((rank + 1) % size, step + 1, size)
    assert delay.ms_at(rank, step, size) == first
    assert math.isfinite(first)
    assert first >= 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_of_every_distribution_is_ms(distribution: str) -> None:
    delay = Delay("*", ms=40, distribution=distribution)
    drawn = [delay.ms_at(rank, step, 4) for rank, step in itertools.product(range(4), range(10_000))]
    # Standard deviations over the mean: 0, 1, 1.31, 0.89; four standard errors of 40,000 draws are below 3 %.
    assert statistics.fmean(drawn) == pytest.approx(40, rel=0.03)
    assert min(drawn) >= (24 if distribution == "pareto" else 0)
    assert distribution == "constant" or len(set(drawn)) == len(drawn)


def test_the_spread_of_the_distributions_is_the_documented_one() -> None:
    def percentile99(distribution: str) -> float:
        delay = Delay(0, ms=1, distribution=distribution)
        return statistics.quantiles((delay.ms_at(0, step, 1) for step in range(40_000)), n=100)[98]

    assert percentile99("exponential") == pytest.approx(math.log(100), rel=0.05)
    assert percentile99("lognormal") == pytest.approx(6.2, rel=0.07)
    assert percentile99("pareto") == pytest.approx(3.8, rel=0.07)


def test_probability_is_the_share_of_late_steps() -> None:
    delay = Delay(0, ms=10, p=0.3)
    assert statistics.fmean(delay.ms_at(0, step, 1) > 0 for step in range(20_000)) == pytest.approx(0.3, abs=0.015)
    assert not any(Delay(0, ms=10, p=0.0).ms_at(0, step, 1) for step in range(100))


def test_ranks_and_steps_draw_different_numbers() -> None:
    delay = Delay("*", ms=1, distribution="exponential")
    drawn = {delay.ms_at(rank, step, 8) for rank in range(8) for step in range(100)}
    assert len(drawn) == 800
    other = Delay("*", ms=1, distribution="exponential", seed=1)
    assert other.ms_at(0, 0, 8) not in drawn


def test_delays_add_up() -> None:
    both = Injection((Delay(1, ms=5), Delay("*", ms=2)))
    assert [both.delay_ms(rank, 0, 2) for rank in range(2)] == [2, 7]


def test_injected_delays_sleep() -> None:
    assert faults.injected() == Injection()
    faults.inject(Delay(1, ms=30, steps=2))
    assert (faults.delay_ms(1, 2, 4), faults.delay_ms(0, 2, 4), faults.delay_ms(1, 3, 4)) == (30, 0, 0)
    start = time.perf_counter()
    faults.injected().sleep(1, 2, 4)
    assert time.perf_counter() - start >= 0.03
    faults.clear()
    assert faults.delay_ms(1, 2, 4) == 0
