"""Which ranks' GPUs exchange data directly (csrc/control/device_groups.h): groups are formed, broken up, and formed
anew, and nobody ever waits for one. Said by hand to the real coordinator, with a manual clock."""

from typing import Any

import pytest

from tests.control_talk import Said, Talk

REST_US = 5_000_000
FORMING_US = 60_000_000
SILENCE_US = 10_000_000


def of_kind(said: Said, kind: str) -> list[tuple[int, dict[str, Any]]]:
    return [(to, body) for to, body in said if body["message"] == kind]


class Group:
    """A conversation about gradients on GPUs."""

    def __init__(
        self, size: int, required: int = 2, survives_losses: bool = False, on_device: bool = True, **more: bool
    ) -> None:
        self.talk = Talk(size, survives_losses=survives_losses)
        for rank in range(size):
            options = {"required": required, "max_lag": 64, **more}
            self.talk.say(rank, "Open", name="it", kind=0, options=options, on_device=on_device)
        self.ranks = range(size)

    def all_can(self, *means: str, **why_not: str) -> Said:
        """means: of each rank; "nccl" if none are given."""
        said: Said = []
        for rank in self.ranks:
            by = means[rank] if means else "nccl"
            said += self.talk.say(rank, "CanGroup", why_not=why_not.get(f"rank{rank}", ""), means=by)
        return said

    def formed(self, group: int, *ranks: int) -> Said:
        said: Said = []
        for rank in ranks or self.ranks:
            said += self.talk.say(rank, "Formed", group=group)
        return said

    def decide(self, step: int, *ranks: int) -> dict[str, Any]:
        """The decision on these arrivals."""
        said: Said = []
        for rank in ranks:
            said += self.talk.arrive(rank, step)
        decisions = of_kind(said, "Decision")
        assert [to for to, _ in decisions] == list(ranks)
        return decisions[0][1]

    def finish(self, step: int, *ranks: int) -> Said:
        said: Said = []
        for rank in ranks:
            said += self.talk.say(rank, "Done", step=step)
        return said

    def overdue(self, step: int, silent: int, *others: int) -> Said:
        """An attempt takes too long, and one of its contributors does not answer."""
        talk = self.talk
        talk.now += 2_000_000
        talk.tick()
        for rank in others:
            talk.say(rank, "Progress", step=step)
        talk.now += 20_000
        return talk.tick()


def test_a_group_of_all_serves_once_all_have_formed_it() -> None:
    group = Group(3)
    said = group.all_can()
    forms = of_kind(said, "Form")
    assert [to for to, _ in forms] == [0, 1, 2]
    assert all(
        body == {"message": "Form", "group": 1, "members": [0, 1, 2], "name": "a new group"} for _, body in forms
    )
    group.formed(1, 0, 1)
    assert group.decide(0, 0, 1)["group"] == 0, "rank 2 is not there yet"
    group.finish(0, 0, 1)
    group.formed(1, 2)
    assert group.decide(1, 0, 1)["group"] == 1
    assert group.talk.coordinator.take_news() == ["the GPUs of ranks 0, 1, 2 exchange data directly (NCCL)"]


def test_nothing_is_formed_before_all_have_said_whether_they_can() -> None:
    group = Group(3)
    assert not group.talk.say(0, "CanGroup", means="nccl")
    assert not group.talk.say(2, "CanGroup", means="nccl")
    said = group.talk.say(1, "CanGroup", why_not="no NCCL", means="nccl")
    assert [(to, body["members"]) for to, body in of_kind(said, "Form")] == [(0, [0, 2]), (2, [0, 2])]
    assert group.talk.coordinator.take_news() == ["rank 1 cannot exchange data between GPUs directly: no NCCL"]
    group.formed(1, 0, 2)
    assert group.decide(0, 0, 1)["group"] == 0
    group.finish(0, 0, 1)
    assert group.decide(1, 0, 2)["group"] == 1


def test_a_group_by_mpi_needs_no_name() -> None:
    group = Group(3)
    forms = of_kind(group.all_can("mpi", "mpi", "mpi"), "Form")
    assert [(to, body["name"]) for to, body in forms] == [(0, ""), (1, ""), (2, "")]
    group.formed(1)
    assert group.decide(0, 0, 1)["group"] == 1
    assert group.talk.coordinator.take_news() == ["the GPUs of ranks 0, 1, 2 exchange data directly (CUDA-aware MPI)"]


@pytest.mark.parametrize(
    ("means", "members", "name"),
    [(("nccl", "mpi", "nccl"), [0, 2], "a new group"), (("mpi", "nccl", "mpi"), [0, 2], ""), (("mpi", "nccl"), [], "")],
)
def test_a_group_is_of_those_with_the_means_of_the_lowest_that_can(
    means: tuple[str, ...], members: list[int], name: str
) -> None:
    group = Group(len(means))
    forms = of_kind(group.all_can(*means), "Form")
    assert [(to, body["members"], body["name"]) for to, body in forms] == [(to, members, name) for to in members]
    (told,) = group.talk.coordinator.take_news()
    words = {"nccl": "NCCL", "mpi": "CUDA-aware MPI"}
    assert told == (
        f"rank 1 cannot exchange data between GPUs directly: it can by {words[means[1]]}, rank 0 by {words[means[0]]}"
    )


def test_when_no_group_can_be_named_none_is_formed() -> None:
    group = Group(2, required=1)
    group.talk.coordinator.cannot_name_groups("NCCL: naming a group: no socket interface found")
    assert not of_kind(group.all_can(), "Form")
    assert group.talk.coordinator.take_news() == [
        "GPUs cannot exchange data directly: NCCL: naming a group: no socket interface found"
    ]
    assert group.decide(0, 0)["group"] == 0


