"""A world of ranks around the real control layer, in which a schedule picks every single event.

The coordinator and the members are the C++ state machines. Around them this module simulates what the engine, the
network and the data plane do: one FIFO queue from each rank to the coordinator and back, reductions that complete at
each contributor by themselves, journals, fetches, ranks that stop, and time. What a training thread does is a generator
(tests/control_programs.py): it yields after each action. Weights are the list of applied updates, so I1 is equality of
lists. Invariants (DESIGN section 1) are checked where they could break, at every event; a broken one is a Violation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from hvd_backup._core_testing import Coordinator, Member, compose, describe

Program = Generator[bool, None, None]  # yields whether it can go on by itself; False: only when something has happened
Value = tuple[Any, ...]  # the sum that a reduction gave: who was in it, and the tag, which names the very reduction
Applied = tuple[int, tuple[Value | None, ...], float, str]  # step, the sum of each scope, samples, metadata
EVENT_US = 20


class Violation(AssertionError):
    """An invariant does not hold."""


def check(holds: bool, what: str) -> None:
    """Raises Violation unless `holds`."""
    if not holds:
        raise Violation(what)


class ChannelFailed(Exception):
    """Raised in a program, as the engine raises it in the training thread."""


@dataclass(frozen=True)
class ChannelSpec:
    """What the ranks open. `layout`: the scope of each bucket."""

    name: str = "training"
    kind: str = "training"
    required: int = 2
    layout: tuple[int, ...] = (0,)
    arrive_first: bool = True
    grace_us: int = 0
    max_misses: int = 0
    max_lag: int = 64
    wait_for_all: bool = True

    @property
    def scopes(self) -> int:
        return max(self.layout) + 1


@dataclass
class Gradient:
    """What a program has begun to hand over."""

    base: int
    samples: float
    metadata: str
    counters: dict[str, int]
    leftover: bool  # the round was over when it was begun: dropped without anybody being asked
    submitted: set[int] = field(default_factory=set)
    recorded: bool = False  # the coordinator has put on record that it was dropped


class Line:
    """One channel on one rank: the member, and the engine's part of it."""

    def __init__(self, world: World, rank: int, spec: ChannelSpec) -> None:
        self.world, self.rank, self.spec = world, rank, spec
        self.member = Member(rank, spec.kind, spec.arrive_first)
        self.member.set_layout(list(spec.layout))
        self.id: int | None = None
        self.failure = ""
        self.gradient: Gradient | None = None
        self.begun = 0
        self.reductions: dict[int, dict[str, Any]] = {}  # by scope, of the current gradient: the decision
        self.results: dict[tuple[int, int], Value] = {}  # by step and scope: what lies in the result buffers
        self.missed: dict[str, Any] | None = None  # the update that is being fetched
        self.journal: dict[tuple[int, int], tuple[Value, set[int]]] = {}  # by step and scope: the sum, which shards
        self.history: list[Applied] = []  # the weights
        self.alignments: list[int] = []  # where this rank was told that all meet

    def begin(self, samples: float, metadata: str) -> None:
        self._pass_over_empty_updates(self.member.step)
        self.gradient = Gradient(len(self.history), samples, metadata, self.member.counters(), self.member.round_over)
        self.member.begin(samples, metadata)
        self.begun += 1
        self.reductions = {}

    def submit(self, bucket: int) -> None:
        assert self.gradient is not None
        self.member.submit(bucket)
        self.gradient.submitted.add(bucket)

    def take(self) -> dict[str, Any]:
        """What Channel.wait() returns; an update is applied at once."""
        update: dict[str, Any] = self.member.take()
        counters = self.member.counters()
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            counted = tuple(counters[key] - gradient.counters[key] for key in ("contributed", "dropped"))
            check(counted == ((1, 0) if update["contributed"] else (0, 1)), f"I7: counted as {counted}: {update}")
            told = update["contributed"] != (gradient.recorded or gradient.leftover)
            check(told, f"I7: the records disagree with the counters of rank {self.rank}: {update}, {gradient}")
        if update["kind"] == "update":
            self._apply(update)
        return update

    def _apply(self, update: dict[str, Any]) -> None:
        step = update["step"]
        self._pass_over_empty_updates(step)
        check(step == len(self.history), f"I1: rank {self.rank} got update {step} after {len(self.history)} others")
        values = []
        for scope, contributors in enumerate(update["contributors"]):
            value = self.results.pop((step, scope), None)
            check(value is not None or not contributors, f"I1: rank {self.rank} applies {update} without scope {scope}")
            check(value is None or list(value[0]) == contributors, f"I1: {update} says {contributors}, summed: {value}")
            values.append(value)
        applied: Applied = (step, tuple(values), update["samples"], update["metadata"])
        self.history.append(self.world.apply(self.spec.name, applied))

    def _pass_over_empty_updates(self, step: int) -> None:
        """All contributors had withdrawn: such an update changes nothing, and the member does not tell of it."""
        while len(self.history) < step:
            at = len(self.history)
            last = [self.world.decisions.get((self.spec.name, at, scope)) for scope in range(self.spec.scopes)]
            empty = all(decision is not None and not decision["contributors"] for decision in last)
            check(empty, f"I1: rank {self.rank} went on to {step} without update {at}: {last}")
            self.history.append(self.world.apply(self.spec.name, (at, (), 0.0, "")))

    def collect(self) -> None:
        """What the engine does after each call: messages go out, reductions and fetches start."""
        if self.id is None:
            return
        for message in self.member.take_messages():
            self.world.send(self.rank, message)
        for decision in self.member.take_reductions():
            self.reductions[decision["scope"]] = decision
        missed = self.member.take_catch_up()
        if missed is not None:
            self.missed = missed
            for scope, _ in self.shards_to_fetch():
                self.world.keepers(self, scope)  # finds out whether they keep it

    def shards_to_fetch(self) -> list[tuple[int, int]]:
        assert self.missed is not None
        return [
            (scope, shard)
            for scope in self.missed["scopes"]
            for shard in range(len(self.missed["contributors"][scope]))
        ]

    def receive(self, message: bytes, body: dict[str, Any]) -> None:
        kind = body["message"]
        if kind == "Failed":
            self.failure = body["reason"]
            return
        if kind == "Opened":
            self.id = body["channel"]
        self.member.receive(message)
        for key in [key for key in self.journal if key[0] < self.member.all_have]:
            del self.journal[key]

    def complete(self, scope: int) -> None:
        """The reduction of this scope has ended here."""
        decision = self.reductions.pop(scope)
        step, contributors = decision["step"], decision["contributors"]
        value = (tuple(contributors), decision["tag"])
        if len(contributors) < self.world.size:
            own, k = contributors.index(self.rank), len(contributors)
            self.journal[step, scope] = (value, {own, (own - 1) % k})
            kept = len({key[0] for key in self.journal})
            check(kept <= self.spec.max_lag, f"I5: rank {self.rank} keeps {kept} updates, max_lag={self.spec.max_lag}")
        self.results[step, scope] = value
        self.member.reduced(step, scope, decision["attempt"])

    def fetch(self) -> None:
        """All shards of the missed update have come."""
        assert self.missed is not None
        step = self.missed["step"]
        for scope in self.missed["scopes"]:
            values = {keeper.journal[step, scope][0] for keeper in self.world.keepers(self, scope)}
            check(len(values) == 1, f"I1: the journals hold different sums of update {step}, scope {scope}: {values}")
            self.results[step, scope] = values.pop()
        self.missed = None
        self.member.fetched(step)


