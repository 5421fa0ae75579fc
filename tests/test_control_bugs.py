"""The simulated schedules find bugs: each of those in tests/control_bugs.py, within a few hundred schedules."""

import itertools

import pytest

from tests.control_bugs import BUGS
from tests.control_runs import KINDS, run_seed

MOST = 400  # seeds; test_control_schedules.py goes through more


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    for seed, kind in itertools.product(range(MOST), KINDS):
        try:
            run_seed(kind, seed, BUGS[bug]())
        except AssertionError:
            return
    pytest.fail(f"'{bug}' was not found in {MOST * len(KINDS)} schedules")
