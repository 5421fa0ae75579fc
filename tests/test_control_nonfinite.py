"""What the coordinator makes of a gradient that holds NaN or infinity (nonfinite="drop"): it counts as late.

With real ranks: test_torch_nonfinite.py. In random schedules: control_plans.py poisons some gradients.
"""

from typing import Any

import pytest
from hvd_backup._core_testing import Member, close_decision, compose, describe

from tests.control_talk import Said, Talk, decisions, told


def spoiled(talk: Talk, rank: int, step: int, **fields: Any) -> Said:
    """The rank arrives with a gradient that is not finite."""
    return talk.arrive(rank, step, finite=False, **fields)


def dropped(talk: Talk) -> list[tuple[int, int, str]]:
    return [(each["ranks"][0], each["step"], each["reason"]) for each in talk.recorded("dropped")]


def test_it_is_in_no_update_and_nobody_waits_for_it() -> None:
    talk = Talk(3).open(required=2)
    assert spoiled(talk, 0, 0) == []
    assert dropped(talk) == [(0, 0, "non-finite")], "on record at once (I7)"
    assert talk.arrive(1, 0) == [], "it does not count as one of N"
    said = talk.arrive(2, 0)
    assert list(decisions(said)) == [1, 2]
    assert (0, "Late") in told(said), "its rank goes on when the step is decided, and not before"
    for rank in (1, 2):
        talk.say(rank, "Done", step=0)
    history = talk.say(0, "Sync", have=0)
    assert history[0][1]["updates"][0]["contributors"] == [[1, 2]]


def test_with_fewer_than_n_left_the_update_is_made_of_those() -> None:
    talk = Talk(3).open(required=3)
    talk.arrive(0, 0)
    spoiled(talk, 1, 0)
    said = talk.arrive(2, 0)
    assert decisions(said)[0]["contributors"] == [0, 2]
    for rank in (0, 2):
        talk.say(rank, "Done", step=0)
    assert talk.say(1, "Sync", have=0)[0][1]["updates"][0]["contributors"] == [[0, 2]]
    assert told(talk.say(1, "Sync", have=1)) == [(1, "Resume")], "b = 0: it is needed, and begins at once"


def test_who_can_still_come_is_waited_for_when_fewer_than_n_are_left() -> None:
    talk = Talk(3).open(required=2)
    talk.arrive(0, 0)
    assert spoiled(talk, 1, 0) == [], "rank 2 still can make it two"
    assert list(decisions(talk.arrive(2, 0))) == [0, 2]


def test_a_late_rank_is_called_when_it_is_needed_in_place_of_it() -> None:
    talk = Talk(4).open(required=3)
    for step in range(3):
        talk.now += 10_000
        talk.final(step, 0, 1, 2)
    talk.arrive(3, 0)
    talk.now += 5_000  # in the middle of step 3
    talk.say(3, "Sync", have=0)
    assert talk.say(3, "Sync", have=3) == [], "it waits for the next step"
    talk.arrive(0, 3)
    assert (3, "Resume") in told(spoiled(talk, 1, 3)), "without it three can't be"


def test_when_no_gradient_is_finite_the_step_ends_and_changes_nothing() -> None:
    talk = Talk(2).open(required=2)
    talk.final(0, 0, 1)
    assert spoiled(talk, 0, 1) == []
    assert told(spoiled(talk, 1, 1)) == [(0, "Late"), (1, "Late")]
    assert talk.recorded("decision")[-1]["ranks"] == []
    assert talk.recorded("decision")[-1]["reason"] == "no gradient is finite"
    for rank in (0, 1):
        updates = talk.say(rank, "Sync", have=1)[0][1]["updates"]
        assert [each["contributors"] for each in updates] == [[[]]]
        assert told(talk.say(rank, "Sync", have=2)) == [(rank, "Resume")]
    assert dropped(talk) == [(0, 1, "non-finite"), (1, 1, "non-finite")]
    talk.final(2, 0, 1)
    assert len(talk.recorded("final")) == 3


def test_a_rank_that_comes_after_the_decision_does_not_stand_in_with_it() -> None:
    talk = Talk(3).open(required=2)
    talk.arrive(0, 0)
    talk.arrive(1, 0)
    assert told(spoiled(talk, 2, 0)) == [(2, "Late")]
    assert dropped(talk) == [(2, 0, "non-finite")]
    said = talk.say(0, "Withdraw", step=0)
    assert decisions(said)[1]["contributors"] == [1], "nobody else can come, so it is not waited for"


