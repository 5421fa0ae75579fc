"""A world of ranks around the real control layer, in which a schedule picks every single event.

The coordinator and the members are the C++ state machines. Simulated are the network (one FIFO queue from each rank to
the coordinator and one back), reductions that complete at each contributor by themselves, fetches, ranks that stop,
GPUs (tests/control_gpus.py), and time. What a training thread does is a generator (tests/control_programs.py): it
yields after each action, so that anything may happen in between. After every event the Witnesses and the Lines check
the invariants; a broken one raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hvd_backup._core_testing import Coordinator, compose, describe

from tests.control_gpus import GpuPlan, Gpus
from tests.control_group_witness import GroupWitness
from tests.control_rank import Applied, ChannelSpec, Line, Rank, check
from tests.control_witness import Witness

Event = tuple[tuple[object, ...], Callable[[], None]]  # in words, which are put together when they are printed
EVENT_US = 20
RARE = 16  # one event in so many is a rare one


class Bug:
    """What is said is changed on its way, or not said at all (empty). This one changes nothing."""

    keeps = True  # journals are kept
    whole = True  # copies of a state are those of the step that is said
    waits_for_others = True  # what is begun in a group ends once the others have begun it
    in_order = True  # it is begun in the order of tags

    def to_coordinator(self, rank: int, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def to_member(self, rank: int, body: dict[str, Any]) -> dict[str, Any]:
        return body


def composed(body: dict[str, Any]) -> bytes:
    fields = {key: value for key, value in body.items() if key != "message"}
    return bytes(compose(body["message"], **fields))


class World:
    """`step(choice)` lets one event happen; `settle()` brings everything to its end."""

    def __init__(
        self, size: int, specs: tuple[ChannelSpec, ...], bug: Bug | None = None, gpus: GpuPlan | None = None
    ) -> None:
        """bug: one that is planted, to see that it is found (tests/control_bugs.py). gpus: None: no rank has one."""
        self.size = size
        self.bug = bug
        self.specs = {spec.name: spec for spec in specs}
        self.coordinator = Coordinator(size, survives_losses=True)
        self.now = 1_000_000
        self.ranks = [Rank(rank) for rank in range(size)]
        self.log: list[object] = []  # see text()
        self._to_coordinator: list[deque[bytes]] = [deque() for _ in range(size)]
        self._to_member: list[deque[bytes]] = [deque() for _ in range(size)]
        self._truth: dict[str, list[Applied]] = {}
        self.trainings = sum(spec.kind == "training" for spec in specs)
        self._witness = Witness(self)
        self.gpus = Gpus(self, gpus) if gpus is not None else None
        self._group_witness = GroupWitness(self) if gpus is not None else None
        self._deadline: int | None = None  # of the coordinator

    # --- for programs and lines ---

    def open(self, rank: int, name: str) -> Line:
        spec = self.specs[name]
        line = self.ranks[rank].lines[name] = Line(self, rank, spec)
        options = {key: getattr(spec, key) for key in ("required", "grace_us", "max_misses", "max_lag", "resync")}
        kind = ["training", "collective"].index(spec.kind)
        on_device = self.gpus is not None
        self.send(
            rank,
            compose("Open", name=name, kind=kind, options=options, wait_for_all=spec.wait_for_all, on_device=on_device),
        )
        return line

    def send(self, rank: int, message: bytes) -> None:
        self._to_coordinator[rank].append(message)

    def leave(self, rank: int, failure: str) -> None:
        """The rank's program has ended."""
        self.send(rank, compose("Exit", failure=failure))
        self.ranks[rank].left = True
        self._wake()

    def apply(self, name: str, applied: Applied) -> Applied:
        """I1: what a rank applies is what all others have applied in this step, or will."""
        truth = self._truth.setdefault(name, [])
        if applied[0] == len(truth):
            truth.append(applied)
        elif truth[applied[0]] != applied and self._only_dead_have(name, applied[0]):
            del truth[applied[0] :]
            truth.append(applied)
        check(truth[applied[0]] == applied, f"I1: a rank applies {applied}, another one {truth[applied[0]]}")
        return applied

    def _only_dead_have(self, name: str, step: int) -> bool:
        """Ranks that have died together, and nobody else, have applied it: it is as if it had not been."""
        lines = [(rank.dead, rank.lines[name]) for rank in self.ranks if name in rank.lines]
        return all(dead or len(line.history) <= step for dead, line in lines)

    def check_state(self, name: str, step: int, state: list[Applied]) -> None:
        """I1: what a rank takes over is what all others have, or have had, after so many updates."""
        truth = self._truth.get(name, [])[:step]
        check(len(truth) == step and state == truth, f"I1: as the state after {step} updates a rank takes over {state}")

    def is_in(self, spec: ChannelSpec, step: int, rank: int) -> bool:
        """Whether the rank's gradient is in the update, in all scopes."""
        values = self._truth[spec.name][step][1]
        return bool(values) and all(value is not None and rank in value[0] for value in values)

    def kept_from(self, spec: ChannelSpec) -> int:
        """The first update that the journals must hold."""
        return self._witness.newest[spec.name] + 1 - spec.max_lag if spec.resyncs(self.size) else 0

    def contributors_left(self, spec: ChannelSpec, step: int) -> list[list[int] | None]:
        """For each scope of an update who is in it, without who has withdrawn; None: not decided."""
        return [self._witness.contributors.get((spec.name, step, scope), [-1]) for scope in range(spec.scopes)]

    def has_heard_all(self, rank: int) -> bool:
        """Whether the rank goes on, and knows all that the coordinator has said."""
        return not self.ranks[rank].stopped and not self._to_member[rank]

    def groups_replaced(self) -> bool:
        """Whether a group of GPUs has come in the place of another one."""
        return self._group_witness is not None and bool(self._group_witness.retired)

    def name_of(self, channel: int) -> str:
        return self._witness.names[channel]

    def _wake(self) -> None:
        for rank in self.ranks:
            rank.ready = True

    # --- the schedule ---

    def step(self, choice: int) -> bool:
        """One event, picked by the number; one in RARE is a rare one. False: nothing can happen any more."""
        choice, rare = choice // RARE, choice % RARE == RARE - 1
        events = self._events()
        asleep = any(rank.stopped and not rank.dead for rank in self.ranks)
        if not events and self._deadline is None and not asleep:
            return False
        if rare or not events:
            events = self._rare_events(choice)
        self._happen(events[choice % len(events)])
        return True

    def settle(self, resume: bool = True, limit: int = 50_000) -> None:
        """Everything goes on in turn until nothing can happen any more (I6). resume: stopped ranks go on, too."""
        for rank in self.ranks:
            rank.stopped = rank.dead or (rank.stopped and not resume)
        for turn in range(limit):
            nothing_happens = True
            for rank in self.ranks:
                if events := self._events_of(rank):
                    self._happen(events[turn % len(events)])
                    nothing_happens = False
            if nothing_happens:
                if self._deadline is None:
                    return
                self._happen((("time passes",), self._pass_time))
        check(False, f"I6: still busy after {limit} rounds")

    def check_end(self) -> None:
        """I6, after settle(): every program has ended, and everybody knows."""
        for rank in self.ranks:
            if rank.dead:
                continue
            check(rank.left, f"I6: the program of rank {rank.rank} hangs")
            check(rank.all_gone, f"I6: rank {rank.rank} was not told that all have gone")
        self._witness.account()
        if self._group_witness is not None:
            self._group_witness.end()

    def text(self, last: int = 200) -> str:
        """The log's last entries: what happened when, and below it what was said and put on record."""
        lines = [" ".join(map(str, each)) if isinstance(each, tuple) else f"    {each}" for each in self.log[-last:]]
        return "\n".join(lines)

    def _events(self) -> list[Event]:
        """What can happen next."""
        return [event for rank in self.ranks for event in self._events_of(rank)]

    def _events_of(self, rank: Rank) -> list[Event]:
        out: list[Event] = []
        r = rank.rank
        if self._to_coordinator[r]:
            out.append((("coordinator hears rank", r), lambda: self._hear(r)))
        if rank.dead and not rank.found_dead:
            out.append((("is found dead: rank", r), lambda: self._find_dead(r)))
        if rank.stopped:
            return out
        if self._to_member[r]:
            out.append((("hears: rank", r), lambda: self._deliver(r)))
        for name, line in rank.lines.items():
            for scope, decision in line.reductions.items():
                if line.can_complete(scope):
                    what = ("has reduced: rank", r, name, "step", decision["step"], "scope", scope)
                    out.append((what, lambda line=line, scope=scope: self._at(line, lambda: line.complete(scope))))
            if line.missed and line.can_fetch():
                what = ("has fetched: rank", r, name, "step", line.missed["step"])
                out.append((what, lambda line=line: self._at(line, line.fetch)))
            for resync in line.pulls:
                server = resync["server"]
                what = ("has the state: rank", r, name, "of rank", server, "at step", resync["step"])
                if not self.ranks[server].stopped:
                    out.append((what, lambda line=line, resync=resync: self._at(line, lambda: line.pull(resync))))
                elif resync not in line.told_lost:
                    what = ("misses the state: rank", r, name, "of rank", server, "at step", resync["step"])
                    out.append((what, lambda line=line, resync=resync: self._at(line, lambda: line.lose(resync))))
        if self.gpus is not None:
            out += self.gpus.events_of(r)
            if self.gpus.holds_up(r):
                return out
        if rank.program is not None and rank.ready:
            out.append((("program goes on:", r), lambda: self._run(r)))
        return out

    def _rare_events(self, choice: int) -> list[Event]:
        """What makes it hard: time passes, ranks stop and go on (not rank 0, which coordinates)."""
        # To form a group takes long: it is given up less often than the other deadlines pass.
        most_us = None if self.gpus is None or choice % 7 == 0 else 5_000_000
        out: list[Event] = [(("time passes",), lambda: self._pass_time(most_us))]
        for rank in self.ranks[1:]:
            if rank.dead:
                continue
            what = ("goes on: rank" if rank.stopped else "stops: rank", rank.rank)
            out.append((what, lambda rank=rank: self.stop(rank.rank, not rank.stopped, choice)))
        if self.gpus is not None:
            out += self.gpus.rare_events()
        return out

    def stop(self, r: int, stopped: bool, some: int) -> None:
        """A rank stops, or goes on. Some of the others have got all that it was sending them, as the bits say."""
        rank = self.ranks[r]
        if stopped and not rank.stopped:
            for line in rank.lines.values():
                line.sent_before_stopping(some)
        rank.stopped = stopped

    def kill(self, r: int, some: int) -> None:
        """A rank's process dies; `some` as in stop()."""
        self.log.append((self.now, "dies: rank", r))
        self.stop(r, True, some)
        self.ranks[r].dead = True

    def _happen(self, event: Event) -> None:
        what, action = event
        self.log.append((self.now, *what))
        action()
        self.now += EVENT_US
        if self._deadline is not None and self._deadline <= self.now:
            self.coordinator.tick(self.now)
            self._take_from_coordinator()

    # --- events ---

    def _pass_time(self, most_us: int | None = None) -> None:
        deadline = self._deadline if self._deadline is not None else self.now + 100 * EVENT_US
        self.now = max(self.now, deadline if most_us is None else min(deadline, self.now + most_us))

    def _run(self, r: int) -> None:
        rank = self.ranks[r]
        assert rank.program is not None
        try:
            rank.ready = next(rank.program)
        except StopIteration:
            rank.program = None
        for line in rank.lines.values():
            line.collect()

    def _at(self, line: Line, action: Callable[[], None]) -> None:
        action()
        self.ranks[line.rank].ready = True

    def _deliver(self, r: int) -> None:
        rank, message = self.ranks[r], self._to_member[r].popleft()
        body = describe(message)
        if self.bug is not None and (body := self.bug.to_member(r, body)):
            message = composed(body)
        if not body:
            return
        self.log.append(body)
        rank.ready = True
        if body["message"] == "Joined":
            rank.joined = False
        elif body["message"] == "AllGone":
            rank.all_gone = True
        elif body["message"] == "Lost":
            rank.lost.add(body["rank"])
        elif body["message"] in ("Form", "Disband"):
            assert self.gpus is not None
            self.gpus.of[r].hear(body)
        else:
            line = rank.lines[body["name"] if "name" in body else self._witness.names[body["channel"]]]
            line.receive(message, body)
            line.collect()

    def _find_dead(self, r: int) -> None:
        """What it had sent and nobody has heard is lost with it."""
        self.ranks[r].found_dead = True
        self._to_coordinator[r].clear()
        self._to_member[r].clear()
        self._witness.gone.add(r)
        if self._group_witness is not None:
            self._group_witness.lost(r)
        self.coordinator.lost(r, self.now)
        self._take_from_coordinator()
        self._wake()

    def _hear(self, r: int) -> None:
        message = self._to_coordinator[r].popleft()
        body = describe(message)
        if self.bug is not None and (body := self.bug.to_coordinator(r, body)):
            message = composed(body)
        if not body:
            return
        self.log.append(body)
        self._witness.hear(r, body)
        if self._group_witness is not None:
            self._group_witness.hear(r, body)
        self.coordinator.receive(r, message, self.now)
        self._take_from_coordinator()

    def _take_from_coordinator(self) -> None:
        self._deadline = self.coordinator.next_deadline()
        replies, records = self.coordinator.take_replies(), self.coordinator.take_records()
        self.log += records
        self._witness.records(records)
        described = [(to, describe(message)) for to, message in replies]
        self._witness.replies(described)
        if self._group_witness is not None:
            self._group_witness.said(records, described)
        for to, message in replies:
            if self.ranks[to].found_dead:
                continue
            self._to_member[to].append(message)
            self._witness.queue(to, len(self._to_member[to]))
