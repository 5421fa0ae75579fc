"""Hears all that is said in the world of tests/control_world.py, and checks the coordinator's decisions and records.

Its own model of who can contribute is written from the design's words (section 3, rule 7), not from the coordinator.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.control_rank import ChannelSpec, check

if TYPE_CHECKING:
    from tests.control_world import World

Key = tuple[str, int, int]  # channel, step, scope


class Witness:
    """See above. Invariants are named as in DESIGN, section 1."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.names: dict[int, str] = {}
        self.away: dict[str, set[int]] = {name: set() for name in world.specs}
        self.gone: set[int] = set()
        self.lengths: dict[tuple[str, int], int] = {}  # of the rounds that the ranks follow
        self.starts = dict.fromkeys(world.specs, 0)  # of the rounds
        self.followed: set[str] = set()
        self.paused: set[int] = set()
        self.joined: set[int] = set()
        self.waits: dict[int, str] = {}  # who has said so, and in which channel
        self.contributors: dict[Key, list[int]] = {}  # of the last decision, without who has withdrawn since
        self.newest = dict.fromkeys(world.specs, 0)  # step that was decided, in a scope at least
        self.left: dict[Key, set[int]] = {}  # who has withdrawn after the decision
        self.attempts = 0
        self.groupings = 0  # messages about groups of GPUs; when one is gone, what it served is begun anew
        self.excused: dict[Key, set[int]] = {}  # who could not contribute to it
        self.nonfinite: dict[Key, set[int]] = {}
        self.arrived: set[tuple[int, Key]] = set()
        self.dropped: set[tuple[int, Key]] = set()
        self.failed: set[str] = set()
        self.withdrawals = 0
        self.asked: set[tuple[int, str]] = set()  # who is to offer its state
        self.unanswered: Counter[tuple[object, ...]] = Counter()  # by rank and what it has asked: each gets one answer

    # --- what the coordinator gets to know ---

    def hear(self, r: int, body: dict[str, Any]) -> None:
        kind = body["message"]
        name = self.names.get(body.get("channel", -1), "")
        if kind in ("Away", "Leave"):
            self.away[name].add(r)
        elif kind == "Sync":
            self.unanswered[r, name] += 1
        elif kind == "Offered":
            self.asked.discard((r, name))
        elif kind == "StateLost":
            self.unanswered[r, name, "instead"] += 1
        elif kind in ("Arrive", "BeginRound"):
            if kind == "Arrive":
                key = name, body["step"], body["scope"]
                self.unanswered[(r, *key)] += 1
                self.arrived.add((r, key))
                self.dropped.discard((r, key))  # it may come again, in another round
                spoiled = self.nonfinite.setdefault(key, set())
                (spoiled.discard if body["finite"] else spoiled.add)(r)
            if kind == "BeginRound":
                self.lengths[name, r] = body["length"]
                self.followed.add(name)
            self.away[name].discard(r)
            if not self._is_of_all(self.world.specs[name]):
                self.paused.discard(r)
        if kind in ("Arrive", "Sync", "BeginRound", "Away", "Leave"):
            self.waits.pop(r, None)
        if kind == "Waiting":
            self.waits[r] = name
        elif kind == "Exit":
            self.gone.add(r)
        elif kind == "Pause":
            self.paused.add(r)
        elif kind == "Join":
            self.joined.add(r)
        elif kind == "Withdraw":
            self.withdrawals += 1
            key = name, body["step"], body["scope"]
            if r in self.contributors.get(key, []):
                self.left.setdefault(key, set()).add(r)

    # --- what it says ---

    def records(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            name, event, key = record["channel"], record["event"], (record["channel"], record["step"], record["scope"])
            if event == "dropped":
                gradient = self.world.ranks[record["ranks"][0]].lines[name].gradient
                check(gradient is not None, f"I7: there is no such gradient: {record}")
                assert gradient is not None
                gradient.recorded = True
                self.dropped.add((record["ranks"][0], key))
            elif event in ("replaced", "stopped"):
                self.attempts += 1
                for r in record["ranks"]:
                    self.unanswered[(r, *key)] += 1  # each is told that the others go on without it
            elif event == "decision":
                self._decided(record, key)
            elif event == "round_over":
                self.away[name].clear()
                self.starts[name] = record["step"]
                self.followed.discard(name)
            elif event == "failed":
                self.failed.add(name)

    def replies(self, replies: list[tuple[int, dict[str, Any]]]) -> None:
        decisions: dict[Any, tuple[dict[str, Any], set[int]]] = {}
        for to, body in replies:
            if body["message"] == "Opened":
                self.names[body["channel"]] = body["name"]
            elif body["message"] == "Joined":
                self.joined.discard(to)
            elif body["message"] in ("History", "Resume", "Over"):
                self._answers(to, body)
            elif body["message"] == "Resync":
                if not body["instead"] or self.unanswered[to, self.names[body["channel"]], "instead"] > 0:
                    self._answers(to, body, *(["instead"] if body["instead"] else []))
                else:
                    check(any(rank.found_dead for rank in self.world.ranks), f"I4: rank {to} has not asked: {body}")
            elif body["message"] == "Offer":
                name = self.names[body["channel"]]
                check((to, name) not in self.asked, f"I4: rank {to} is asked for its state again: {body}")
                self.asked.add((to, name))
            elif body["message"] == "Late":
                self._answers(to, body, body["step"], body["scope"])
            elif body["message"] == "Decision":
                if body["attempt"] == 0:
                    self._answers(to, body, body["step"], body["scope"])
                decisions.setdefault(body["tag"], (body, set()))[1].add(to)
            elif body["message"] in ("Form", "Disband"):
                self.groupings += 1
        for body, told in decisions.values():
            self._sent(body, told)

    def account(self) -> None:
        """I7, at the end: every gradient that has arrived is in its update, or on record; a dead rank is so itself."""
        for r, key in self.arrived:
            if self.world.ranks[r].dead:
                continue
            accounted = r in self.contributors.get(key, []) or (r, key) in self.dropped or key[0] in self.failed
            check(accounted, f"I7: what became of the gradient of rank {r} for {key}?")

    def queue(self, to: int, length: int) -> None:
        """I4: what waits for a rank that is stopped has a fixed bound."""
        specs = self.world.specs.values()
        bound = sum(spec.scopes for spec in specs) * 2 * (1 + self.withdrawals + self.attempts) + 3 * len(specs) + 2
        bound += self.groupings * (1 + sum(spec.scopes for spec in specs))
        bound += 5 * sum(spec.resyncs(self.world.size) for spec in specs)  # one Offer, a Dismiss for each copy, Resync
        check(length <= bound, f"I4: {length} messages wait for rank {to}, at most {bound} may")

    # --- inside ---

    def _answers(self, to: int, body: dict[str, Any], *place: object) -> None:
        """Who is told something has asked; only a gradient in a decision that is given up is answered twice."""
        question = (to, self.names[body["channel"]], *place)
        given_up = body["message"] == "Late" and to in self.contributors.get((question[1], *place), [])  # type: ignore
        check(self.unanswered[question] > 0 or given_up, f"I4: rank {to} has not asked: {body}")
        self.unanswered[question] -= self.unanswered[question] > 0

    def _is_of_all(self, spec: ChannelSpec) -> bool:
        return spec.kind == "collective" and spec.required >= self.world.size

    def _decided(self, record: dict[str, Any], key: Key) -> None:
        name, step, _ = key
        spec = self.world.specs[name]
        if self._is_of_all(spec):
            self.paused -= set(record["ranks"])  # they come out of the full collective that had paused them
        excused = self.away[name] | self.gone
        if spec.kind == "collective":
            excused |= self.joined | (set() if self._is_of_all(spec) else self.paused)
        spoiled = self.nonfinite.get(key, set())
        # A step that has begun, and cannot be finished: those who could wait in another channel for this one's ranks.
        elsewhere = {r for r, where in self.waits.items() if where != name} if spoiled and spec.scopes > 1 else set()
        excused = excused | spoiled | elsewhere
        self.excused[key] = excused
        earlier = self.contributors.get(key, [])
        died_with_it = bool(earlier) and all(self.world.ranks[r].dead for r in earlier)
        self.contributors[key] = record["ranks"]
        self.newest[name] = max(self.newest[name], step)
        check(not self.nonfinite.get(key, set()) & set(record["ranks"]), f"I3: a gradient that is not finite: {record}")
        check(all(base == step for base in record["bases"]), f"I2: {record}")
        able = set(range(self.world.size)) - excused - set(record["ranks"])
        # What a rank that has died has made alone, others cannot make any more: they were told that they were late.
        enough = len(record["ranks"]) >= spec.required or not able or bool(self.left.get(key)) or died_with_it
        enough = enough or self._is_beyond_round(name, step)
        # Without follow the first rank that leaves ends the round, so who has stopped in the last step is not awaited.
        has_left = (self.away[name] | self.gone) and name not in self.followed
        enough = enough or bool(has_left and "does not answer" in record["reason"])
        check(enough, f"I3: {able} could have contributed: {record}")
        if spec.resyncs(self.world.size):
            return  # what is kept is checked where it is kept
        still_ask = [r for r in self.world.ranks if r.rank not in self.gone | self.joined]
        behind = min((r.lines[name].member.step if name in r.lines else 0 for r in still_ask), default=step)
        check(step + 1 - behind <= spec.max_lag, f"I5: a rank is at step {behind}, max_lag={spec.max_lag}: {record}")

    def _is_beyond_round(self, name: str, step: int) -> bool:
        """By their lengths, none of the ranks that are left comes to the step in this round."""
        lengths = [self.lengths.get((name, r), -1) for r in range(self.world.size) if r not in self.gone]
        return name in self.followed and min(lengths) >= 0 and step >= self.starts[name] + max(lengths)

    def _sent(self, body: dict[str, Any], told: set[int]) -> None:
        name = self.names[body["channel"]]
        lines = {r.rank: r.lines[name] for r in self.world.ranks if name in r.lines}
        step, contributors = body["step"], body["contributors"]
        check(told == set(contributors), f"I4: sent to {told}: {body}")
        check(contributors == sorted(set(contributors)), f"I3: {body}")
        check(contributors == self.contributors[name, step, body["scope"]], f"I3: not what is on record: {body}")
        for r, weight in zip(contributors, body["weights"], strict=True):
            gradient = lines[r].gradient
            check(gradient is not None and gradient.base == step, f"I2: rank {r} has computed {gradient}: {body}")
            check(gradient is not None and gradient.samples == weight, f"I3: rank {r} has given {gradient}: {body}")
        check(body["samples"] == sum(body["weights"]), f"I3: {body}")
        lowest = lines[contributors[0]].gradient
        if body["scope"] == 0 and lowest is not None:
            check(body["metadata"] == lowest.metadata, f"I1: metadata of rank {contributors[0]}, {lowest}: {body}")
        self._check_tags(body, 2 * len(self.world.specs[name].layout))

    def _check_tags(self, body: dict[str, Any], width: int) -> None:
        for line in (line for rank in self.world.ranks for line in rank.lines.values()):
            for running in line.reductions.values():
                end = running["tag"] + 2 * len(line.spec.layout)
                apart = end <= body["tag"] or body["tag"] + width <= running["tag"]
                check(apart, f"rank {line.rank} uses tags of {body} for {running}")