def test_one_that_can_is_no_group() -> None:
    assert not of_kind(Group(3).all_can(rank1="no NCCL", rank2="no NCCL"), "Form")


def test_gradients_in_host_memory_are_not_served() -> None:
    group = Group(2, on_device=False, required=1)
    group.all_can()
    group.formed(1)
    assert group.decide(0, 0)["group"] == 0


def test_groups_serve_also_when_what_they_do_is_measured() -> None:
    group = Group(3, automatic=True)
    group.all_can()
    group.formed(1)
    assert group.decide(0, 0, 1, 2)["group"] == 1


def test_a_group_whose_contributor_has_stopped_is_disbanded_and_the_next_is_formed_later_without_it() -> None:
    group = Group(4, required=3)
    group.all_can()
    group.formed(1)
    assert group.decide(0, 0, 1, 2)["group"] == 1
    group.talk.arrive(3, 0)
    said = group.overdue(0, 2, 0, 1)
    assert [(to, body["group"]) for to, body in of_kind(said, "Disband")] == [(r, 1) for r in range(4)]
    again = of_kind(said, "Decision")
    assert [to for to, _ in again] == [0, 1, 3]
    assert again[0][1]["attempt"] == 1 and again[0][1]["group"] == 0
    assert not of_kind(said, "Form")
    group.talk.now += REST_US
    forms = of_kind(group.talk.tick(), "Form")
    assert [(to, body["group"], body["members"]) for to, body in forms] == [(r, 2, [0, 1, 3]) for r in (0, 1, 3)]


def test_when_who_had_stopped_is_back_a_larger_group_takes_the_place_of_the_smaller_one() -> None:
    group = Group(4, required=3)
    group.all_can()
    group.formed(1)
    group.decide(0, 0, 1, 2)
    group.talk.arrive(3, 0)
    group.overdue(0, 2, 0, 1)
    for rank in (0, 1, 3):
        group.talk.say(rank, "Done", step=0, attempt=1)
    group.talk.now += REST_US
    group.talk.tick()
    group.formed(2, 0, 1, 3)
    assert group.decide(1, 0, 1, 3)["group"] == 2
    said = group.talk.say(2, "Arrive", step=1, base=1)
    assert [body["members"] for _, body in of_kind(said, "Form")] == [[0, 1, 2, 3]] * 4
    assert not of_kind(group.formed(3), "Disband"), "the smaller one still serves step 1"
    assert [(to, body["group"]) for to, body in of_kind(group.finish(1, 0, 1, 3), "Disband")] == [
        (0, 2),
        (1, 2),
        (3, 2),
    ]


def test_a_lost_rank_takes_its_group_with_it() -> None:
    group = Group(3, survives_losses=True)
    group.all_can()
    group.formed(1)
    assert group.decide(0, 0, 1)["group"] == 1
    said = group.talk.lose(2)
    assert [(to, body["group"]) for to, body in of_kind(said, "Disband")] == [(0, 1), (1, 1)]
    assert [(body["attempt"], body["group"]) for _, body in of_kind(said, "Decision")] == [(1, 0)] * 2
    group.talk.now += REST_US
    assert [body["members"] for _, body in of_kind(group.talk.tick(), "Form")] == [[0, 1]] * 2


def test_a_group_that_fails_on_one_rank_is_disbanded_and_given_up_after_three_times() -> None:
    group = Group(3)
    group.all_can()
    for number in (1, 2, 3):
        assert group.talk.coordinator.take_news() == []
        said = group.talk.say(1, "Formed", group=number, failure="no peer access")
        assert [to for to, _ in of_kind(said, "Disband")] == [0, 1, 2]
        assert "rank 1 has left the group of ranks 0, 1, 2" in group.talk.coordinator.take_news()[0]
        group.talk.now += REST_US
        assert bool(of_kind(group.talk.tick(), "Form")) == (number < 3)


def test_a_failure_in_the_middle_begins_the_attempt_anew_with_the_same_contributors() -> None:
    group = Group(3)
    group.all_can()
    group.formed(1)
    group.decide(0, 0, 1)
    said = group.talk.say(1, "Formed", group=1, failure="a link is down")
    again = of_kind(said, "Decision")
    assert [(to, body["attempt"], body["group"], body["contributors"]) for to, body in again] == [
        (0, 1, 0, [0, 1]),
        (1, 1, 0, [0, 1]),
    ]


def test_a_group_in_which_all_wait_for_each_other_is_disbanded() -> None:
    group = Group(3)
    group.all_can()
    group.formed(1)
    group.decide(0, 0, 1)
    said: Said = []
    for _ in range(SILENCE_US // 1_000_000):
        group.talk.now += 1_000_100
        ticked = group.talk.tick()
        said += ticked
        for to, _ in of_kind(ticked, "Probe"):
            said += group.talk.say(to, "Progress", step=0)
    assert of_kind(said, "Disband")
    assert [(body["attempt"], body["group"]) for _, body in of_kind(said, "Decision")] == [(1, 0)] * 2
    assert "wait for each other without end" in group.talk.coordinator.take_news()[-1]


def test_who_does_not_form_its_group_in_time_is_left_out_until_it_arrives() -> None:
    group = Group(4)
    group.all_can()
    group.formed(1, 0, 1, 2)
    group.talk.now += FORMING_US
    assert [to for to, _ in of_kind(group.talk.tick(), "Disband")] == [0, 1, 2, 3]
    group.talk.now += REST_US
    assert [body["members"] for _, body in of_kind(group.talk.tick(), "Form")] == [[0, 1, 2]] * 3
    group.formed(2, 0, 1, 2)
    assert [body["members"] for _, body in of_kind(group.talk.arrive(3, 0), "Form")] == [[0, 1, 2, 3]] * 4
