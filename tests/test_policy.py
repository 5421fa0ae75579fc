"""Policies: from options and the number of ranks to N and the rest of the rules."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup.config import Config
from hvd_backup.errors import ConfigError
from hvd_backup.policy import Policy, journal_depth

SIZES = st.integers(1, 2000)


def test_without_options_every_rank_is_required() -> None:
    policy = Policy.resolve(Config(), 4)
    assert (policy.required, policy.backup_workers, policy.scope, policy.late) == (4, 0, "step", "drop")


@given(size=SIZES, data=st.data())
def test_a_count_leaves_n_minus_b(size: int, data: st.DataObject) -> None:
    backup_workers = data.draw(st.integers(0, size - 1))
    assert Policy.resolve(Config(), size, backup_workers=backup_workers).required == size - backup_workers


@given(size=SIZES, over=st.integers(0, 5))
def test_somebody_must_be_waited_for(size: int, over: int) -> None:
    with pytest.raises(ConfigError, match=f"backup_workers={size + over}"):
        Policy.resolve(Config(), size, backup_workers=size + over)


@given(size=SIZES, percent=st.integers(1, 99))
def test_a_fraction_is_rounded_down_exactly(size: int, percent: int) -> None:
    policy = Policy.resolve(Config(), size, backup_workers=percent / 100)
    assert policy.backup_workers == Fraction(percent, 100) * size // 1


@given(size=SIZES, fraction=st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_any_fraction_leaves_somebody_to_wait_for(size: int, fraction: float) -> None:
    policy = Policy.resolve(Config(), size, backup_workers=fraction)
    assert 1 <= policy.required <= size
    assert policy.required + policy.backup_workers == size


@pytest.mark.parametrize("value", [-1, True, False, float("nan"), 0.0, 1.0, 1.5, -0.25, "many", [1], "1e400"])
def test_what_is_no_number_of_backup_workers_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="backup_workers="):
        Policy.resolve(Config(), 4, backup_workers=value)


@given(size=SIZES, data=st.data())
def test_auto_waits_for_half_of_the_ranks_at_least_or_as_many_as_are_asked_for(size: int, data: st.DataObject) -> None:
    policy = Policy.resolve(Config(), size, backup_workers="auto")
    assert policy.automatic and policy.required == (size + 1) // 2
    least = data.draw(st.integers(1, size))
    by_name = Policy.resolve(Config(), size, policy="auto", min_contributors=least)
    assert by_name.automatic and by_name.required == least
    with pytest.raises(ConfigError, match=f"at most {size}"):
        Policy.resolve(Config(), size, backup_workers="auto", min_contributors=size + 1)


def test_auto_by_name_contradicts_a_number() -> None:
    with pytest.raises(ConfigError, match='policy="auto" chooses'):
        Policy.resolve(Config(), 4, policy="auto", backup_workers=1)


def test_numpy_numbers_are_numbers() -> None:
    assert Policy.resolve(Config(), 4, backup_workers=np.int64(1)).required == 3
    assert Policy.resolve(Config(), 4, backup_workers=np.float32(0.5), grace=np.float32(0.25)).required == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grace": -1.0}, "grace=-1.0: expected a number of seconds"),
        ({"grace": True}, "grace=True"),
        ({"max_misses": -1}, "max_misses=-1"),
        ({"max_misses": 1.0}, "max_misses=1.0"),
        ({"max_staleness": 2}, "max_staleness=2: expected 0"),
        ({"late": "later"}, "late='later'"),
        ({"max_lag": 0}, "max_lag=0"),
        ({"on_max_lag": "skip"}, 'expected "resync" or "wait"'),
        ({"scope": "layer"}, "scope='layer'"),
        ({"arrive": ""}, "arrive=''"),
        ({"nonfinite": "skip"}, "nonfinite='skip': expected"),
        ({"nonfinite": "drop", "arrive": "first"}, 'leave arrive out, or give arrive="last"'),
        ({"policy": "asynchronous"}, "not there yet; those that exist: synchronous, backup"),
        ({"policy": "backup"}, "needs backup_workers"),
        ({"policy": "synchronous", "backup_workers": 1}, "waits for all ranks, but backup_workers=1"),
        ({"bakcup_workers": 1}, "did you mean backup_workers?"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy.resolve(Config(), 4, **options)
    assert text in str(caught.value)


def test_the_environment_gives_what_arguments_do_not() -> None:
    config = Config.from_environment({"HVD_BACKUP_BACKUP_WORKERS": "0.5", "HVD_BACKUP_GRACE": "0.001"})
    policy = Policy.resolve(config, 4, backup_workers=None, grace=0.002)
    assert (policy.required, policy.grace_us) == (2, 2000)


def test_a_policy_by_name() -> None:
    config = Config.from_environment({"HVD_BACKUP_BACKUP_WORKERS": "1"})
    assert Policy.resolve(config, 4, policy="synchronous").required == 4
    assert Policy.resolve(config, 4, policy="backup").required == 3


def test_who_drops_what_is_not_finite_arrives_with_the_last_bucket_and_may_be_left_out() -> None:
    assert not Policy.resolve(Config(), 4).may_leave_out
    policy = Policy.resolve(Config.from_environment({"HVD_BACKUP_NONFINITE": "drop"}), 4)
    assert (policy.nonfinite, policy.arrive, policy.may_leave_out) == ("drop", "last", True)
    assert Policy.resolve(Config(), 4, backup_workers=1).may_leave_out


OPTIONS: dict[str, list[object]] = {
    "backup_workers": [0, 1],
    "min_contributors": [1, 3],
    "grace": [0.0, 0.1],
    "max_misses": [0, 2],
    "late": ["drop", "carry"],
    "max_lag": ["auto", 8],
    "on_max_lag": ["resync", "wait"],
    "scope": ["step", "bucket"],
    "arrive": ["first", "last"],
    "nonfinite": ["pass", "drop"],
    "journal_bytes": [1 << 30, 1 << 20],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_ranks_with_different_options_have_different_descriptions(option: str) -> None:
    others = {"backup_workers": "auto"} if option == "min_contributors" else {}
    one, other = (Policy.resolve(Config(), 4, **others, **{option: value}).description() for value in OPTIONS[option])
    assert one != other
    assert len(one.splitlines()) == len(other.splitlines()), "the first difference is found line by line"


@given(update=st.integers(0, 1 << 40), size=SIZES, journal=st.integers(0, 1 << 40))
def test_the_journal_keeps_what_fits_within_4_to_1024_updates(update: int, size: int, journal: int) -> None:
    depth = journal_depth(update, size, journal)
    assert 4 <= depth <= 1024
    assert depth == 4 or depth * (2 * update // size) <= journal
    assert depth == 1024 or (depth + 1) * (2 * update // size + 1) > journal


def test_a_number_of_updates_is_taken_as_it_is() -> None:
    assert Policy.resolve(Config(), 4, max_lag=2).lag_bound(1 << 40) == 2
    assert Policy.resolve(Config(), 4).lag_bound(100 << 20) == 20


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_the_number_of_ranks_is_checked(size: int) -> None:
    with pytest.raises(ConfigError, match="number of ranks"):
        Policy.resolve(Config(), size)
