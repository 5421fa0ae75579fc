"""The coordinator's rules one by one, with a manual clock: what is said to whom, when, and in which words."""

import itertools

import pytest

from tests.control_talk import Said, Talk, decisions, told

# --- opening ------------------------------------------------------------------------------------------------------


def test_without_waiting_each_rank_is_told_at_once() -> None:
    talk = Talk(3)
    said = talk.say(2, "Open", name="it", proposal="mine")
    assert said == [(2, {"name": "it", "channel": 0, "proposal": "mine", "measured": False, "message": "Opened"})]
    assert talk.say(0, "Open", name="it", proposal="another")[0][1]["proposal"] == "mine"
    assert talk.say(1, "Open", name="more")[0][1]["channel"] == 1


def test_waiting_for_all_means_all() -> None:
    talk = Talk(3)
    assert talk.say(1, "Open", name="it", wait_for_all=True, proposal="first") == []
    assert talk.say(2, "Open", name="it", wait_for_all=True, proposal="second") == []
    said = talk.say(0, "Open", name="it", wait_for_all=True)
    assert [(to, body["proposal"]) for to, body in said] == [(0, "first"), (1, "first"), (2, "first")]
    assert len(talk.recorded("opened")) == 1


def test_different_descriptions_are_an_error_on_every_rank() -> None:
    talk = Talk(3)
    fields = {"name": "it", "wait_for_all": True}
    talk.say(2, "Open", description="policy N=2\nweight (2, 3) float32\nbias", **fields)
    said = talk.say(0, "Open", description="policy N=2\nweight (2, 4) float32\nbias", **fields)
    assert told(said) == [(0, "Failed"), (2, "Failed")]
    reason = said[0][1]["reason"]
    assert "rank 0 and rank 2 differ in 'it'" in reason
    assert "line 2: given 'weight (2, 4) float32', expected 'weight (2, 3) float32'" in reason
    later = talk.say(1, "Open", description="policy N=2\nweight (2, 3) float32\nbias", **fields)
    assert later == [(1, said[0][1])], "who opens it later is told the same"
    assert [record["reason"] for record in talk.recorded("failed")] == [reason]


@pytest.mark.parametrize(
    ("given", "expected", "difference"),
    [
        ("a\nb", "a", "line 2: given 'b', expected nothing"),
        ("a", "a\nb", "line 2: given nothing, expected 'b'"),
        ("", "a", "line 1: given nothing, expected 'a'"),
        ("x\nb", "a\nb", "line 1: given 'x', expected 'a'"),
    ],
)
def test_the_first_difference_is_named(given: str, expected: str, difference: str) -> None:
    talk = Talk(2)
    talk.say(0, "Open", name="it", description=expected)
    assert difference in talk.say(1, "Open", name="it", description=given)[0][1]["reason"]


def test_a_rank_that_leaves_before_it_opens_is_not_waited_for() -> None:
    talk = Talk(3)
    for rank in (0, 1):
        talk.say(rank, "Open", name="it", wait_for_all=True, options={"required": 2})
    assert told(talk.say(2, "Exit", failure="KeyError: 'x'")) == [(0, "Opened"), (1, "Opened")]


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_rank_that_fails_before_it_opens_fails_the_others_if_all_are_required(leaves_first: bool) -> None:
    talk = Talk(3)
    said: Said = talk.say(2, "Exit", failure="KeyError: 'x'") if leaves_first else []
    for rank in (0, 1):
        said += talk.say(rank, "Open", name="it", wait_for_all=True, options={"required": 3})
    said += talk.say(2, "Exit", failure="KeyError: 'x'")
    assert told(said) == [(0, "Failed"), (1, "Failed")]
    for _, body in said:
        assert "rank 2 has left" in body["reason"]
        assert "KeyError: 'x'" in body["reason"]


# --- deciding -----------------------------------------------------------------------------------------------------