def test_each_bucket_has_its_own_verdict_with_scope_bucket() -> None:
    talk = Talk(2).open(required=2)
    for scope, spoils in enumerate([None, 1]):
        for rank in (0, 1):
            said = talk.arrive(rank, 0, scope=scope, scopes=2, buckets=2, finite=rank != spoils)
    assert decisions(said)[0]["contributors"] == [0]
    assert [each["ranks"] for each in talk.recorded("decision")] == [[0, 1], [0]]


def test_it_counts_as_a_miss() -> None:
    talk = Talk(3).open(required=2, max_misses=1)
    for rank in (0, 1, 2):
        talk.arrive(rank, 0, finite=rank != 2)
    for rank in (0, 1):
        talk.say(rank, "Done", step=0)
    talk.arrive(0, 1)
    assert talk.arrive(1, 1) == [], "rank 2 was left out once, and is waited for"


@pytest.mark.parametrize("rank_withdraws", ["before", "after", "standing by"])
def test_i7_a_gradient_that_is_taken_back_is_on_record(rank_withdraws: str) -> None:
    talk = Talk(4).open(required=3)
    talk.arrive(0, 0)
    if rank_withdraws == "before":
        talk.say(0, "Withdraw", step=0)
        assert dropped(talk) == [(0, 0, "withdrawn")]
        return
    talk.arrive(1, 0)
    talk.arrive(2, 0)
    talk.arrive(3, 0)
    rank = 3 if rank_withdraws == "standing by" else 0
    talk.say(rank, "Withdraw", step=0)
    assert dropped(talk) == [(rank, 0, "withdrawn")]
    contributors = talk.recorded("decision")[-1]["ranks"]
    for contributor in contributors:
        talk.say(contributor, "Done", step=0, attempt=len(talk.recorded("decision")) - 1)
    assert len(talk.recorded("final")) == 1
    assert dropped(talk) == [(rank, 0, "withdrawn")], "once"


@pytest.mark.parametrize(("able", "nonfinite", "closes"), [(0, 2, True), (1, 2, False), (0, 0, False)])
def test_a_decision_closes_without_anybody_only_when_none_can_be_finite(
    able: int, nonfinite: int, closes: bool
) -> None:
    assert close_decision(required=2, arrived=0, able=able, nonfinite=nonfinite).yes is closes


def test_a_member_says_so_when_any_bucket_of_the_scope_is_not_finite() -> None:
    member = Member(0, arrive_first=False)
    member.set_layout([0, 0, 1])
    member.receive(compose("Opened", channel=0))
    member.begin()
    member.submit(0, finite=False)
    member.submit(2)
    member.submit(1)
    told_of = [describe(message) for message in member.take_messages()]
    assert {each["scope"]: each["finite"] for each in told_of} == {0: False, 1: True}


@pytest.mark.parametrize("third", ["waits with them", "is on its way"])
def test_i6_two_optimizers_that_wait_for_a_finite_gradient_in_one_bucket_each(third: str) -> None:
    """Each step is decided in its other bucket, so that no gradient of it can be dropped and made again."""
    talk = Talk(3).open(required=1).open("training", name="other", required=1)
    for rank, channel in [(0, 0), (1, 1)]:
        spoiled(talk, rank, 0, channel=channel, scopes=2, buckets=2)
        talk.arrive(rank, 0, channel=channel, scope=1, scopes=2, buckets=2)
        talk.say(rank, "Done", channel=channel, step=0, scope=1)
    if third == "waits with them":
        spoiled(talk, 2, 0, channel=1, scopes=2, buckets=2)
        talk.arrive(2, 0, channel=1, scope=1, scopes=2, buckets=2)
        talk.say(2, "Waiting", channel=1, step=0)
    said = talk.say(1, "Waiting", channel=1, step=0) + talk.say(0, "Waiting", channel=0, step=0)
    if third == "is on its way":
        assert said == [], "it can contribute to either"
        return
    assert told(said) == [(0, "Late")], "it goes on, and comes to where the others are"
    assert [(each["channel"], each["ranks"]) for each in talk.recorded("decision") if each["scope"] == 0] == [
        ("it", [])
    ]
    assert "all others wait in another channel" in talk.recorded("decision")[-1]["reason"]