class Rank:
    """One process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lines: dict[str, Line] = {}
        self.program: Program | None = None
        self.ready = True  # the program can go on
        self.stopped = False
        self.joined = False
        self.left = False
        self.all_gone = False


class World:
    """Ranks, network, data plane and clock. `step(choice)` lets one event happen; see `settle` for a fair end."""

    def __init__(self, size: int, specs: list[ChannelSpec], may_stop: bool = True) -> None:
        self.size = size
        self.specs = {spec.name: spec for spec in specs}
        self.may_stop = may_stop
        self.coordinator = Coordinator(size)
        self.now = 1_000_000
        self.ranks = [Rank(rank) for rank in range(size)]
        self.to_coordinator: list[deque[bytes]] = [deque() for _ in range(size)]
        self.to_member: list[deque[bytes]] = [deque() for _ in range(size)]
        self.truth: dict[str, list[Applied]] = {}
        self.records: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.names: dict[int, str] = {}
        self.decisions: dict[tuple[str, int, int], dict[str, Any]] = {}  # the last of (channel, step, scope)
        self.excused: dict[tuple[str, int, int], set[int]] = {}  # who could not contribute to it
        self.unable: dict[str, set[int]] = {spec.name: set() for spec in specs}  # away, as far as the coordinator knows
        self.gone: set[int] = set()
        self.paused: set[int] = set()
        self.joined: set[int] = set()
        self.withdrawals = 0
        self.meetings: dict[Any, set[int]] = {}

    # --- calls of programs ---

    def line(self, rank: int, name: str) -> Line:
        """Opens the channel on that rank."""
        line = self.ranks[rank].lines[name] = Line(self, rank, self.specs[name])
        spec = line.spec
        options = {key: getattr(spec, key) for key in ("required", "grace_us", "max_misses", "max_lag")}
        kind = ["training", "collective"].index(spec.kind)
        self.send(rank, compose("Open", name=name, kind=kind, options=options, wait_for_all=spec.wait_for_all))
        return line

    def send(self, rank: int, message: bytes) -> None:
        self.to_coordinator[rank].append(message)

    def meet(self, rank: int, where: object) -> Callable[[], bool]:
        """The rank is in a barrier; the function says whether all that still run are."""
        here = self.meetings.setdefault(where, set())
        here.add(rank)
        self.wake()
        return lambda: all(other.rank in here or other.left for other in self.ranks)

    def apply(self, name: str, applied: Applied) -> Applied:
        """I1: what a rank applies is what all others have applied in this step, or will."""
        truth = self.truth.setdefault(name, [])
        if applied[0] == len(truth):
            truth.append(applied)
        check(truth[applied[0]] == applied, f"I1: a rank applies {applied}, another one {truth[applied[0]]}")
        return applied

    def leave(self, rank: int, failure: str) -> None:
        """The rank's program has ended."""
        self.send(rank, compose("Exit", failure=failure))
        self.ranks[rank].left = True
        self.wake()

    def wake(self) -> None:
        """Who is in a barrier looks again."""
        for rank in self.ranks:
            rank.ready = True

    # --- the data plane ---

    def keepers(self, line: Line, scope: int) -> list[Line]:
        """Of one scope of the missed update of `line`, in the order of shards: who keeps each, and can answer."""
        assert line.missed is not None
        contributors, step = line.missed["contributors"][scope], line.missed["step"]
        answering = []
        for shard, owner in enumerate(contributors):
            both = [self.ranks[r].lines[line.spec.name] for r in (owner, contributors[(shard + 1) % len(contributors)])]
            for keeper in both:
                kept = keeper.journal.get((step, scope))
                check(
                    kept is not None and shard in kept[1],
                    f"I5: rank {keeper.rank} does not keep shard {shard} of update {step}, which rank {line.rank} misses",
                )
            answering += [keeper for keeper in both if not self.ranks[keeper.rank].stopped][:1]
        return answering

    def can_complete(self, line: Line, decision: dict[str, Any]) -> bool:
        buckets = {b for b, scope in enumerate(line.spec.layout) if scope == decision["scope"]}
        for r in decision["contributors"]:
            other = self.ranks[r].lines[line.spec.name]
            value = (tuple(decision["contributors"]), decision["tag"])
            if other.results.get((decision["step"], decision["scope"])) == value:
                continue
            if len(other.history) > decision["step"]:
                continue  # it has completed, and gone on
            theirs = other.reductions.get(decision["scope"])
            if theirs is None or theirs["tag"] != decision["tag"] or other.gradient is None:
                return False
            if not buckets <= other.gradient.submitted:
                return False
        return True

    # --- events ---

    def events(self) -> list[tuple[str, Callable[[], None]]]:
        """All that can happen next, the most ordinary first."""
        out: list[tuple[str, Callable[[], None]]] = []
        for r, rank in enumerate(self.ranks):
            if self.to_coordinator[r]:
                out.append((f"coordinator hears rank {r}", lambda r=r: self._hear(r)))
            if rank.stopped:
                continue
            if self.to_member[r]:
                out.append((f"rank {r} hears", lambda r=r: self._deliver(r)))
            for name, line in rank.lines.items():
                for scope, decision in line.reductions.items():
                    if self.can_complete(line, decision):
                        what = f"rank {r} has reduced {name} step {decision['step']} scope {scope}"
                        out.append((what, lambda line=line, scope=scope: self._complete(line, scope)))
                if line.missed and all(
                    len(self.keepers(line, scope)) == len(line.missed["contributors"][scope])
                    for scope in line.missed["scopes"]
                ):
                    out.append(
                        (f"rank {r} has fetched {name} {line.missed['step']}", lambda line=line: self._fetch(line))
                    )
            if rank.program is not None and rank.ready:
                out.append((f"rank {r} goes on", lambda r=r: self._run(r)))
        return out

    def rare_events(self) -> list[tuple[str, Callable[[], None]]]:
        """What an adversary adds: time passes, ranks stop and go on."""
        out: list[tuple[str, Callable[[], None]]] = [("time passes", self.pass_time)]
        for r in range(1, self.size if self.may_stop else 1):
            rank = self.ranks[r]
            out.append((f"rank {r} {'goes on' if rank.stopped else 'stops'}", lambda r=r: self.toggle(r)))
        return out

    def step(self, choice: int) -> bool:
        """One event, picked by the number; now and then a rare one. False: nothing can happen any more."""
        rare, choice = choice % 16 == 15, choice // 16
        events = self.events()
        if not events and self.coordinator.next_deadline() is None and not any(rank.stopped for rank in self.ranks):
            return False
        if rare or not events:
            events = self.rare_events()
        what, happen = events[choice % len(events)]
        self.log.append(f"{self.now}: {what}")
        happen()
        self._after()
        return True

    def settle(self, limit: int = 200_000, stopped: bool = False) -> None:
        """Everything goes on, all in turn, until nothing can happen any more. stopped: but not the stopped ranks."""
        for rank in self.ranks:
            rank.stopped = rank.stopped and stopped
        for _ in range(limit):
            events = self.events()
            if not events:
                if self.coordinator.next_deadline() is None:
                    return
                events = [("time passes", self.pass_time)]
            for what, happen in events[:1] if len(events) == 1 else [events[self.now // EVENT_US % len(events)]]:
                self.log.append(f"{self.now}: {what}")
                happen()
                self._after()
        raise Violation(f"I6: still busy after {limit} events")

    def check_end(self) -> None:
        """I6, after settle(): every program has ended, and everybody knows."""
        for rank in self.ranks:
            check(rank.program is None, f"I6: the program of rank {rank.rank} hangs")
            check(rank.all_gone, f"I6: rank {rank.rank} was not told that all have gone")

    def pass_time(self) -> None:
        deadline = self.coordinator.next_deadline()
        self.now = max(self.now + EVENT_US, deadline) if deadline is not None else self.now + 100 * EVENT_US

    def toggle(self, rank: int) -> None:
        self.ranks[rank].stopped = not self.ranks[rank].stopped

    def _after(self) -> None:
        self.now += EVENT_US
        deadline = self.coordinator.next_deadline()
        if deadline is not None and deadline <= self.now:
            self.coordinator.tick(self.now)
        self._drain()

    def _run(self, r: int) -> None:
        rank = self.ranks[r]
        assert rank.program is not None
        try:
            rank.ready = next(rank.program)
        except StopIteration:
            rank.program = None
        for line in rank.lines.values():
            line.collect()

    def _complete(self, line: Line, scope: int) -> None:
        line.complete(scope)
        self._touched(line)

    def _fetch(self, line: Line) -> None:
        line.fetch()
        self._touched(line)

    def _touched(self, line: Line) -> None:
        line.collect()
        self.ranks[line.rank].ready = True

    def _deliver(self, r: int) -> None:
        rank = self.ranks[r]
        message = self.to_member[r].popleft()
        body = describe(message)
        self.log.append(f"    {body}")
        rank.ready = True
        if body["message"] == "Joined":
            rank.joined = False
        elif body["message"] == "AllGone":
            rank.all_gone = True
        else:
            name = body["name"] if "name" in body else self.names[body["channel"]]
            line = rank.lines[name]
            line.receive(message, body)
            line.collect()

    # --- the coordinator's words, checked ---

    def _hear(self, r: int) -> None:
        message = self.to_coordinator[r].popleft()
        body = describe(message)
        self.log.append(f"    {body}")
        self._note(r, body)
        self.coordinator.receive(r, message, self.now)

    def _note(self, r: int, body: dict[str, Any]) -> None:
        """What the coordinator now knows about who can contribute, by the design's words."""
        kind = body["message"]
        name = self.names.get(body.get("channel", -1), "")
        if kind in ("Away", "Leave"):
            self.unable[name].add(r)
        elif kind in ("Arrive", "BeginRound"):
            self.unable[name].discard(r)
            strict = self.specs[name].required >= self.size
            if self.specs[name].kind == "collective" and not strict:
                self.paused.discard(r)
        elif kind == "Exit":
            self.gone.add(r)
        elif kind == "Pause":
            self.paused.add(r)
        elif kind == "Join":
            self.joined.add(r)
        elif kind == "Withdraw":
            self.withdrawals += 1

    def _drain(self) -> None:
        replies = [(to, message, describe(message)) for to, message in self.coordinator.take_replies()]
        for _, _, body in replies:
            if body["message"] == "Opened":
                self.names[body["channel"]] = body["name"]
        fresh = {}
        for record in self.coordinator.take_records():
            self.records.append(record)
            self.log.append(f"    record {record}")
            self._check_record(record)
        for to, message, body in replies:
            if body["message"] == "Decision":
                key = (self.names[body["channel"]], body["step"], body["scope"], body["attempt"], body["tag"])
                fresh.setdefault(key, (body, set()))[1].add(to)
            self.to_member[to].append(message)
            if body["message"] == "Joined":
                self.joined.discard(to)
            self._check_queue(to)
        for body, told in fresh.values():
            self._check_decision(body, told)

    def _check_queue(self, to: int) -> None:
        scopes = sum(spec.scopes for spec in self.specs.values())
        bound = scopes * (1 + self.withdrawals) + 3 * len(self.specs) + 2
        check(len(self.to_member[to]) <= bound, f"I4: {len(self.to_member[to])} messages wait for rank {to}")

    def _check_record(self, record: dict[str, Any]) -> None:
        name, event = record["channel"], record["event"]
        if event == "dropped":
            gradient = self.ranks[record["ranks"][0]].lines[name].gradient
            check(gradient is not None, f"I7: {record} of no gradient")
            assert gradient is not None
            gradient.recorded = True
        elif event == "round_over":
            self.unable[name].clear()
        elif event == "replaced":
            before = self.decisions[name, record["step"], record["scope"]]
            left = [r for r in before["contributors"] if r not in record["ranks"]]
            self.decisions[name, record["step"], record["scope"]] = before | {"contributors": left}
        elif event == "decision":
            step, spec = record["step"], self.specs[name]
            if spec.kind == "collective" and spec.required == self.size:
                self.paused -= set(record["ranks"])  # they come out of the full collective that paused them
            excused = self.excused[name, step, record["scope"]] = self.unable[name] | self.gone
            if spec.kind == "collective":
                excused |= self.joined | (self.paused if spec.required < self.size else set())
            check(all(base == step for base in record["bases"]), f"I2: {record}")
            still_ask = [r for r in self.ranks if r.rank not in self.gone | self.joined]
            behind = min(r.lines[name].member.step if name in r.lines else 0 for r in still_ask)
            check(step + 1 - behind <= spec.max_lag, f"I5: a rank is at step {behind}: {record}")

    def _check_decision(self, body: dict[str, Any], told: set[int]) -> None:
        name = self.names[body["channel"]]
        spec, step, scope, contributors = self.specs[name], body["step"], body["scope"], body["contributors"]
        check(told == set(contributors), f"I4: {body} was sent to {told}")
        check(contributors == sorted(set(contributors)), f"I3: {body}")
        gradients = [self.ranks[r].lines[name].gradient for r in contributors]
        for r, gradient, weight in zip(contributors, gradients, body["weights"], strict=True):
            base = gradient.base if gradient else None
            check(base == step, f"I2: rank {r} has computed with the weights of step {base}: {body}")
            check(gradient is not None and gradient.samples == weight, f"I3: rank {r} gave {gradient}: {body}")
        check(body["samples"] == sum(body["weights"]), f"I3: {body}")
        if scope == 0 and gradients[0]:
            check(body["metadata"] == gradients[0].metadata, f"I1: metadata of rank {contributors[0]}: {body}")
        if body["attempt"] == 0:
            excused = self.excused[name, step, scope]
            could = [r for r in range(self.size) if r not in excused and r not in contributors]
            check(len(contributors) >= spec.required or not could, f"I3: {could} could have contributed: {body}")
        else:
            before = self.decisions[name, step, scope]
            check(contributors == before["contributors"], f"I3: after {before}: {body}")
        self.decisions[name, step, scope] = body
        width = 2 * len(spec.layout)
        for other, line in ((r, line) for r in self.ranks for line in r.lines.values()):
            for running in line.reductions.values():
                apart = (
                    running["tag"] + 2 * len(line.spec.layout) <= body["tag"] or body["tag"] + width <= running["tag"]
                )
                check(apart, f"tags of {body} are in use by rank {other.rank}: {running}")