def test_the_first_n_are_in_and_the_next_is_late() -> None:
    talk = Talk(3).open(required=2)
    talk.now = 70
    assert talk.arrive(2, 0, samples=3.0, metadata="of 2") == []
    talk.now = 90
    said = talk.arrive(0, 0, samples=5.0, metadata="of 0")
    assert told(said) == [(0, "Decision"), (2, "Decision")]
    decision = said[0][1]
    assert (decision["contributors"], decision["weights"], decision["samples"]) == ([0, 2], [5.0, 3.0], 8.0)
    assert (decision["metadata"], decision["attempt"]) == ("of 0", 0)
    record = talk.recorded("decision")[0]
    assert (record["ranks"], record["bases"], record["arrivals"]) == ([0, 2], [0, 0], [90, 70])
    late = talk.arrive(1, 0)
    assert told(late) == [(1, "Late")]
    assert late[0][1]["newest"] == 1
    for rank in (0, 2):
        assert talk.recorded("dropped") == [], "it might stand in for one of them"
        talk.say(rank, "Done", step=0)
    dropped = talk.recorded("dropped")[0]
    assert (dropped["ranks"], dropped["step"], dropped["reason"]) == ([1], 0, "decided without it")


def test_who_comes_within_the_grace_time_is_in() -> None:
    talk = Talk(4).open(required=2, grace_us=100)
    talk.arrive(0, 0)
    talk.now = 1000
    assert talk.arrive(1, 0) == []
    assert talk.coordinator.next_deadline() == 1100
    talk.now = 1050
    assert talk.arrive(2, 0) == []
    talk.now = 1099
    assert talk.tick() == []
    talk.now = 1100
    assert list(decisions(talk.tick())) == [0, 1, 2]
    assert talk.coordinator.next_deadline() > 1100, "to look after the contributors"


def test_the_grace_time_ends_when_all_are_there() -> None:
    talk = Talk(3).open(required=2, grace_us=100)
    talk.arrive(0, 0)
    talk.arrive(1, 0)
    assert list(decisions(talk.arrive(2, 0))) == [0, 1, 2]


def test_a_rank_left_out_max_misses_times_in_a_row_is_waited_for() -> None:
    talk = Talk(3).open(required=2, max_misses=2)
    for step in range(2):
        talk.final(step, 0, 1)
    talk.arrive(0, 2)
    assert talk.arrive(1, 2) == []
    talk.say(2, "Sync", have=0)
    assert talk.say(2, "Sync", have=2) == [
        (2, {"channel": 0, "outlook": {"round_end": -1, "all_have": 2, "beyond": False}, "message": "Resume"})
    ]
    assert list(decisions(talk.arrive(2, 2))) == [0, 1, 2]
    talk.arrive(0, 3)
    assert list(decisions(talk.arrive(1, 3))) == [0, 1], "it has had its turn"


def test_n_is_capped_by_the_ranks_that_still_can() -> None:
    talk = Talk(3).open(required=3)
    talk.follow(5, 5, 5)
    talk.arrive(0, 0)
    talk.say(1, "Away")
    assert list(decisions(talk.say(2, "Away"))) == [0]


def test_scopes_are_decided_each_by_itself() -> None:
    talk = Talk(3).open(required=2)
    both = {"scopes": 2, "buckets": 3}
    talk.arrive(0, 0, scope=0, **both)
    talk.arrive(1, 0, scope=1, **both)
    first = talk.arrive(2, 0, scope=0, **both)[0][1]
    second = talk.arrive(2, 0, scope=1, **both)[0][1]
    assert (first["contributors"], second["contributors"]) == ([0, 2], [1, 2])
    assert abs(first["tag"] - second["tag"]) >= 2 * 3
    for rank, scope in [(0, 0), (2, 0), (1, 1)]:
        talk.say(rank, "Done", step=0, scope=scope)
        assert talk.recorded("final") == []
    talk.say(2, "Done", step=0, scope=1)
    assert len(talk.recorded("final")) == 1


def test_no_tag_is_given_out_twice() -> None:
    talk = Talk(1).open(required=1)
    assert [decisions(talk.arrive(0, step, buckets=2))[0]["tag"] for step in range(4)] == [0, 4, 8, 12]


def test_done_counts_for_contributors_alone() -> None:
    talk = Talk(3).open(required=2)
    talk.arrive(0, 0)
    talk.arrive(1, 0)
    talk.say(2, "Done", step=0)
    talk.say(0, "Done", step=0)
    assert talk.recorded("final") == []
    talk.say(1, "Done", step=0)
    assert len(talk.recorded("final")) == 1


# --- catching up --------------------------------------------------------------------------------------------------


