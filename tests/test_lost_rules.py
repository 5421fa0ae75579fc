"""What the coordinator does when a process dies, where MPI survives it: at once, without waiting for any time."""

from tests.control_talk import Talk, decisions, told


def talk_of(size: int, kind: str = "training", **options: int) -> Talk:
    return Talk(size, survives_losses=True).open(kind, **options)


def test_what_a_lost_rank_has_announced_is_not_in_any_update() -> None:
    talk = talk_of(4, required=2)
    talk.arrive(3, 0)
    assert talk.lose(3) == []
    assert [drop["reason"] for drop in talk.recorded("dropped")] == ["its process has died"]
    assert talk.arrive(0, 0) == []
    assert list(decisions(talk.arrive(1, 0))) == [0, 1]


def test_a_lost_contributor_is_replaced_at_once_by_who_has_arrived_since() -> None:
    talk = talk_of(4, required=3)
    for rank in (1, 2, 3, 0):
        talk.arrive(rank, 0)
    talk.say(1, "Done", step=0)
    again = decisions(talk.lose(3))
    assert list(again) == [0, 1, 2]
    assert again[0]["attempt"] == 1 and again[0]["contributors"] == [0, 1, 2]
    assert "rank 3 has died" in talk.recorded("replaced")[0]["reason"]


def test_an_update_that_all_others_have_is_final_without_the_lost_contributor() -> None:
    talk = talk_of(4, required=3)
    for rank in (1, 2, 3):
        talk.arrive(rank, 0)
    talk.say(1, "Done", step=0)
    talk.say(2, "Done", step=0)
    said = talk.lose(3)
    assert [(to, body["message"]) for to, body in said if to != 3] == [(1, "Final"), (2, "Final")]
    assert talk.recorded("stopped")[0]["ranks"] == [3]


def test_n_is_capped_by_who_is_left() -> None:
    talk = talk_of(3, required=2)
    talk.lose(2)
    assert talk.arrive(0, 0) == []  # rank 1 can still come
    assert list(decisions(talk.lose(1))) == [0]


def test_without_backup_workers_a_loss_ends_the_training() -> None:
    talk = talk_of(3, required=3)
    talk.arrive(0, 0)
    failed = talk.lose(2)
    assert told(failed) == [(0, "Failed"), (1, "Failed")]
    assert "rank 2 has left at step 0 (its process has died)" in failed[0][1]["reason"]


def test_a_collective_of_all_ranks_is_one_of_those_that_are_left() -> None:
    talk = talk_of(3, "collective", required=3)
    talk.arrive(0, 0)
    talk.arrive(1, 0)
    assert decisions(talk.lose(2))[0]["contributors"] == [0, 1]
    talk.say(0, "Done", step=0)
    talk.say(1, "Done", step=0)
    talk.arrive(0, 1)
    assert decisions(talk.arrive(1, 1))[1]["contributors"] == [0, 1]


def test_a_collective_of_all_ranks_begins_anew_without_who_dies_in_it() -> None:
    talk = talk_of(3, "collective", required=3)
    for rank in range(3):
        talk.arrive(rank, 0)
    talk.say(0, "Done", step=0)
    again = decisions(talk.lose(2))
    assert again[0]["attempt"] == 1 and again[0]["contributors"] == [0, 1]


def test_an_update_that_nobody_has_any_more_ends_the_training() -> None:
    talk = talk_of(3, required=1)
    talk.final(0, 2)  # by rank 2 alone
    failed = talk.lose(2)
    assert told(failed) == [(0, "Failed"), (1, "Failed")]
    assert "update 0 of 'it' is lost with rank 2" in failed[0][1]["reason"]


def test_an_update_that_all_who_are_left_have_is_no_loss() -> None:
    talk = talk_of(3, required=1)
    talk.final(0, 2)
    for rank in (0, 1):
        talk.say(rank, "Sync", have=0)
        talk.say(rank, "Sync", have=1)
    assert "Failed" not in [kind for _, kind in told(talk.lose(2))]


def test_a_lost_rank_has_nothing_more_to_say() -> None:
    talk = talk_of(3, required=2)
    talk.lose(2)
    assert talk.arrive(2, 0) == []
    assert talk.arrive(0, 0) == []
    assert list(decisions(talk.arrive(1, 0))) == [0, 1]


def test_the_others_end_without_it() -> None:
    talk = talk_of(3)
    talk.say(0, "Exit")
    talk.lose(2)
    assert told(talk.say(1, "Exit")) == [(0, "AllGone"), (1, "AllGone")]


def test_when_it_had_left_before_nothing_changes() -> None:
    talk = talk_of(3)
    talk.say(2, "Exit")
    talk.say(0, "Exit")
    talk.lose(2)
    assert talk.recorded("lost") == []
    assert told(talk.say(1, "Exit")) == [(0, "AllGone"), (1, "AllGone")]


def test_data_that_a_rank_was_still_sending_when_it_died_are_not_waited_for() -> None:
    """Without backup workers an update is not begun anew; the rank had left as planned, and died before all had it."""
    talk = talk_of(3, required=3)
    for rank in range(3):
        talk.arrive(rank, 0)
    talk.say(2, "Done", step=0)
    talk.say(2, "Exit")
    talk.say(0, "Done", step=0)
    failed = talk.lose(2)
    assert told(failed) == [(0, "Failed"), (1, "Failed")]
    assert "rank 2 has died, and step 0 of 'it' needs the rest of its data" in failed[0][1]["reason"]


