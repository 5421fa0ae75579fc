"""GPUs for the ranks in tests/control_world.py, and what an engine does with its own (csrc/engine/device_work.h).

A group is formed once all its members try to. What a rank begins in its groups goes into the one queue of its GPU,
where only the first is at work. A reduction ends on a rank where it is at work, once it is, or was, at all its
contributors. On a rank whose group has failed, or is disbanded, nothing more of it ends; in a group that hangs, nothing
on any rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hvd_backup._core_testing import compose

from tests.control_rank import Line, check

if TYPE_CHECKING:
    from tests.control_world import Event, World

Body = dict[str, Any]


@dataclass(frozen=True)
class GpuPlan:
    """What the GPUs do.

    why_not: of each rank, why it cannot be in a group; empty: it can.
    failures, hangs: so many times at most a group fails on a rank, or hangs, when the schedule says so.
    backwards: ranks whose first bucket is followed by the last one, and so on back, which holds up what is begun.
    first: the programs wait until the first group is formed, so that more is done in groups.
    """

    why_not: tuple[str, ...]
    failures: int = 0
    hangs: int = 0
    backwards: frozenset[int] = frozenset()
    first: bool = False


@dataclass
class Group:
    """A group, as one of its members knows it until it is disbanded. waiting: announced and not begun, by tag."""

    members: list[int]
    formed: bool = False
    failed: bool = False
    waiting: dict[int, tuple[Line, int]] = field(default_factory=dict)


class Gpu:
    """One rank's."""

    def __init__(self, gpus: Gpus, rank: int, why_not: str) -> None:
        self.gpus, self.rank, self.why_not = gpus, rank, why_not
        self.has_said = False
        self.has_tried = False  # to form a group, whatever became of it
        self.groups: dict[int, Group] = {}
        self.queue: list[tuple[int, int]] = []  # group and tag
        self.begun: list[tuple[int, int]] = []  # all that ever was in it
        self.ended: set[int] = set()  # tags

    def say(self) -> None:
        self.has_said = True
        self._send("CanGroup", why_not=self.why_not)

    def hear(self, body: Body) -> None:
        group = body["group"]
        if body["message"] == "Form":
            check(self.has_said and not self.why_not, f"rank {self.rank} cannot form a group: {body}")
            self.groups[group] = Group(body["members"])
        elif group in self.groups:
            self.abort(group, "")
            del self.groups[group]

    def is_about_to_form(self, group: int) -> bool:
        here = self.groups[group]
        if here.formed or here.failed or group in self.gpus.hung:
            return False
        ranks = self.gpus.world.ranks
        others = [(ranks[member], self.gpus.of[member].groups.get(group)) for member in here.members]
        return all(there and not there.failed and (there.formed or not rank.stopped) for rank, there in others)

    def has_formed(self, group: int) -> None:
        self.groups[group].formed = self.has_tried = True
        self._send("Formed", group=group)
        self.go_on()

    def abort(self, group: int, failure: str) -> None:
        """What is ahead of it in the queue may be stuck, and fails, too."""
        order = [each for each, _ in self.queue]
        for ahead in order[: order.index(group)] if group in order else []:
            self._fail(ahead, "it was ahead of one that is gone")
        self._fail(group, failure)

    def announce(self, line: Line, decision: Body) -> None:
        group, tag = decision["group"], decision["tag"]
        check(decision["attempt"] == 0, f"rank {self.rank} is to begin anew in a group: {decision}")
        here = self.groups.get(group)
        if here is None or here.failed:
            return
        check(set(decision["contributors"]) <= set(here.members), f"not in the group of {here.members}: {decision}")
        here.waiting[tag] = (line, decision["scope"])

    def give_up(self, decision: Body) -> None:
        """The rank does not take part in it any more: what it has begun cannot be taken back without the group."""
        group, tag = decision["group"], decision["tag"]
        if (group, tag) not in self.queue:
            return
        self.abort(group, f"rank {self.rank} gives up what it had begun")
        for other, _ in list(self.queue):
            self._fail(other, f"rank {self.rank} empties its queue")

    def go_on(self) -> None:
        """Begins what can be: in all groups together in the order of tags, so what is not handed over yet holds up the
        rest."""
        bug = self.gpus.world.bug
        at_hand = [(tag, group) for group, here in self.groups.items() if here.formed for tag in here.waiting]
        for tag, group in sorted(at_hand):
            line, scope = self.groups[group].waiting[tag]
            if not line.has_submitted(scope, tag):
                if bug is not None and not bug.in_order:
                    continue
                break
            del self.groups[group].waiting[tag]
            later = [other for _, other in self.begun if other > tag]
            check(not later, f"rank {self.rank} begins {tag} after {later}")
            self.queue.append((group, tag))
            self.begun.append((group, tag))

    def has_sent(self, decision: Body) -> bool:
        """It is at work here, or has ended."""
        return decision["tag"] in self.ended or self.is_at_work(decision)

    def is_at_work(self, decision: Body) -> bool:
        return self.queue[:1] == [(decision["group"], decision["tag"])]

    def end(self, decision: Body) -> None:
        for rank in decision["contributors"]:
            begun = (decision["group"], decision["tag"]) in self.gpus.of[rank].begun
            check(begun, f"I3: ended on rank {self.rank}, never begun on rank {rank}: {decision}")
        del self.queue[0]
        self.ended.add(decision["tag"])

    def _fail(self, group: int, failure: str) -> None:
        here = self.groups.get(group)
        if here is None or here.failed:
            return
        here.failed = self.has_tried = True
        here.waiting.clear()
        self.queue = [each for each in self.queue if each[0] != group]
        if failure:
            self._send("Formed", group=group, failure=failure)

    def _send(self, kind: str, **fields: object) -> None:
        self.gpus.world.send(self.rank, compose(kind, **fields))