def test_a_late_rank_gets_what_it_missed_in_pages() -> None:
    talk = Talk(3).open(required=2)
    for step in range(20):
        talk.final(step, 0, 1, metadata=f"of {step}")
    first = talk.say(2, "Sync", have=0)[0][1]["updates"]
    assert [update["step"] for update in first] == list(range(16))
    assert (first[3]["metadata"], first[3]["contributors"]) == ("of 3", [[0, 1]])
    assert [update["step"] for update in talk.say(2, "Sync", have=16)[0][1]["updates"]] == [16, 17, 18, 19]


def test_only_final_updates_are_history() -> None:
    talk = Talk(3).open(required=2)
    talk.arrive(0, 0)
    talk.arrive(1, 0)
    assert talk.say(2, "Sync", have=0) == []
    talk.say(0, "Done", step=0)
    assert told(talk.say(1, "Done", step=0)) == [(0, "Final"), (1, "Final"), (2, "History")]


def test_all_have_tells_what_journals_may_forget() -> None:
    talk = Talk(3).open(required=2)
    for step in range(3):
        talk.final(step, 0, 1)
    talk.say(2, "Sync", have=2)
    talk.arrive(0, 3)
    assert talk.arrive(1, 3)[0][1]["outlook"]["all_have"] == 2


def test_beyond_the_journal_the_others_wait_and_a_warning_names_the_rank() -> None:
    talk = Talk(3).open(required=2, max_lag=2)
    for step in range(2):
        talk.final(step, 0, 1)
    talk.arrive(0, 2)
    assert talk.arrive(1, 2) == []
    held = talk.recorded("held")
    assert (len(held), held[0]["ranks"]) == (1, [2])
    assert held[0]["reason"].startswith("rank 2 is 2 updates behind, at step 0, and the journal holds max_lag=2")
    talk.tick()
    assert len(talk.recorded("held")) == 1, "said once"
    assert told(talk.say(2, "Sync", have=0)) == [(2, "History")]
    assert list(decisions(talk.say(2, "Sync", have=2))) == [0, 1]


# --- rounds -------------------------------------------------------------------------------------------------------


def test_a_followed_round_ends_after_the_longest_length() -> None:
    talk = Talk(2).open(required=2)
    talk.follow(1, 2)
    talk.final(0, 0, 1)
    assert talk.say(0, "Sync", have=1) == [
        (0, {"channel": 0, "outlook": {"round_end": 2, "all_have": 0, "beyond": False}, "message": "Resume"})
    ]
    talk.say(0, "Away")
    assert list(decisions(talk.arrive(1, 1))) == [1]
    assert told(talk.say(1, "Done", step=1)) == []
    over = talk.say(1, "Sync", have=2)
    outlook = {"round_end": 2, "all_have": 1, "beyond": False}
    assert over == [(1, {"channel": 0, "round": 0, "end": 2, "outlook": outlook, "message": "Over"})]
    assert told(talk.say(0, "Sync", have=1)) == [(0, "History")]
    assert told(talk.say(0, "Sync", have=2)) == [(0, "Over")]
    assert [record["step"] for record in talk.recorded("round_over")] == [2]


def test_a_longer_length_that_is_told_late_makes_the_round_longer() -> None:
    talk = Talk(2).open(required=1)
    talk.follow(1, 1)
    talk.final(0, 0, 1)
    talk.say(0, "Sync", have=1)
    talk.say(1, "Sync", have=1)
    talk.say(0, "BeginRound", round=1, length=1)
    talk.say(1, "BeginRound", round=1, length=3)
    talk.final(1, 0, round=1)
    talk.say(0, "Away", round=1)
    assert talk.say(0, "Sync", have=2, round=1) == []
    assert list(decisions(talk.arrive(1, 1, round=1))) == [], "late for step 1"
    talk.say(1, "Sync", have=1, round=1)
    assert talk.say(1, "Sync", have=2, round=1)[0][1]["outlook"]["round_end"] == 4


def test_with_unknown_lengths_a_round_ends_when_all_are_away() -> None:
    talk = Talk(2).open(required=1)
    talk.follow(-1, -1)
    talk.final(0, 0)
    talk.say(0, "Away")
    assert talk.say(0, "Sync", have=1) == []
    assert told(talk.say(1, "Away")) == [(0, "Over")]


