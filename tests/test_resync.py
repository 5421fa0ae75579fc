"""Ranks beyond the journal with on_max_lag="resync": the coordinator's rules, one by one (design, rule 6)."""

from typing import Any

from tests.control_talk import Said, Talk, told

FIRST_PATIENCE_US = 1_000_000


def far_behind(size: int = 3, updates: int = 4, **options: int) -> Talk:
    """Ranks 0 and 1 have made so many updates, the journal holds two, and the last rank has none of them."""
    talk = Talk(size).open(**({"required": 2, "max_lag": 2, "resync": True} | options))
    for step in range(updates):
        talk.final(step, 0, 1)
    return talk


def only(said: Said, kind: str) -> dict[str, Any]:
    """The one message of a kind."""
    (found,) = (body for _, body in said if body["message"] == kind)
    return found


def test_i4_the_others_go_on_and_it_is_said_once() -> None:
    talk = far_behind()
    (beyond,) = talk.recorded("beyond")
    assert (beyond["ranks"], beyond["step"]) == ([2], 2)
    assert beyond["reason"].startswith("rank 2 is 2 updates behind, at step 0, and the journal holds max_lag=2")
    assert not talk.recorded("held")


def test_of_a_rank_at_the_edge_of_the_journal_it_is_said_once_until_it_has_come_back() -> None:
    """It makes its updates as fast as the others, and goes out of the journal and into it again all the time."""
    talk = far_behind(updates=9, max_lag=8)
    for step in range(9, 20):
        talk.arrive(2, step - 8)  # has one update more: in the journal again
        talk.final(step, 0, 1)
    assert [beyond["step"] for beyond in talk.recorded("beyond")] == [8]
    talk.arrive(2, 16)
    for step in range(20, 25):
        talk.final(step, 0, 1)
    assert [beyond["step"] for beyond in talk.recorded("beyond")] == [8, 24]


def test_i5_nothing_is_kept_beyond_max_lag() -> None:
    talk = far_behind(updates=3)
    talk.arrive(0, 3)
    said = talk.arrive(1, 3)
    assert [body["outlook"] for _, body in said] == [{"round_end": -1, "all_have": 2, "beyond": True}] * 2


def test_it_takes_over_the_state_of_a_contributor_that_has_made_a_copy() -> None:
    talk = far_behind()
    assert told(talk.say(2, "Sync", have=0)) == [(1, "Offer")]
    ((to, resync),) = talk.say(1, "Offered", step=4, bytes=10)
    assert (to, resync["message"], resync["server"], resync["step"], resync["bytes"]) == (2, "Resync", 1, 4, 10)
    assert not resync["instead"] and not resync["contributed"]
    assert told(talk.say(2, "Sync", have=4)) == [(1, "Dismiss"), (2, "Resume")]
    (resynced,) = talk.recorded("resynced")
    assert (resynced["ranks"], resynced["step"]) == ([2, 1], 4)
    assert "in place of 4 updates" in resynced["reason"]


def test_its_gradient_is_late_as_ever() -> None:
    talk = far_behind()
    assert told(talk.arrive(2, 0)) == [(2, "Late")]
    assert [record["ranks"] for record in talk.recorded("dropped")] == [[2]]
    assert told(talk.say(2, "Sync", have=0)) == [(1, "Offer")]


def test_one_copy_is_enough_for_all() -> None:
    talk = far_behind(4)
    assert told(talk.say(2, "Sync", have=0)) == [(1, "Offer")]
    assert told(talk.say(3, "Sync", have=0)) == []
    assert told(talk.say(1, "Offered", step=4, bytes=10)) == [(2, "Resync"), (3, "Resync")]
    assert told(talk.say(2, "Sync", have=4))[0] == (2, "Resume")
    assert told(talk.say(3, "Sync", have=4))[0] == (1, "Dismiss")


def test_a_copy_that_has_fallen_out_of_the_journal_itself_is_of_no_use() -> None:
    talk = far_behind()
    talk.say(2, "Sync", have=0)
    for step in range(4, 8):
        talk.final(step, 0, 1)
    assert told(talk.say(1, "Offered", step=4, bytes=10)) == [(1, "Dismiss"), (1, "Offer")]
    assert told(talk.say(1, "Offered", step=8, bytes=10)) == [(2, "Resync")]


