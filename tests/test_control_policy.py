"""The rules of csrc/control/policy.h, rounds.h and csrc/engine/idle.h: what each says at its boundaries."""

import pytest
from hvd_backup._core_testing import (
    Expecting,
    ReentryBudget,
    Rounds,
    close_decision,
    is_on_time,
    nap_us,
    needed_arrivals,
    resume_now,
)
from hypothesis import given
from hypothesis import strategies as st

counts = st.integers(0, 100)


@pytest.mark.parametrize(
    ("required", "arrived", "able", "needed"),
    [
        (3, 0, 4, 3),  # N
        (3, 2, 1, 3),
        (3, 1, 1, 2),  # capped by who still can
        (3, 0, 1, 1),
        (3, 0, 0, 1),  # never without anybody
        (1, 0, 4, 1),
        (4, 4, 0, 4),
    ],
)
def test_needed_arrivals(required: int, arrived: int, able: int, needed: int) -> None:
    assert needed_arrivals(required, arrived, able) == needed


@given(st.integers(1, 100), counts, counts)
def test_needed_arrivals_can_be_reached_if_anybody_can_come(required: int, arrived: int, able: int) -> None:
    needed = needed_arrivals(required, arrived, able)
    assert 1 <= needed <= max(1, required)
    assert needed <= max(1, arrived + able)


def test_a_decision_waits_for_the_nth_arrival() -> None:
    verdict = close_decision(required=3, arrived=2, able=2)
    assert not verdict.yes
    assert verdict.look_again is None
    assert verdict.reason == "2 of 3 have arrived"


def test_a_decision_closes_with_the_nth_arrival() -> None:
    verdict = close_decision(required=3, arrived=3, able=1, now=50, nth_arrival=50)
    assert verdict.yes
    assert verdict.reason == "3 needed have arrived"


def test_nobody_is_no_decision() -> None:
    assert not close_decision(required=3, arrived=0, able=0).yes


@pytest.mark.parametrize("now", [100, 101, 149])
def test_within_the_grace_time_it_waits(now: int) -> None:
    verdict = close_decision(required=2, arrived=2, able=1, now=now, grace_us=50, nth_arrival=100)
    assert (verdict.yes, verdict.look_again) == (False, 150)
    assert verdict.reason == "the grace time runs"


@pytest.mark.parametrize("now", [150, 151])
def test_the_grace_time_ends(now: int) -> None:
    assert close_decision(required=2, arrived=2, able=1, now=now, grace_us=50, nth_arrival=100).yes


def test_all_that_can_have_arrived_need_no_grace_time() -> None:
    verdict = close_decision(required=2, arrived=3, able=0, now=101, grace_us=50, nth_arrival=100)
    assert verdict.yes
    assert verdict.reason == "all that can have arrived"


def test_a_rank_that_is_owed_its_turn_is_waited_for_without_limit() -> None:
    verdict = close_decision(required=2, arrived=2, able=1, owed=True, now=10**9, nth_arrival=100)
    assert (verdict.yes, verdict.look_again) == (False, None)
    assert "max_misses" in verdict.reason


def test_re_entry_is_a_grace_time_of_its_own() -> None:
    waits = close_decision(required=2, arrived=2, able=1, now=129, grace_us=10, reentry_us=30, nth_arrival=100)
    assert (waits.yes, waits.look_again) == (False, 130)
    assert waits.reason == "a rank that has caught up comes back"
    assert close_decision(required=2, arrived=2, able=1, now=130, grace_us=10, reentry_us=30, nth_arrival=100).yes
    assert (
        "grace"
        in close_decision(required=2, arrived=2, able=1, now=105, grace_us=30, reentry_us=10, nth_arrival=100).reason
    )


def test_a_re_entry_is_waited_for_once_it_has_been_saved_up() -> None:
    budget, typical, handicap = ReentryBudget(), 6400, 100
    cost = handicap + typical // 32  # 300: two steps' savings
    budget.step_decided(typical)
    assert budget.wait_us(handicap, typical) == 0
    budget.step_decided(typical)
    assert budget.wait_us(handicap, typical) == cost
    budget.spend(101)
    assert budget.wait_us(handicap, typical) == 0


@given(st.integers(1, 10**7), st.lists(st.integers(0, 10**7), min_size=1, max_size=500))
def test_all_waits_for_re_entries_cost_little(typical: int, handicaps: list[int]) -> None:
    """However often there is somebody to wait for: 1/32 of the time at most, and one step's time at once."""
    budget = ReentryBudget()
    waited = 0
    for steps, handicap in enumerate(handicaps):
        wait = budget.wait_us(handicap, typical)
        assert wait <= typical
        budget.spend(wait)
        waited += wait
        assert waited <= steps * typical / 32
        budget.step_decided(typical)