def test_who_has_joined_counts_as_zeros_and_applies_the_updates_of_the_others_until_all_have() -> None:
    talk = Talk(3).open(required=3)
    talk.final(0, 0, 1, 2)
    talk.say(0, "Sync", have=1)
    talk.say(0, "Join")
    assert talk.say(0, "Sync", have=1) == []
    talk.arrive(1, 1)
    decided = decisions(talk.arrive(2, 1))
    assert list(decided) == [1, 2] and decided[1]["samples"] == 3.0, "the mean is over all, as with Horovod"
    talk.say(1, "Done", step=1)
    assert told(talk.say(2, "Done", step=1)) == [(0, "History")]
    talk.say(1, "Leave")  # and comes back: rounds that end meanwhile are nothing to rank 0
    talk.say(2, "Leave")
    assert told(talk.say(1, "Sync", have=2)) == [(1, "Over")]
    assert told(talk.say(2, "Sync", have=2)) == [(2, "Over")]
    assert talk.say(0, "Sync", have=2) == []
    talk.final(2, 1, 2, round=1)
    talk.say(1, "Join")
    talk.say(0, "Sync", have=3)
    said = talk.say(2, "Join")
    assert told(said) == [(0, "Over"), *((rank, "Joined") for rank in range(3))]
    assert said[0][1]["round"] == 1
    assert told(talk.say(1, "Sync", have=3, round=1)) == [(1, "Over")]
    assert list(decisions(talk.final(3, 0, 1, 2, round=2))) == []
    assert talk.recorded("decision")[-1]["ranks"] == [0, 1, 2]


def test_a_gradient_after_the_end_of_the_round_is_dropped_and_on_record() -> None:
    talk = Talk(2).open(required=2)
    talk.arrive(0, 0)
    said = talk.say(1, "Leave")
    assert told(said) == [(0, "Late")]
    assert talk.recorded("dropped")[0]["reason"] == "its round is over"
    assert told(talk.say(0, "Sync", have=0)) == [(0, "Over")]
    assert told(talk.say(1, "Sync", have=0)) == [(1, "Over")]


def test_a_step_that_is_decided_in_part_is_finished_before_the_round_ends() -> None:
    talk = Talk(3).open(required=2)
    both = {"scopes": 2, "buckets": 2}
    for rank in (0, 1):
        talk.arrive(rank, 0, scope=0, **both)
    assert talk.say(2, "Leave") == []
    for rank in (0, 1):
        said = talk.arrive(rank, 0, scope=1, **both)
    assert list(decisions(said)) == [0, 1]
    for rank, scope in itertools.product((0, 1), (0, 1)):
        assert talk.recorded("round_over") == []
        talk.say(rank, "Done", step=0, scope=scope)
    assert [record["step"] for record in talk.recorded("round_over")] == [1]


def test_different_align_every_is_an_error_on_every_rank() -> None:
    talk = Talk(2).open()
    talk.say(0, "BeginRound", length=4, align_every=2)
    said = talk.say(1, "BeginRound", length=4, align_every=3)
    assert told(said) == [(0, "Failed"), (1, "Failed")]
    assert "rank 1 follows 'it' with align_every=3, another rank with 2" in said[0][1]["reason"]


def test_nobody_goes_on_from_a_meeting_before_all_are_there() -> None:
    talk = Talk(3).open(required=2)
    talk.follow(4, 4, 4, align_every=2)
    for step in range(2):
        talk.final(step, 0, 1)
    talk.arrive(0, 2)
    assert talk.arrive(1, 2) == []
    talk.say(2, "Sync", have=0)
    page = talk.say(2, "Sync", have=0)
    assert [update["step"] for update in page[0][1]["updates"]] == [0, 1]
    said = talk.say(2, "Sync", have=2)
    assert told(said) == [(0, "Decision"), (1, "Decision"), (2, "Resume")], "it sees the step at which all meet"


# --- leaving ------------------------------------------------------------------------------------------------------


def test_one_that_leaves_the_program_ends_the_round_for_all() -> None:
    talk = Talk(3).open(required=2)
    talk.final(0, 0, 1)
    talk.arrive(0, 1)
    assert told(talk.say(2, "Exit")) == [(0, "Late")]
    assert told(talk.say(0, "Sync", have=1)) == [(0, "Over")]


def test_one_that_fails_is_done_without_if_there_are_backup_workers() -> None:
    talk = Talk(3).open(required=2)
    talk.arrive(0, 0)
    assert talk.say(2, "Exit", failure="ValueError: no") == []
    assert list(decisions(talk.arrive(1, 0))) == [0, 1]
    assert talk.recorded("gone")[0]["reason"] == "ValueError: no"