def test_a_rank_that_makes_no_copy_is_not_waited_for() -> None:
    talk = far_behind()
    assert told(talk.say(2, "Sync", have=0)) == [(1, "Offer")]
    talk.now += FIRST_PATIENCE_US
    assert told(talk.tick()) == [(0, "Offer")]
    assert told(talk.say(0, "Offered", step=4, bytes=10)) == [(2, "Resync")]
    assert told(talk.say(1, "Offered", step=4, bytes=10)) == []  # it is kept, in case that the other one stops


def test_another_copy_in_place_of_one_that_does_not_come() -> None:
    talk = far_behind()
    talk.say(2, "Sync", have=0)
    talk.say(1, "Offered", step=4, bytes=10)
    assert told(talk.say(2, "StateLost", server=1, step=4)) == [(0, "Offer")]
    resync = only(talk.say(0, "Offered", step=4, bytes=10), "Resync")
    assert (resync["server"], resync["instead"]) == (0, True)
    assert told(talk.say(2, "Sync", have=4))[:2] == [(1, "Dismiss"), (0, "Dismiss")]
    assert talk.recorded("resynced")[0]["ranks"][0] == 2


def test_what_is_lost_is_not_asked_for_after_it_has_come() -> None:
    talk = far_behind()
    talk.say(2, "Sync", have=0)
    talk.say(1, "Offered", step=4, bytes=10)
    talk.say(2, "Sync", have=4)
    assert told(talk.say(2, "StateLost", server=1, step=4)) == []


def test_an_update_that_nobody_keeps() -> None:
    talk = far_behind(updates=1)  # not beyond the journal, but what it was told to fetch is gone
    assert told(talk.say(2, "Sync", have=0)) == [(2, "History")]
    assert told(talk.say(2, "Sync", have=0, lost=True)) == [(1, "Offer")]
    assert told(talk.say(1, "Offered", step=1, bytes=10)) == [(2, "Resync")]


def test_i6_a_copy_is_made_before_the_others_leave_the_round() -> None:
    """Afterwards they may wait for the rank in a collective, where they make none."""
    talk = Talk(3).open(required=2, max_lag=1, resync=True)
    talk.follow(3, 3, 3)
    for step in range(3):
        talk.final(step, 0, 1)
    assert told(talk.say(0, "Sync", have=3)) == [(0, "Offer"), (0, "Over")]
    assert told(talk.say(1, "Sync", have=3)) == [(1, "Offer"), (1, "Over")]  # the first one may stop
    talk.say(0, "Offered", step=3, bytes=10)
    assert told(talk.say(2, "Sync", have=0)) == [(2, "Resync")]
    assert told(talk.say(2, "Sync", have=3))[-1] == (2, "Over")


def test_a_copy_is_made_before_all_ranks_meet() -> None:
    talk = Talk(3).open(required=2, max_lag=1, resync=True)
    talk.follow(6, 6, 6, align_every=3)
    for rank in range(3):
        talk.say(rank, "Sync", have=0)
    talk.final(0, 0, 1)
    talk.final(1, 0, 1)
    talk.arrive(0, 2)
    assert told(talk.arrive(1, 2)) == [(0, "Offer"), (0, "Decision"), (1, "Offer"), (1, "Decision")]
    assert told(talk.say(1, "Offered", step=2, bytes=10)) == []
    for rank in (0, 1):
        talk.say(rank, "Done", step=2)
    assert told(talk.say(2, "Sync", have=0)) == [(2, "Resync")]
    talk.arrive(0, 3)
    assert told(talk.arrive(1, 3)) == []  # all meet: those beyond the journal are waited for
    assert (2, "History") in told(talk.say(2, "Sync", have=2))


