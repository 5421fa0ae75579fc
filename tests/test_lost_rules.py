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
