"""One rank in the world of tests/control_world.py: its members, and what the engine does around each of them.

The member is the real one. Simulated are the engine's part (messages go out, reductions and fetches start and end), the
journal, and the weights: the list of applied updates, so that I1 is equality of lists.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hvd_backup._core_testing import Member, compose

if TYPE_CHECKING:
    from tests.control_gpus import Gpu, Gpus
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
    resync: bool = False
    wait_for_all: bool = True

    @property
    def scopes(self) -> int:
        return max(self.layout) + 1

    def resyncs(self, size: int) -> bool:
        """Whether ranks beyond the journal take over another's state; otherwise they are waited for."""
        return self.resync and self.kind == "training" and self.required < size


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
        self.buckets = [{bucket for bucket, s in enumerate(spec.layout) if s == scope} for scope in range(spec.scopes)]
        self.member = Member(rank, spec.kind, spec.arrive_first)
        self.member.set_layout(list(spec.layout))
        self.id: int | None = None
        self.failure = ""
        self.gradient: Gradient | None = None
        self.begun = 0
        self.reductions: dict[int, dict[str, Any]] = {}  # by scope, of the current gradient: the decision
        self.received: dict[int, set[int]] = {}  # likewise: who had sent all of its part when it stopped
        self.results: dict[tuple[int, int], Value] = {}  # by step and scope: what lies in the result buffers
        self.missed: dict[str, Any] | None = None  # the update that is being fetched
        self.journal: dict[tuple[int, int], tuple[Value, set[int]]] = {}  # by step and scope: the sum, which shards
        self.history: list[Applied] = []  # the weights
        self.states: dict[int, list[Applied]] = {}  # copies that were offered, by step
        self.pulls: list[dict[str, Any]] = []  # of others' states, which were promised to this rank
        self.told_lost: list[dict[str, Any]] = []  # those of them that did not come
        self.state: list[Applied] = []  # what has come

    # --- calls of the program ---

    def begin(self, samples: float, metadata: str) -> None:
        self._pass_over_empty_updates(self.member.step)
        counters = self.member.counters()
        self.gradient = Gradient(len(self.history), samples, metadata, counters, self.member.round_over)
        self.member.begin(samples, metadata)
        self.begun += 1
        self.reductions = {}

    def submit(self, bucket: int, finite: bool = True) -> None:
        assert self.gradient is not None
        self.member.submit(bucket, finite)
        self.gradient.submitted.add(bucket)

    def take(self) -> dict[str, Any]:
        """What Channel.wait() returns; an update is applied at once. I7: each gradient is counted once, and rightly."""
        update: dict[str, Any] = self.member.take()
        counters = self.member.counters()
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            # A rank that stopped after it had contributed fetches what its gradient is in.
            counts = update["kind"] == "update" and all(self.rank in ranks for ranks in update["contributors"])
            if update["kind"] == "resync":
                counts = self.world.is_in(self.spec, gradient.base, self.rank)
            check(counts or not update["contributed"], f"I7: {update}")
            counted = tuple(counters[key] - gradient.counters[key] for key in ("contributed", "dropped"))
            check(counted == ((1, 0) if counts else (0, 1)), f"I7: counted as {counted}: {update}")
            on_record = gradient.recorded or gradient.leftover
            check(counts != on_record, f"I7: on record as dropped: {on_record}, rank {self.rank}: {update}")
        if update["kind"] == "update":
            self._apply(update)
        elif update["kind"] == "resync":
            self.history, self.state = self.state, []
            self.world.check_state(self.spec.name, update["step"], self.history)
        return update

    def serve(self, unasked: bool = False) -> None:
        """The training thread is between two updates: makes a copy of its state, if that is wanted."""
        if self.member.state_wanted or (unasked and self.member.state_will_be_wanted):
            self._pass_over_empty_updates(self.member.step)
            whole = self.world.bug is None or self.world.bug.whole
            self.states[self.member.step] = list(self.history if whole else self.history[:-1])
            kept = len(self.states)
            check(kept <= 3, f"I5: rank {self.rank} keeps {kept} copies of its state")
            self.member.offer(len(self.history))
            self.collect()

    def _apply(self, update: dict[str, Any]) -> None:
        step = update["step"]
        self._pass_over_empty_updates(step)
        check(step == len(self.history), f"I1: rank {self.rank} got update {step} after {len(self.history)} others")
        values = []
        for scope, contributors in enumerate(update["contributors"]):
            result = self.results.pop((step, scope), None)
            value = result if contributors else None  # what an attempt that was given up has left there is not used
            check(value is not None or not contributors, f"I1: rank {self.rank} applies {update} without scope {scope}")
            check(value is None or list(value[0]) == contributors, f"I1: {update} says {contributors}, summed: {value}")
            values.append(value)
        self.history.append(
            self.world.apply(self.spec.name, (step, tuple(values), update["samples"], update["metadata"]))
        )

    def _pass_over_empty_updates(self, step: int) -> None:
        """An update without contributors (all have withdrawn, or hold NaN) changes nothing, and is not told of."""
        while len(self.history) < step:
            at = len(self.history)
            left = self.world.contributors_left(self.spec, at)
            check(not any(left), f"I1: rank {self.rank} went on to {step} without update {at} of {left}")
            self.history.append(self.world.apply(self.spec.name, (at, (), 0.0, "")))

    # --- the engine ---

    @property
    def gpus(self) -> Gpus:
        assert self.world.gpus is not None
        return self.world.gpus

    @property
    def gpu(self) -> Gpu:
        return self.gpus.of[self.rank]

    def collect(self) -> None:
        """After each call and each event: messages go out, reductions and fetches start."""
        if self.id is None:
            return
        for message in self.member.take_messages():
            self.world.send(self.rank, message)
        for scope, decision in list(self.reductions.items()):
            if not self.member.contributing(decision["step"], scope, decision["attempt"]):
                del self.reductions[scope]
                if decision["group"]:
                    self.gpu.give_up(decision)
        for decision in self.member.take_reductions():
            self.reductions[decision["scope"]] = decision
            self.journal.pop((decision["step"], decision["scope"]), None)  # of an earlier attempt
            self.received[decision["scope"]] = set()
            if decision["group"]:
                self.gpu.announce(self, decision)
        if self.world.gpus is not None:
            self.gpu.go_on()
        missed = self.member.take_catch_up()
        if missed is not None:
            self.missed = missed
        self.pulls += self.member.take_resyncs()

    def receive(self, message: bytes, body: dict[str, Any]) -> None:
        if body["message"] == "Failed":
            self.failure = body["reason"]
            self.missed = None
            return
        if body["message"] == "Opened":
            self.id = body["channel"]
        if body["message"] == "Probe":
            self._answer(body)
            return
        if body["message"] == "Dismiss":
            self.states.pop(body["step"], None)
            return
        self.member.receive(message)
        if body["message"] == "Final" and body["stopped"]:  # all is kept for those, and for others in their place
            value, _ = self.journal.get((body["step"], body["scope"]), (((), 0), set()))
            self.journal[body["step"], body["scope"]] = (value, set(range(len(value[0]))))
        for key in [key for key in self.journal if key[0] < self.member.all_have]:
            del self.journal[key]

    def _answer(self, probe: dict[str, Any]) -> None:
        """Says how far this rank is, as the engine does."""
        answer = {key: probe[key] for key in ("channel", "step", "scope", "attempt")}
        step, scope = probe["step"], probe["scope"]
        if self.member.contributing(step, scope, probe["attempt"]):
            answer["unsubmitted"] = self.member.unsubmitted(scope)
            in_group = self.reductions[scope]["group"] != 0  # nobody knows whom the GPUs wait for
            answer["contributions_missing"] = [] if in_group else self._missing(scope)
        self.world.send(self.rank, compose("Progress", **answer))

    def can_complete(self, scope: int) -> bool:
        """Whether the data of all contributors are here, or on their way."""
        decision = self.reductions[scope]
        if decision["group"] and (decision["group"] in self.gpus.hung or not self.gpu.is_at_work(decision)):
            return False
        if decision["group"] and self.world.bug is not None and not self.world.bug.waits_for_others:
            return True
        return not self._missing(scope)

    def _missing(self, scope: int) -> list[int]:
        missing = []
        for other in self.reductions[scope]["contributors"]:
            line = self.world.ranks[other].lines[self.spec.name]
            sends = line.has_started(self.reductions[scope]) and not self.world.ranks[other].stopped
            if not sends and other not in self.received[scope]:
                missing.append(other)
        return missing

    def sent_before_stopping(self, some: int) -> None:
        """This rank stops: some of the others have all of its part (as the bits of `some` say), others have not."""
        for scope, decision in self.reductions.items():
            for other in decision["contributors"]:
                line = self.world.ranks[other].lines[self.spec.name]
                same = line.reductions.get(scope, {}).get("tag") == decision["tag"]
                if same and some >> other & 1 and self.has_started(decision):
                    line.received[scope].add(self.rank)

    def has_started(self, decision: dict[str, Any]) -> bool:
        """Whether all buckets of that reduction have been handed over here, or it has even ended."""
        if decision["group"]:
            return self.gpu.has_sent(decision)
        step, scope = decision["step"], decision["scope"]
        value = (tuple(decision["contributors"]), decision["tag"])
        if len(self.history) > step or self.results.get((step, scope)) == value:
            return True
        return self.has_submitted(scope, decision["tag"])

    def has_submitted(self, scope: int, tag: int) -> bool:
        """Whether all buckets of that reduction, which goes on, have been handed over."""
        own = self.reductions.get(scope)
        if own is None or own["tag"] != tag or self.gradient is None:
            return False
        return self.buckets[scope] <= self.gradient.submitted

    def complete(self, scope: int) -> None:
        """The reduction of this scope has ended here."""
        decision = self.reductions.pop(scope)
        if decision["group"]:
            self.gpu.end(decision)
        step, contributors = decision["step"], decision["contributors"]
        value = (tuple(contributors), decision["tag"])
        kept_at_all = self.world.bug is None or self.world.bug.keeps
        if kept_at_all and (len(contributors) < self.world.size or decision["votes"]):
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
        return self._is_lost() or self._is_forgotten() or all(self._keepers(scope) for scope in self.missed["scopes"])

    def _is_lost(self) -> bool:
        """Those who kept a part of it have died, and the others say that they do not."""
        assert self.missed is not None
        if not self.spec.resyncs(self.world.size):
            return False
        ranks, step, dead = self.world.ranks, self.missed["step"], self.world.ranks[self.rank].lost
        for scope in self.missed["scopes"]:
            contributors = self.missed["contributors"][scope]
            others = [ranks[r] for r in contributors if r != self.rank]
            for shard in range(len(contributors)):
                has_not = [
                    each.rank in dead
                    or (
                        self.world.has_heard_all(each.rank) and not each.lines[self.spec.name].keeps(step, scope, shard)
                    )
                    for each in others
                ]
                if all(has_not) and any(each.rank in dead for each in others):
                    return True
        return False

    def _is_forgotten(self) -> bool:
        """A keeper answers that the missed update has fallen out of its journal."""
        assert self.missed is not None
        step = self.missed["step"]
        keepers = {r for ranks in self.missed["contributors"] for r in ranks if not self.world.ranks[r].stopped}
        forgotten = any(self.world.ranks[r].lines[self.spec.name].member.all_have > step for r in keepers)
        check(not forgotten or step < self.world.kept_from(self.spec), f"I5: update {step} was given up too early")
        return forgotten

    def pull(self, resync: dict[str, Any]) -> None:
        """The state that was promised has come, all of it; or it is not there any more."""
        state = self.world.ranks[resync["server"]].lines[self.spec.name].states.get(resync["step"])
        self.pulls.remove(resync)
        if state is None:
            self.member.state_lost(resync)
        else:
            self.state = list(state)
            self.pulls, self.told_lost = [], []
            self.member.state_here(resync)
        self.collect()

    def lose(self, resync: dict[str, Any]) -> None:
        """It takes too long."""
        self.told_lost.append(resync)
        self.member.state_lost(resync)
        self.collect()

    def fetch(self) -> None:
        """All shards of the missed update have come."""
        assert self.missed is not None
        step = self.missed["step"]
        if self._is_lost() or self._is_forgotten():
            self.missed = None
            self.member.fetch_lost(step)
            self.collect()
            return
        for scope in self.missed["scopes"]:
            values = {keeper.journal[step, scope][0] for keeper in self._keepers(scope)}
            check(len(values) == 1, f"I1: the journals hold different sums of update {step}, scope {scope}: {values}")
            value = self.results[step, scope] = values.pop()
            if self.rank in value[0]:  # it had contributed before it stopped
                own, k = value[0].index(self.rank), len(value[0])
                self.journal[step, scope] = (value, {own, (own - 1) % k})
        self.missed = None
        self.member.fetched(step)
        self.collect()

    def keeps(self, step: int, scope: int, shard: int) -> bool:
        kept = self.journal.get((step, scope))
        return kept is not None and shard in kept[1]

    def _keepers(self, scope: int) -> list[Line]:
        """For each shard who answers; empty when nobody does for one of them."""
        assert self.missed is not None
        contributors, step = self.missed["contributors"][scope], self.missed["step"]
        answering = []
        for shard in range(len(contributors)):
            all_lines = [self.world.ranks[r].lines[self.spec.name] for r in contributors if r != self.rank]
            keepers = [line for line in all_lines if line.keeps(step, scope, shard)]
            fallen = step < self.world.kept_from(self.spec)
            check(fallen or bool(keepers), f"I5: nobody keeps shard {shard} of {step}, which rank {self.rank} misses")
            answering += [keeper for keeper in keepers if not self.world.ranks[keeper.rank].stopped][:1]
        return answering if len(answering) == len(contributors) else []


class Rank:
    """One process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lines: dict[str, Line] = {}
        self.program: Program | None = None
        self.ready = True  # the program can go on
        self.stopped = False
        self.dead = False  # and stopped for ever; found_dead: the coordinator knows
        self.found_dead = False
        self.joined = False
        self.left = False
        self.all_gone = False
        self.lost: set[int] = set()  # whose process has died, as it was told
