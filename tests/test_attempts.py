"""Attempts at an update and its finality (rule 4): who is suspected, who stands in, and when an update is final."""

from typing import Any

import pytest

from tests.control_talk import Said, Talk, decisions, told

PATIENCE_US = 1_000_000  # before anything was measured (RFC 6298)
ANSWER_US = 15_000


def decided(size: int, *contributors: int, **options: int) -> Talk:
    """Step 0 is decided with these contributors; nobody has the result."""
    talk = Talk(size).open(required=len(contributors), **options)
    for rank in contributors:
        talk.arrive(rank, 0, samples=1.0 + rank, metadata=f"of {rank}")
    return talk


def probed(talk: Talk) -> list[int]:
    """The attempt is overdue; returns who is asked how far it is."""
    talk.now += PATIENCE_US
    said = talk.tick()
    assert {kind for _, kind in told(said)} <= {"Probe"}
    return [to for to, _ in said]


def answer(talk: Talk, *ranks: int, **progress: Any) -> Said:
    said: Said = []
    for rank in ranks:
        said += talk.say(rank, "Progress", **progress)
    return said


def silence(talk: Talk) -> Said:
    """No answer comes in time."""
    talk.now += ANSWER_US
    return talk.tick()


def test_an_update_is_final_when_every_contributor_has_it() -> None:
    talk = decided(4, 0, 1, 2)
    for rank in (0, 1):
        assert talk.say(rank, "Done", step=0) == [], "it may not be applied yet"
    said = talk.say(2, "Done", step=0)
    assert told(said) == [(0, "Final"), (1, "Final"), (2, "Final")]
    assert all(body["stopped"] == [] and body["attempt"] == 0 for _, body in said)


def test_with_all_ranks_required_nobody_votes() -> None:
    talk = Talk(2).open(required=2)
    talk.arrive(0, 0)
    assert not any(body["votes"] for body in decisions(talk.arrive(1, 0)).values())
    assert talk.say(0, "Done", step=0) == talk.say(1, "Done", step=0) == []
    assert len(talk.recorded("final")) == 1


def test_who_does_not_answer_is_replaced_by_who_has_arrived_since() -> None:
    talk = decided(4, 0, 1, 2)
    assert told(talk.arrive(3, 0, samples=4.0, metadata="of 3")) == [(3, "Late")]
    assert talk.recorded("dropped") == []
    assert probed(talk) == [0, 1, 2]
    assert answer(talk, 0, 2, contributions_missing=[1]) == []
    said = silence(talk)
    assert (1, "Late") in told(said)
    second = decisions(said)
    assert list(second) == [0, 2, 3]
    assert (second[3]["attempt"], second[3]["contributors"]) == (1, [0, 2, 3])
    assert (second[3]["weights"], second[3]["samples"], second[3]["metadata"]) == ([1.0, 3.0, 4.0], 8.0, "of 0")
    (replaced,) = talk.recorded("replaced")
    assert replaced["ranks"] == [1] and "rank 1 does not answer (1015 ms after the decision" in replaced["reason"]
    talk.say(0, "Done", step=0, attempt=0)
    talk.say(2, "Done", step=0, attempt=1)
    talk.say(3, "Done", step=0, attempt=1)
    assert talk.recorded("final") == [], "what was done in the first attempt does not count"
    assert told(talk.say(0, "Done", step=0, attempt=1)) == [(0, "Final"), (2, "Final"), (3, "Final")]
    (dropped,) = talk.recorded("dropped")
    assert dropped["ranks"] == [1]


def test_who_stops_when_all_others_have_the_result_changes_nothing() -> None:
    talk = decided(4, 0, 1, 2)
    for rank in (0, 2):
        talk.say(rank, "Done", step=0)
    assert probed(talk) == [1]
    said = silence(talk)
    assert told(said) == [(0, "Final"), (1, "Late"), (2, "Final")]
    assert said[0][1]["stopped"] == [1]
    assert talk.recorded("stopped")[0]["ranks"] == [1] and talk.recorded("dropped") == []
    (update,) = talk.say(1, "Sync", have=0)[0][1]["updates"]
    assert update["contributors"] == [[0, 1, 2]], "its gradient counts"


def test_two_must_have_it_so_that_one_more_may_stop() -> None:
    talk = decided(4, 0, 1)
    talk.say(0, "Done", step=0)
    probed(talk)
    assert silence(talk) == [], "rank 0 alone has it"
    talk.arrive(2, 0)
    assert list(decisions(talk.tick())) == [], "nothing new"
    assert talk.recorded("replaced")[0]["ranks"] == [1]