def test_a_collective_that_nobody_is_left_of_is_made_by_whoever_comes_to_it() -> None:
    """Rank 0 is in a full collective meanwhile, so it could not contribute; it is told the outcome of its own call."""
    talk = talk_of(2, "collective", required=1)
    talk.say(0, "Pause")
    talk.arrive(1, 0)
    talk.lose(1)
    assert talk.recorded("final") == []
    said = talk.arrive(0, 0)
    assert told(said) == [(0, "Late"), (0, "Decision")]
    assert decisions(said)[0]["contributors"] == [0]
    talk.say(0, "Done", step=0, attempt=1)
    assert [final["step"] for final in talk.recorded("final")] == [0]


def test_nobody_comes_to_it_any_more() -> None:
    talk = talk_of(2, "collective", required=1)
    talk.say(0, "Pause")
    talk.arrive(1, 0)
    talk.lose(1)
    assert told(talk.say(0, "Exit")) == [(0, "AllGone")]


def test_a_rank_whose_gradient_was_dropped_with_its_round_stands_in_in_the_next_one() -> None:
    talk = talk_of(2, required=1)
    talk.say(1, "Leave", round=0)
    talk.follow(3, 3, round=1)
    assert told(talk.arrive(0, 0, round=0)) == [(0, "Late")]  # it had begun before it knew
    talk.arrive(1, 0, round=1)
    talk.lose(1)
    talk.say(0, "Sync", have=0, round=0)
    talk.say(0, "BeginRound", round=1, length=3)
    assert told(talk.say(0, "Sync", have=0, round=1)) == [(0, "Resume")]
    assert decisions(talk.arrive(0, 0, round=1))[0]["contributors"] == [0]


def test_i6_who_could_give_its_state_waits_for_the_rank_that_needs_it() -> None:
    """Only rank 2 had the update, and rank 0 has got it from there; rank 1 has not, and all others meet without it."""
    talk = talk_of(3, required=1, resync=True).open("collective", name="meeting", required=3)
    talk.final(0, 2)
    talk.say(0, "Sync", have=0)
    talk.say(0, "Sync", have=1)
    talk.say(1, "Sync", have=0)
    assert "Failed" not in [kind for _, kind in told(talk.lose(2))]
    assert told(talk.say(1, "Sync", have=0, lost=True)) == [(0, "Offer")]
    talk.arrive(0, 0, channel=1)
    failed = talk.say(0, "Waiting", channel=1, step=0)
    assert told(failed) == [(0, "Failed"), (1, "Failed")]
    assert "rank 1 needs the state of another rank" in failed[0][1]["reason"]
    assert "all others wait for it in 'meeting'" in failed[0][1]["reason"]


def test_who_could_give_its_state_waits_for_somebody_else() -> None:
    """Rank 3, which comes to the meeting later; then rank 0 goes on, and gives its state."""
    talk = talk_of(4, required=1, resync=True).open("collective", name="meeting", required=4)
    talk.final(0, 2)
    talk.say(0, "Sync", have=1)
    talk.say(1, "Sync", have=0)
    talk.lose(2)
    talk.say(1, "Sync", have=0, lost=True)
    talk.arrive(1, 0, channel=1)  # an asynchronous one
    talk.arrive(0, 0, channel=1)
    assert "Failed" not in [kind for _, kind in told(talk.say(0, "Waiting", channel=1, step=0))]


def test_a_rank_that_was_turned_away_stands_in_after_all() -> None:
    """It had come out of phase, with its gradient for the one optimizer, when the others waited in the other one."""
    talk = talk_of(3, required=2).open("training", name="other")
    talk.arrive(1, 0)
    talk.arrive(0, 0, channel=1)
    for rank, channel in [(1, 0), (0, 1)]:
        talk.say(rank, "Waiting", channel=channel, step=0)
    assert [record["ranks"] for record in talk.recorded("dropped")] == [[0]]
    talk.final(0, 1, 2)
    talk.arrive(1, 0, channel=1)
    talk.arrive(2, 0, channel=1)
    talk.lose(2)
    assert told(talk.say(0, "Sync", have=0, channel=1)) == [(0, "Resume")]
    assert list(decisions(talk.arrive(0, 0, channel=1))) == [0, 1]


def test_a_step_that_only_the_lost_rank_would_have_come_to() -> None:
    talk = talk_of(3, required=1)
    talk.follow(0, 1, 0)
    talk.arrive(1, 0)
    talk.lose(1)
    assert talk.recorded("final")[0]["ranks"] == []
    ((_, history),) = talk.say(0, "Sync", have=0)
    assert [update["contributors"] for update in history["updates"]] == [[[]]]
    assert told(talk.say(0, "Sync", have=1)) == [(0, "Over")]


def test_an_update_that_only_the_lost_rank_had_besides_a_contributor_that_had_stopped() -> None:
    talk = talk_of(2, required=1, grace_us=1000)
    for rank in (0, 1):
        talk.arrive(rank, 0)
    talk.say(1, "Done", step=0)
    talk.now += 2_000_000
    talk.tick()
    talk.now += 100_000
    assert (0, "Late") in told(talk.tick())  # the others have it, which is rank 1 alone
    failed = talk.lose(1)
    assert told(failed) == [(0, "Failed")]
    assert "update 0 of 'it' is lost with rank 1" in failed[0][1]["reason"]
