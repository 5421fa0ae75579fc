"""One rank in the world of tests/control_world.py: its members, and what the engine does around each of them.

The member is the real one. Simulated are the engine's part (messages go out, reductions and fetches start and end), the
journal, and the weights: the list of applied updates, so that I1 is equality of lists.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hvd_backup._core_testing import Member

if TYPE_CHECKING:
    from tests.control_world import World

Program = Generator[bool, None, None]  # yields whether it can go on by itself; False: only when something has happened
Value = tuple[tuple[int, ...], int]  # a sum: who is in it, and the tag, which names the very reduction that made it
Applied = tuple[int, tuple[Value | None, ...], float, str]  # step, the sum of each scope, samples, metadata


class Violation(AssertionError):
    """An invariant (DESIGN, section 1) does not hold."""


class ChannelFailed(Exception):
    """Raised in a program, as the engine raises it in the training thread."""


def check(holds: bool, what: str) -> None:
    """Raises Violation unless `holds`."""
    if not holds:
        raise Violation(what)


@dataclass(frozen=True)
class ChannelSpec:
    """What the ranks open. layout: the scope of each bucket."""

    name: str = "optimizer"
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
    """What a program has begun to hand over.

    leftover: the round was over when it was begun, so it is dropped without anybody being asked.
    recorded: the coordinator has put on record that it was dropped.
    """

    base: int
    samples: float
    metadata: str
    counters: dict[str, int]
    leftover: bool
    submitted: set[int] = field(default_factory=set)
    recorded: bool = False


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

    # --- calls of the program ---

    def begin(self, samples: float, metadata: str) -> None:
        self._pass_over_empty_updates(self.member.step)
        counters = self.member.counters()
        self.gradient = Gradient(len(self.history), samples, metadata, counters, self.member.round_over)
        self.member.begin(samples, metadata)
        self.begun += 1
        self.reductions = {}

    def submit(self, bucket: int) -> None:
        assert self.gradient is not None
        self.member.submit(bucket)
        self.gradient.submitted.add(bucket)

    def take(self) -> dict[str, Any]:
        """What Channel.wait() returns; an update is applied at once. I7: each gradient is counted once, and rightly."""
        update: dict[str, Any] = self.member.take()
        counters = self.member.counters()
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            counted = tuple(counters[key] - gradient.counters[key] for key in ("contributed", "dropped"))
            check(counted == ((1, 0) if update["contributed"] else (0, 1)), f"I7: counted as {counted}: {update}")
            on_record = gradient.recorded or gradient.leftover
            check(
                update["contributed"] != on_record, f"I7: on record as dropped: {on_record}, rank {self.rank}: {update}"
            )
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
        self.history.append(
            self.world.apply(self.spec.name, (step, tuple(values), update["samples"], update["metadata"]))
        )

    def _pass_over_empty_updates(self, step: int) -> None:
        """When all contributors have withdrawn, the update changes nothing, and the member does not tell of it."""
        while len(self.history) < step:
            at = len(self.history)
            left = self.world.contributors_left(self.spec, at)
            check(not any(left), f"I1: rank {self.rank} went on to {step} without update {at} of {left}")
            self.history.append(self.world.apply(self.spec.name, (at, (), 0.0, "")))

    # --- the engine ---

    def collect(self) -> None:
        """After each call and each event: messages go out, reductions and fetches start."""
        if self.id is None:
            return
        for message in self.member.take_messages():
            self.world.send(self.rank, message)
        for decision in self.member.take_reductions():
            self.reductions[decision["scope"]] = decision
        missed = self.member.take_catch_up()
        if missed is not None:
            self.missed = missed

    def receive(self, message: bytes, body: dict[str, Any]) -> None:
        if body["message"] == "Failed":
            self.failure = body["reason"]
            return
        if body["message"] == "Opened":
            self.id = body["channel"]
        self.member.receive(message)
        for key in [key for key in self.journal if key[0] < self.member.all_have]:
            del self.journal[key]

    def has_started(self, decision: dict[str, Any]) -> bool:
        """Whether all buckets of that reduction have been handed over here, or it has even ended."""
        step, scope = decision["step"], decision["scope"]
        value = (tuple(decision["contributors"]), decision["tag"])
        if len(self.history) > step or self.results.get((step, scope)) == value:
            return True
        own = self.reductions.get(scope)
        if own is None or own["tag"] != decision["tag"] or self.gradient is None:
            return False
        return {bucket for bucket, s in enumerate(self.spec.layout) if s == scope} <= self.gradient.submitted

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
        self.collect()

    def can_fetch(self) -> bool:
        """Whether each shard of the missed update has a keeper that can answer; every keeper must have it (I5)."""
        assert self.missed is not None
        return all(self._keepers(scope) for scope in self.missed["scopes"])

    def fetch(self) -> None:
        """All shards of the missed update have come."""
        assert self.missed is not None
        step = self.missed["step"]
        for scope in self.missed["scopes"]:
            values = {keeper.journal[step, scope][0] for keeper in self._keepers(scope)}
            check(len(values) == 1, f"I1: the journals hold different sums of update {step}, scope {scope}: {values}")
            self.results[step, scope] = values.pop()
        self.missed = None
        self.member.fetched(step)
        self.collect()

    def _keepers(self, scope: int) -> list[Line]:
        """For each shard who answers; empty when nobody does for one of them."""
        assert self.missed is not None
        contributors, step = self.missed["contributors"][scope], self.missed["step"]
        answering = []
        for shard, owner in enumerate(contributors):
            neighbour = contributors[(shard + 1) % len(contributors)]
            both = [self.world.ranks[r].lines[self.spec.name] for r in (owner, neighbour)]
            for keeper in both:
                kept = keeper.journal.get((step, scope))
                what = f"shard {shard} of update {step}, which rank {self.rank} misses"
                check(kept is not None and shard in kept[1], f"I5: rank {keeper.rank} does not keep {what}")
            answering += [keeper for keeper in both if not self.world.ranks[keeper.rank].stopped][:1]
        return answering if len(answering) == len(contributors) else []


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