def test_fewer_than_n_wait_for_a_rank_that_can_stand_in() -> None:
    talk = Talk(4).open(required=3)
    talk.final(0, 0, 1, 2)  # rank 3 has missed it
    for rank in (0, 1, 2):
        talk.arrive(rank, 1)
    probed(talk)
    answer(talk, 0, 1, step=1)
    assert silence(talk) == [], "of 4 ranks 2 are left, and N is 3"
    (page,) = talk.say(3, "Sync", have=0)
    assert page[1]["message"] == "History"
    assert told(talk.say(3, "Sync", have=1)) == [(3, "Resume")], "it is needed for this very update"
    said = talk.arrive(3, 1)
    assert (3, "Late") in told(said)
    assert list(decisions(said)) == [0, 1, 3]


def test_i4_the_last_step_of_a_round_that_a_rank_has_left_is_not_held_up() -> None:
    """Without follow, the first rank that leaves ends the round; nobody is left who could stand in."""
    talk = decided(3, 0, 1)
    talk.say(0, "Done", step=0)
    talk.say(2, "Leave", round=0)
    assert probed(talk) == [1]
    again = decisions(silence(talk))
    assert again[0]["attempt"] == 1 and again[0]["contributors"] == [0]


def test_who_answers_goes_on_as_long_as_nobody_could_replace_it() -> None:
    talk = decided(4, 0, 1, 2)
    assert probed(talk) == [0, 1, 2]
    assert answer(talk, 0, 1, 2, unsubmitted=1) == []
    assert talk.recorded("replaced") == talk.recorded("stopped") == []


def test_who_is_still_computing_is_replaced_by_who_has_arrived() -> None:
    talk = decided(4, 0, 1, 2)
    talk.arrive(3, 0)
    probed(talk)
    answer(talk, 0, 2, contributions_missing=[1])
    said = answer(talk, 1, unsubmitted=2)
    assert list(decisions(said)) == [0, 2, 3]
    assert "rank 1 is still computing its gradient" in talk.recorded("replaced")[0]["reason"]


def test_whose_data_do_not_arrive_is_replaced() -> None:
    """A bad link: everybody answers, and most miss the data of rank 2."""
    talk = decided(4, 0, 1, 2)
    talk.arrive(3, 0)
    probed(talk)
    answer(talk, 0, 1, contributions_missing=[2])
    said = answer(talk, 2, contributions_missing=[0])
    assert list(decisions(said)) == [0, 1, 3]
    assert "rank 2 answers, but its data do not arrive" in talk.recorded("replaced")[0]["reason"]


def test_a_replaced_rank_that_goes_on_may_stand_in_for_another() -> None:
    talk = decided(4, 0, 1, 2)
    talk.arrive(3, 0)
    probed(talk)
    answer(talk, 0, 2)
    assert list(decisions(silence(talk))) == [0, 2, 3]
    talk.now += 2 * PATIENCE_US  # a later attempt is given more time
    assert {kind for _, kind in told(talk.tick())} == {"Probe"}
    answer(talk, 0, 2, attempt=1)
    assert list(decisions(silence(talk))) == [0, 1, 2]


@pytest.mark.parametrize("took_ms", [1, 40])
def test_how_long_is_too_long_is_measured(took_ms: int) -> None:
    """mean + 4 deviations (RFC 6298) of what updates took so far; at least 20 ms."""
    talk = Talk(3).open(required=2)
    for step in range(50):
        talk.arrive(0, step)
        talk.arrive(1, step)
        talk.now += took_ms * 1000
        talk.say(0, "Done", step=step)
        talk.say(1, "Done", step=step)
        talk.say(2, "Sync", have=step)
    talk.arrive(0, 50)
    talk.arrive(1, 50)
    overdue = talk.coordinator.next_deadline() - talk.now
    assert overdue == pytest.approx(max(20_000, took_ms * 1000), rel=0.05)


def test_late_ranks_get_an_update_though_a_contributor_has_stopped_after_it() -> None:
    """It has the result, but does not say that it keeps it; its neighbour does."""
    talk = decided(4, 0, 1, 2)
    for rank in range(3):
        talk.say(rank, "Done", step=0, kept=False)
    talk.say(3, "Sync", have=0)
    assert talk.say(0, "Kept", step=0) == talk.say(1, "Kept", step=0) == []
    talk.now += PATIENCE_US
    assert told(talk.tick()) == [(3, "History")]