class Gpus:
    """Those of all ranks, and what may happen to them."""

    def __init__(self, world: World, plan: GpuPlan) -> None:
        self.world = world
        self.of = [Gpu(self, rank, why_not) for rank, why_not in enumerate(plan.why_not)]
        self.failures, self.hangs = plan.failures, plan.hangs  # that may still come
        self.hung: set[int] = set()
        self.first = plan.first

    def holds_up(self, r: int) -> bool:
        """Whether the program of this rank waits for a group that is still to come, and will."""
        ranks, gpu = self.world.ranks, self.of[r]
        if not self.first or gpu.has_tried or gpu.why_not or sum(not each.why_not for each in self.of) < 2:
            return False
        return not any(rank.dead or (rank.stopped and not self.of[rank.rank].has_tried) for rank in ranks)

    def events_of(self, r: int) -> list[Event]:
        gpu = self.of[r]
        out: list[Event] = []
        if not gpu.has_said:
            out.append((("says whether its GPU can be in a group: rank", r), gpu.say))
        for group in gpu.groups:
            if gpu.is_about_to_form(group):
                out.append((("has formed: rank", r, "group", group), lambda group=group: gpu.has_formed(group)))
        return out

    def rare_events(self) -> list[Event]:
        out: list[Event] = []
        for gpu in self.of:
            for group, here in gpu.groups.items():
                if self.failures > 0 and not here.failed and not self.world.ranks[gpu.rank].stopped:
                    what = ("fails: on rank", gpu.rank, "group", group)
                    out.append((what, lambda gpu=gpu, group=group: self._fail(gpu, group)))
                if self.hangs > 0 and gpu.rank == here.members[0] and group not in self.hung:
                    out.append((("hangs: group", group), lambda group=group: self._hang(group)))
        return out

    def _fail(self, gpu: Gpu, group: int) -> None:
        self.failures -= 1
        gpu.abort(group, "on purpose")

    def _hang(self, group: int) -> None:
        self.hangs -= 1
        self.hung.add(group)
