"""Bugs to be planted into the protocol, to see that the simulated schedules find each of them.

Each changes what is said on its way between the state machines, or what an engine does around them: the same as if the
one who says it, or who hears it, were wrong.
"""

from __future__ import annotations

from typing import Any

from tests.control_world import Bug

Body = dict[str, Any]


class NoVote(Bug):
    """A contributor applies the update as soon as it has it, without waiting until it is final."""

    def to_member(self, rank: int, body: Body) -> Body:
        return body | {"votes": False} if body["message"] == "Decision" else body


class AnyAttempt(Bug):
    """What was done in an earlier attempt counts for the newest one."""

    def __init__(self) -> None:
        self.newest: dict[tuple[int, int, int], int] = {}

    def to_member(self, rank: int, body: Body) -> Body:
        if body["message"] == "Decision":
            place = (body["channel"], body["step"], body["scope"])
            self.newest[place] = max(self.newest.get(place, 0), body["attempt"])
        return body

    def to_coordinator(self, rank: int, body: Body) -> Body:
        if body["message"] == "Done":
            return body | {"attempt": self.newest[body["channel"], body["step"], body["scope"]]}
        return body


class StaleBase(Bug):
    """A gradient that was computed from older weights is taken for the open step."""

    def __init__(self) -> None:
        self.open = 0

    def to_coordinator(self, rank: int, body: Body) -> Body:
        if body["message"] != "Arrive":
            return body
        self.open = max(self.open, body["step"])
        return body | {"step": self.open, "base": self.open}


class NothingKept(Bug):
    """The journals forget."""

    keeps = False


class HalfKept(Bug):
    """A journal is given up while a rank still misses the update."""

    def to_member(self, rank: int, body: Body) -> Body:
        if "outlook" not in body:
            return body
        return body | {"outlook": body["outlook"] | {"all_have": body["outlook"]["all_have"] + 1}}


class UpdateLeftOut(Bug):
    """A late rank is not told of one of the updates that it has missed."""

    def to_member(self, rank: int, body: Body) -> Body:
        if body["message"] == "History" and len(body["updates"]) > 1:
            return body | {"updates": body["updates"][1:]}
        return body


class OtherContributors(Bug):
    """A late rank is told of other contributors than those of the update."""

    def to_member(self, rank: int, body: Body) -> Body:
        if body["message"] != "History":
            return body
        fewer = [each | {"contributors": [ranks[1:] for ranks in each["contributors"]]} for each in body["updates"]]
        return body | {"updates": fewer}


class OtherSamples(Bug):
    """One contributor divides by something else."""

    def to_member(self, rank: int, body: Body) -> Body:
        return body | {"samples": body["samples"] + 1} if body["message"] == "Decision" and rank == 1 else body


class OtherHyperparameters(Bug):
    """Late ranks use their own, in place of those of the contributors."""

    def to_member(self, rank: int, body: Body) -> Body:
        if body["message"] != "History":
            return body
        return body | {"updates": [each | {"metadata": "mine"} for each in body["updates"]]}


class Unheard(Bug):
    """One kind of message is ignored."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def to_member(self, rank: int, body: Body) -> Body:
        return {} if body["message"] == self.kind else body

    def to_coordinator(self, rank: int, body: Body) -> Body:
        return {} if body["message"] == self.kind else body


class HalfACopy(Bug):
    """A rank makes the copy of its state before it has applied the update that it has taken."""

    whole = False


class NobodyStandsIn(Bug):
    """A late rank ignores that it is needed for the next attempt."""

    def to_member(self, rank: int, body: Body) -> Body:
        return {} if body["message"] == "Decision" and body["attempt"] > 0 else body


class GroupKept(Bug):
    """What is begun anew stays in the group that it was in."""

    def __init__(self) -> None:
        self.groups: dict[tuple[int, int, int], int] = {}

    def to_member(self, rank: int, body: Body) -> Body:
        if body["message"] != "Decision":
            return body
        place = (body["channel"], body["step"], body["scope"])
        return body | {"group": self.groups.setdefault(place, body["group"])}


class FailureUnheard(Bug):
    """That a group has failed on a rank is ignored."""

    def to_coordinator(self, rank: int, body: Body) -> Body:
        return {} if body["message"] == "Formed" and body["failure"] else body


class AllCanGroup(Bug):
    """Why a GPU cannot be in a group is ignored."""

    def to_coordinator(self, rank: int, body: Body) -> Body:
        return body | {"why_not": ""} if body["message"] == "CanGroup" else body


class GroupOfLess(Bug):
    """A group is formed without its last member."""

    def to_member(self, rank: int, body: Body) -> Body:
        return body | {"members": body["members"][:-1]} if body["message"] == "Form" else body


class EndsAlone(Bug):
    """A reduction in a group ends on a rank though another contributor has not begun it."""

    waits_for_others = False


class AnyOrder(Bug):
    """A rank begins what it can in a group, whatever comes before it."""

    in_order = False


BUGS = {
    "no vote": NoVote,
    "votes of any attempt": AnyAttempt,
    "a stale base": StaleBase,
    "nothing kept": NothingKept,
    "given up too early": HalfKept,
    "an update left out": UpdateLeftOut,
    "other contributors": OtherContributors,
    "other samples": OtherSamples,
    "other hyperparameters": OtherHyperparameters,
    "nobody stands in": NobodyStandsIn,
    "half a copy": HalfACopy,
    "a group kept": GroupKept,
    "a group's failure unheard": FailureUnheard,
    "groups of all": AllCanGroup,
    "a group of less": GroupOfLess,
    "ends alone in a group": EndsAlone,
    "any order in a group": AnyOrder,
    **{
        f"{kind} unheard": lambda kind=kind: Unheard(kind)
        for kind in (
            "Final",
            "Late",
            "Withdraw",
            "Away",
            "Probe",
            "Progress",
            "Exit",
            "Offered",
            "StateLost",
            "Disband",
        )
    },
}