def test_who_is_on_time_may_scatter_a_little() -> None:
    assert is_on_time(800, 800) and is_on_time(900, 800) and not is_on_time(901, 800)


@pytest.mark.parametrize(
    ("elapsed", "yes", "reason"),
    [
        (0, True, "the open step is young"),
        (250, True, "the open step is young"),
        (251, False, "waiting for the next step"),
        (1249, False, "waiting for the next step"),
        (1250, True, "the open step is overdue"),
    ],
)
def test_a_rank_that_has_caught_up_starts_when_it_makes_sense(elapsed: int, yes: bool, reason: str) -> None:
    verdict = resume_now(now=5000 + elapsed, opened=5000, typical_us=1000)
    assert (verdict.yes, verdict.reason) == (yes, reason)
    assert verdict.look_again == (None if yes else 5000 + 1250)


def test_a_rank_that_is_needed_starts_at_once() -> None:
    assert resume_now(now=5600, opened=5000, typical_us=1000, needed=True).reason == "this rank is needed"


def test_before_a_step_has_been_timed_a_rank_starts_at_once() -> None:
    assert resume_now(now=10**9, opened=0, typical_us=0).reason == "no step has been timed yet"


LONGEST = {Expecting.transfer: 50, Expecting.message: 200, Expecting.nothing: 2500}


@given(st.integers(0, 10**7), st.sampled_from(list(LONGEST)), st.integers(0, 1000))
def test_naps_delay_by_two_percent_of_the_idle_time(idle_us: int, expecting: Expecting, spins_us: int) -> None:
    nap = nap_us(idle_us, expecting, spins_us)
    if idle_us < spins_us:
        assert nap == 0
    else:
        assert 50 <= nap <= max(50, idle_us // 50)
        assert nap <= LONGEST[expecting]
    assert nap_us(idle_us + 1, expecting, spins_us) >= nap


@pytest.mark.parametrize(("expecting", "longest"), LONGEST.items())
def test_the_longest_nap(expecting: Expecting, longest: int) -> None:
    assert nap_us(50 * longest, expecting, 200) == nap_us(10**9, expecting, 200) == longest
    assert longest == 50 or nap_us(50 * longest - 1, expecting, 200) == longest - 1


# --- rounds -------------------------------------------------------------------------------------------------------


def begun(lengths: list[int | None]) -> Rounds:
    rounds = Rounds(len(lengths))
    for rank, length in enumerate(lengths):
        if length is not None:
            rounds.begin(rank, length)
    return rounds


NOBODY = [False, False, False]


def test_a_round_that_is_not_followed_has_no_planned_end() -> None:
    assert Rounds(3).planned_end(NOBODY) is None
    assert not Rounds(3).followed


@pytest.mark.parametrize(
    ("lengths", "gone", "end"),
    [
        ([5, 3, 4], NOBODY, 5),  # the longest
        ([5, None, 4], NOBODY, None),  # before the first round of a rank, nothing is known of it
        ([5, -1, 4], NOBODY, None),  # one of unknown length
        ([5, -1, 4], [False, True, False], 5),  # it has gone
        ([5, 3, 4], [True, False, False], 4),
        ([5, None, 4], [False, True, False], 5),
        ([0, 0, 0], NOBODY, 0),
    ],
)
def test_the_planned_end_is_that_of_the_longest(lengths: list[int | None], gone: list[bool], end: int | None) -> None:
    assert begun(lengths).planned_end(gone) == end


def test_rounds_follow_each_other() -> None:
    rounds = begun([5, 5, 5])
    rounds.close(5)
    assert (rounds.current, rounds.start, rounds.followed) == (1, 5, False)
    assert (rounds.is_over(0), rounds.is_over(1), rounds.end_of(0)) == (True, False, 5)
    assert rounds.planned_end(NOBODY) is None
    rounds.begin(1, 3)
    assert rounds.planned_end(NOBODY) == 10, "the others count with their lengths in the round before"
    rounds.begin(0, 3)
    rounds.begin(2, 3)
    assert rounds.planned_end(NOBODY) == 8
    rounds.begin(2, 7)
    assert rounds.planned_end(NOBODY) == 12, "a longer length that is told late"


def test_an_end_that_was_fixed_counts_whatever_the_lengths_say() -> None:
    rounds = begun([5, 5, 5])
    rounds.fix_end(2)
    assert rounds.planned_end(NOBODY) == 2
    rounds.close(2)
    assert rounds.planned_end(NOBODY) is None


def test_who_has_begun_the_round() -> None:
    rounds = begun([5, None, 5])
    assert [rounds.has_begun(rank) for rank in range(3)] == [True, False, True]
    rounds.close(5)
    assert not rounds.has_begun(0)
