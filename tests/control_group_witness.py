"""Checks what the coordinator says about groups of GPUs (csrc/control/device_groups.h) in tests/control_world.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.control_rank import check

if TYPE_CHECKING:
    from tests.control_world import World

Body = dict[str, Any]
Key = tuple[str, int, int]  # channel, step, scope
SILENCE_US = 10_000_000
FORMING_US = 60_000_000


class GroupWitness:
    """Its own model of the groups is made of the messages alone."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.able: set[int] = set()  # who has said so
        self.members: dict[int, list[int]] = {}
        self.asked_at: dict[int, int] = {}  # to form it
        self.formed: dict[int, set[int]] = {}  # who has said so
        self.retired: set[int] = set()  # another one has come in its place
        self.disbanded: set[int] = set()
        self.told: set[tuple[str, int, int]] = set()  # Form or Disband, group, rank
        self.serves: dict[Key, tuple[int, int]] = {}  # attempts in work: in which group, since when
        self.may_go: set[int] = set()  # groups of which what has just happened is the end
        self.out: set[int] = set()  # and ranks: of the groups that they are in

    # --- what the coordinator gets to know, before it does ---

    def hear(self, r: int, body: Body) -> None:
        kind = body["message"]
        if kind == "CanGroup" and not body["why_not"]:
            self.able.add(r)
        elif kind == "Formed" and body["failure"]:
            self.may_go.add(body["group"])
        elif kind == "Formed" and body["group"] not in self.disbanded:
            self._formed(r, body["group"])
        elif kind in ("Withdraw", "Exit"):
            self.may_go |= {group for group, _ in self.serves.values()}

    def lost(self, r: int) -> None:
        self.out.add(r)

    # --- what it says ---

    def said(self, records: list[Body], replies: list[tuple[int, Body]]) -> None:
        """After one event."""
        left = set()  # groups that contributors have not come to the end with
        for record in records:
            if record["event"] in ("replaced", "stopped"):
                self.out |= set(record["ranks"])
            key = record["channel"], record["step"], record["scope"]
            if key in self.serves and (record["event"] == "stopped" or record["attempt"] > 0):
                left.add(self.serves[key][0])
        for _, body in replies:
            if body["message"] == "Final":
                self.serves.pop(self._key(body), None)
            elif body["message"] == "Failed":
                self.serves = {key: each for key, each in self.serves.items() if key[0] != body["name"]}
        in_work = set(self.serves.values())
        for to, body in replies:
            if body["message"] == "Form":
                self._form(to, body)
            elif body["message"] == "Decision":
                self._decision(body)
            elif body["message"] == "Disband":
                self._disband(to, body, in_work)
        for key, (group, _) in self.serves.items():
            check(group not in self.disbanded, f"I6: group {group} is gone, and {key} is not begun anew")
        check(left <= self.disbanded, f"I6: what was begun in {left} will not end, and they are not disbanded")
        for group in self.retired - self.disbanded - {group for group, _ in self.serves.values()}:
            check(False, f"I5: group {group} is not used any more, and not disbanded")
        self.may_go.clear()
        self.out.clear()

    def end(self) -> None:
        """At the end: all know of the same groups, and what has failed is gone."""
        assert self.world.gpus is not None
        for rank, gpu in zip(self.world.ranks, self.world.gpus.of, strict=True):
            for group, here in {} if rank.dead else gpu.groups.items():
                check(group not in self.disbanded, f"I5: rank {rank.rank} still keeps group {group}")
                check(not here.failed, f"I6: group {group} has failed on rank {rank.rank}, and is not disbanded")
                lost = [member for member in here.members if self.world.ranks[member].found_dead]
                check(not lost, f"I6: ranks {lost} of group {group} have died, and it is not disbanded")

    # --- inside ---

    def _key(self, body: Body) -> Key:
        return self.world.name_of(body["channel"]), body["step"], body["scope"]

    def _formed(self, r: int, group: int) -> None:
        self.formed[group].add(r)
        if len(self.formed[group]) == len(self.members[group]):
            whole = {each for each, members in self.members.items() if len(self.formed[each]) == len(members)}
            self.retired |= whole - self.disbanded - {group}

    def _form(self, to: int, body: Body) -> None:
        group, members = body["group"], body["members"]
        self._told_once("Form", group, to)
        check(to in members and len(members) > 1 and members == sorted(set(members)), f"to rank {to}: {body}")
        check(set(members) <= self.able, f"not all of them can: {body}")
        check(not any(self.world.ranks[member].found_dead for member in members), f"with a rank that has died: {body}")
        check(self.members.setdefault(group, members) == members, f"before it was {self.members[group]}: {body}")
        self.asked_at.setdefault(group, self.world.now)
        self.formed.setdefault(group, set())

    def _decision(self, body: Body) -> None:
        group = body["group"]
        if not group:
            self.serves.pop(self._key(body), None)
            return
        check(body["attempt"] == 0, f"what is begun anew is in a group: {body}")
        check(body["votes"], f"I4: in a group, and it could not be begun anew: {body}")
        check(group in self.members and group not in self.disbanded | self.retired, f"there is no such group: {body}")
        members = self.members[group]
        check(set(body["contributors"]) <= set(members), f"the group is of {members}: {body}")
        check(self.formed[group] == set(members), f"only {self.formed[group]} of {members} have formed it: {body}")
        self.serves[self._key(body)] = group, self.world.now

    def _disband(self, to: int, body: Body, in_work: set[tuple[int, int]]) -> None:
        group, now = body["group"], self.world.now
        self._told_once("Disband", group, to)
        check(("Form", group, to) in self.told, f"rank {to} is not in it: {body}")
        since = [began for each, began in in_work if each == group]
        is_formed = len(self.formed[group]) == len(self.members[group])
        if is_formed:
            may_go = (group in self.retired and not since) or any(now - began >= SILENCE_US for began in since)
        else:
            may_go = now - self.asked_at[group] >= FORMING_US
        may_go = may_go or group in self.may_go or bool(self.out & set(self.members[group]))
        check(may_go, f"for no reason, while it serves {len(since)} attempts: {body}")
        self.disbanded.add(group)

    def _told_once(self, kind: str, group: int, rank: int) -> None:
        check((kind, group, rank) not in self.told, f"rank {rank} is told again: {kind} of group {group}")
        self.told.add((kind, group, rank))