def test_who_meets_at_the_end_of_a_round_is_waited_for_there_though_the_next_round_is_empty() -> None:
    talk = Talk(3).open(required=2, max_lag=1, resync=True)
    talk.follow(3, 3, 3, align_every=3)
    for rank in range(3):
        talk.say(rank, "Sync", have=0)
    for step in range(3):
        talk.final(step, 0, 1)
    talk.say(0, "Leave", round=1)  # it has no data in an epoch without follow
    for rank in (0, 1):
        assert talk.arrive(rank, 3, round=2) == [], "rank 2 has not been where all were to meet"
    assert len(talk.recorded("round_over")) == 2


def test_a_rank_that_leaves_for_good_leaves_a_copy_behind() -> None:
    talk = far_behind()
    talk.say(1, "Offered", step=4, bytes=10)  # unasked: it knew that somebody would need it
    talk.say(1, "Exit")
    talk.say(0, "Exit")
    assert told(talk.say(2, "Sync", have=0)) == [(2, "Resync")]


def test_i6_nobody_is_left_to_take_over_from() -> None:
    talk = far_behind()
    talk.say(0, "Exit", failure="ValueError")
    talk.say(1, "Exit", failure="ValueError")
    failed = only(talk.say(2, "Sync", have=0), "Failed")
    assert "rank 2 is at step 0, beyond the journal, and no rank is left whose state" in failed["reason"]


def test_i7_its_gradient_counts_if_it_has_become_part_of_an_update() -> None:
    talk = Talk(3).open(required=2, max_lag=1, resync=True, grace_us=10)
    for rank in (0, 1, 2):
        talk.arrive(rank, 0)
    talk.say(0, "Done", step=0)
    talk.say(1, "Done", step=0)
    talk.now += FIRST_PATIENCE_US
    talk.tick()  # asks rank 2 how far it is
    talk.now += FIRST_PATIENCE_US
    talk.tick()
    assert [record["ranks"] for record in talk.recorded("stopped")] == [[2]]
    for step in (1, 2):
        talk.arrive(0, step)
        talk.arrive(1, step)
        talk.now += 20  # the grace time is over
        talk.tick()
        talk.say(0, "Done", step=step)
        talk.say(1, "Done", step=step)
    assert told(talk.say(2, "Sync", have=0)) == [(1, "Offer")]
    assert only(talk.say(1, "Offered", step=3, bytes=10), "Resync")["contributed"]


def test_without_backup_workers_nobody_is_left_behind() -> None:
    talk = Talk(2).open(required=2, max_lag=1, resync=True)
    talk.final(0, 0, 1)
    talk.arrive(0, 1)
    assert not talk.recorded("beyond")


def beyond_again() -> Talk:
    """Rank 2 takes over a state, which takes 5 ms; meanwhile the others make more updates than the journal holds."""
    talk = far_behind()
    talk.say(2, "Sync", have=0)
    talk.say(1, "Offered", step=4, bytes=10)
    talk.now += 5000
    for step in range(4, 8):
        talk.final(step, 0, 1)
    return talk


def test_the_others_wait_for_a_rank_that_would_never_come_back() -> None:
    """Its state takes longer than max_lag updates: the second time the others wait, as long as the first one took."""
    talk = beyond_again()
    assert told(talk.say(2, "Sync", have=4)) == [(1, "Dismiss"), (1, "Offer")]
    assert told(talk.say(1, "Offered", step=8, bytes=10)) == [(2, "Resync")]
    talk.final(8, 0, 1)
    talk.final(9, 0, 1)
    talk.arrive(0, 10)
    assert told(talk.arrive(1, 10)) == []
    (held,) = talk.recorded("held")
    assert held["ranks"] == [2] and "for 10 ms at most" in held["reason"]
    assert told(talk.say(2, "Sync", have=8)) == [(1, "Dismiss"), (2, "History")]
    assert (0, "Decision") in told(talk.say(2, "Sync", have=10))


def test_i4_but_not_if_it_has_stopped_again() -> None:
    talk = beyond_again()
    talk.say(2, "Sync", have=4)
    talk.say(1, "Offered", step=8, bytes=10)
    talk.final(8, 0, 1)
    talk.final(9, 0, 1)
    talk.arrive(0, 10)
    assert told(talk.arrive(1, 10)) == []
    talk.now += 10_000
    assert told(talk.tick()) == [(0, "Decision"), (1, "Decision")]