def test_one_that_fails_fails_the_others_if_all_are_required() -> None:
    talk = Talk(3).open(required=3)
    talk.final(0, 0, 1, 2)
    said = talk.say(2, "Exit", failure="ValueError: no")
    assert told(said) == [(0, "Failed"), (1, "Failed")]
    assert said[0][1]["reason"] == (
        "rank 2 has left at step 1 (ValueError: no), and 'it' needs all ranks (no backup workers)"
    )


@pytest.mark.parametrize("failure", ["", "ValueError: no"])
def test_a_collective_of_all_ranks_fails_when_one_has_gone(failure: str) -> None:
    talk = Talk(2).open("collective", required=2)
    said = talk.say(1, "Exit", failure=failure)
    said += talk.arrive(0, 0)
    failed = [body for to, body in said if (to, body["message"]) == (0, "Failed")]
    assert len(failed) == 1
    assert "rank 1 has left" in failed[0]["reason"]
    assert failure in failed[0]["reason"]
    assert "needs all ranks" in failed[0]["reason"]


def test_all_are_told_when_all_have_gone() -> None:
    talk = Talk(2).open()
    assert talk.say(1, "Exit") == []
    assert told(talk.say(0, "Exit")) == [(0, "AllGone"), (1, "AllGone")]


def test_a_gradient_that_is_taken_back_before_the_decision_is_not_in_it() -> None:
    talk = Talk(3).open(required=2)
    talk.arrive(0, 0)
    assert talk.say(0, "Withdraw", step=0) == []
    assert talk.arrive(1, 0) == []
    assert list(decisions(talk.arrive(2, 0))) == [1, 2]


def test_a_gradient_that_is_taken_back_after_the_decision_is_replaced() -> None:
    talk = Talk(4).open(required=3)
    for rank, samples in enumerate([0.1, 0.2, 0.3]):
        said = talk.arrive(rank, 0, samples=samples, metadata=f"of {rank}")
    first = decisions(said)[1]
    talk.say(1, "Done", step=0)
    second = talk.say(0, "Withdraw", step=0)
    assert list(decisions(second)) == [1, 2]
    decision = second[0][1]
    assert (decision["attempt"], decision["contributors"]) == (1, [1, 2])
    assert (decision["weights"], decision["samples"], decision["metadata"]) == ([0.2, 0.3], 0.5, "of 1")
    assert decision["tag"] >= first["tag"] + 2
    assert talk.recorded("replaced")[0]["ranks"] == [0]
    talk.say(2, "Done", step=0, attempt=0)
    talk.say(2, "Done", step=0, attempt=1)
    assert talk.recorded("final") == [], "what was done in the first attempt does not count"
    talk.say(1, "Done", step=0, attempt=1)
    assert len(talk.recorded("final")) == 1


def test_without_backup_workers_a_gradient_that_is_taken_back_fails_all() -> None:
    talk = Talk(3).open(required=3)
    for rank in range(3):
        talk.arrive(rank, 0)
    said = talk.say(0, "Withdraw", step=0)
    assert told(said) == [(0, "Failed"), (1, "Failed"), (2, "Failed")]
    assert "rank 0 has left in the middle of step 0 of 'it', which needs all ranks" in said[1][1]["reason"]


def test_when_all_contributors_have_withdrawn_the_update_is_empty_and_final() -> None:
    talk = Talk(2).open(required=1)
    talk.arrive(0, 0)
    assert talk.say(0, "Withdraw", step=0) == []
    assert len(talk.recorded("final")) == 1
    updates = talk.say(1, "Sync", have=0)[0][1]["updates"]
    assert updates == [{"step": 0, "contributors": [[]], "samples": 0.0, "required": 1, "metadata": ""}]


def test_what_is_final_cannot_be_taken_back() -> None:
    talk = Talk(2).open(required=1)
    talk.final(0, 0)
    assert talk.say(0, "Withdraw", step=0) == []
    assert talk.say(1, "Sync", have=0)[0][1]["updates"][0]["contributors"] == [[0]]


# --- collectives --------------------------------------------------------------------------------------------------


