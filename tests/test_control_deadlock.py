"""All ranks wait, but in different collectives of all ranks: they are told, and only then."""

from typing import Any

import pytest
from hvd_backup._core_testing import Coordinator, compose, describe

SIZE = 3
NAMES = ("allreduce:a", "allreduce:b", "first_n:c")


class Talk:
    """Three ranks; the third channel is a collective of the first two to arrive."""

    def __init__(self) -> None:
        self.coordinator = Coordinator(SIZE)
        self.failed: dict[str, set[int]] = {}
        for rank in range(SIZE):
            for name in NAMES:
                required = SIZE - 1 if name.startswith("first_n") else SIZE
                self.say(rank, "Open", name=name, kind=1, options={"required": required})

    def say(self, rank: int, what: str, **fields: Any) -> None:
        self.coordinator.receive(rank, compose(what, **fields), 0)
        for to, reply in self.coordinator.take_replies():
            body = describe(reply)
            if body["message"] == "Failed":
                self.failed.setdefault(body["reason"], set()).add(to)

    def block(self, rank: int, channel: int) -> None:
        """The rank calls the collective, and says after a while that it waits."""
        self.say(rank, "Arrive", channel=channel)
        self.say(rank, "Waiting", channel=channel)


def test_ranks_that_wait_for_each_other_are_all_told() -> None:
    talk = Talk()
    talk.block(0, 0)
    talk.block(1, 1)
    assert not talk.failed, "rank 2 may still come to both"
    talk.block(2, 0)
    (told,) = talk.failed
    assert told.endswith("ranks 0, 2 in 'allreduce:a'; rank 1 in 'allreduce:b'")
    assert talk.failed[told] == {0, 1, 2}


@pytest.mark.parametrize("leaving", ["Exit", "Join"])
def test_of_those_that_are_left(leaving: str) -> None:
    talk = Talk()
    talk.block(0, 0)
    talk.block(1, 1)
    talk.say(2, leaving)
    if leaving == "Exit":  # a collective of all ranks ends with the first that leaves
        assert all("rank 2 has left" in told for told in talk.failed) and talk.failed
    else:
        assert any("wait for each other" in told for told in talk.failed)


def test_a_rank_that_has_started_both_is_waited_for() -> None:
    """With allreduce_async: it waits in one, and is there for the other."""
    talk = Talk()
    talk.say(0, "Arrive", channel=1)
    talk.block(0, 0)
    talk.block(1, 1)
    talk.block(2, 1)
    assert not talk.failed, "b is complete, so ranks 1 and 2 go on to a"
    talk.say(1, "Arrive", channel=0)
    talk.say(2, "Arrive", channel=0)
    assert not talk.failed


def test_who_waits_for_the_first_n_is_not_stuck() -> None:
    talk = Talk()
    talk.block(0, 0)
    talk.block(1, 1)
    talk.block(2, 2)
    assert not talk.failed