def test_a_late_rank_gets_one_result_for_each_call() -> None:
    talk = Talk(2).open("collective", required=1)
    for step in range(3):
        talk.final(step, 0)
    assert told(talk.arrive(1, 0)) == [(1, "Late")]
    assert len(talk.say(1, "Sync", have=0)[0][1]["updates"]) == 1
    talk.arrive(1, 1)
    assert [update["step"] for update in talk.say(1, "Sync", have=1)[0][1]["updates"]] == [1]


def test_a_rank_in_a_full_collective_is_not_waited_for() -> None:
    talk = Talk(3).open("collective", required=2).open("collective", "meeting", required=3)
    talk.arrive(0, 0)
    talk.say(1, "Pause")
    assert decisions(talk.arrive(1, 0, channel=1)) == {}, "it waits there for the others"
    assert list(decisions(talk.say(2, "Pause"))) == [0]


def test_after_a_full_collective_all_are_counted_on_again() -> None:
    talk = Talk(3).open("collective", "meeting", required=3).open("collective", "first_n", required=2)
    for rank in range(3):
        talk.say(rank, "Pause")
        talk.arrive(rank, 0)
    assert len(talk.recorded("decision")) == 1
    assert talk.arrive(0, 0, channel=1) == [], "it waits for one more of them"
    assert list(decisions(talk.arrive(1, 0, channel=1))) == [0, 1]


def test_joined_ranks_are_done_without_however_far_the_others_go() -> None:
    talk = Talk(2).open("collective", required=2, max_lag=1)
    assert talk.say(1, "Join") == []
    for step in range(5):
        assert list(decisions(talk.arrive(0, step))) == [0]
        talk.say(0, "Done", step=step)
    assert talk.say(0, "Join") == [(0, {"last": 0, "message": "Joined"}), (1, {"last": 0, "message": "Joined"})]


def test_joining_waits_for_those_that_are_left_alone() -> None:
    talk = Talk(3)
    talk.say(0, "Join")
    talk.say(2, "Join")
    assert talk.say(1, "Exit") == [(0, {"last": 2, "message": "Joined"}), (2, {"last": 2, "message": "Joined"})]


# --- what is no message for it ------------------------------------------------------------------------------------


def test_messages_for_members_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not for the coordinator"):
        Talk(1).say(0, "Resume")


def test_an_unknown_channel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unknown channel 7"):
        Talk(2).open().say(0, "Sync", channel=7)


# --- standing still -----------------------------------------------------------------------------------------------


def test_who_waits_for_whom_is_said_after_a_while_and_again() -> None:
    talk = Talk(3, stall_check_us=1_000_000).open(required=3)
    talk.final(0, 0, 1, 2)
    talk.now = 500_000
    talk.arrive(0, 1)
    talk.now = 900_000
    talk.arrive(2, 1)
    assert talk.coordinator.next_deadline() == 1_500_000
    for seconds in (1, 2, 3):
        talk.now = 500_000 + seconds * 1_000_000
        talk.tick()
        assert len(talk.recorded("stalled")) == seconds
    stalled = talk.recorded("stalled")[-1]
    assert (stalled["step"], stalled["ranks"]) == (1, [0, 2])
    assert stalled["reason"] == (
        "ranks 0, 2 have waited for 3 s at step 1 (N = 3): "
        "rank 1 is at step 1, and was last heard with its gradient for step 0"
    )
    talk.arrive(1, 1)
    assert talk.coordinator.next_deadline() is None


def test_who_waits_for_others_to_create_an_optimizer_is_said() -> None:
    talk = Talk(3, stall_check_us=1_000_000)
    talk.say(1, "Open", name="it", wait_for_all=True, options={"required": 3})
    talk.now = 1_000_000
    talk.tick()
    (stalled,) = talk.recorded("stalled")
    assert stalled["reason"] == (
        "rank 1 has waited for 1 s at step 0 for all ranks to create it: "
        "rank 0 has not created it; rank 2 has not created it"
    )


@pytest.mark.parametrize(("kind", "where"), [("Away", "has left the loop"), ("Join", "has joined")])
def test_a_rank_that_waits_is_told_where_the_others_are(kind: str, where: str) -> None:
    talk = Talk(3, stall_check_us=1_000_000).open(required=3)
    talk.follow(5, 5, -1)
    talk.arrive(0, 0)
    talk.say(1, kind)
    talk.now = 1_000_000
    talk.tick()
    assert (
        f"rank 1 {where}; rank 2 is at step 0, and was last heard before its" in talk.recorded("stalled")[0]["reason"]
    )
