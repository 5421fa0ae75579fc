"""What the training threads of tests/control_world.py do: followed and unfollowed epochs, collectives, leaving early.

Each program is a generator that makes the calls that hvd_backup.training, follow and first_n make, in the same order,
and yields after each, so that a schedule can put anything in between.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from hvd_backup._core_testing import compose

from tests.control_world import ChannelFailed, ChannelSpec, Line, Program, World, check

Waiting = Generator[bool, None, dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """One rank's part in one epoch. stop_after: `break` after so many steps of its own."""

    batches: int
    length_known: bool = True
    stop_after: int | None = None


class LeavesNow(Exception):
    """The program's own exception."""


@dataclass(frozen=True)
class Failure:
    """The program of `rank` ends in its step-th step, when it has handed over so many buckets; -1: before it opens anything.

    planned: it leaves without saying that anything went wrong.
    """

    rank: int
    step: int
    buckets: int = 0
    planned: bool = False

    def leave(self) -> LeavesNow:
        return LeavesNow("" if self.planned else "ValueError: on purpose")


@dataclass(frozen=True)
class Epoch:
    """data: of each rank. barrier: all ranks meet afterwards, in a collective of their own."""

    data: tuple[Data, ...]
    followed: bool = True
    align_every: int = 0
    barrier: bool = False


@dataclass(frozen=True)
class Plan:
    """What all ranks do. last_epoch: of each rank, after which it exits; None: goes through all."""

    size: int
    specs: tuple[ChannelSpec, ...]
    epochs: tuple[Epoch, ...] = ()
    last_epoch: tuple[int | None, ...] = ()
    failure: Failure | None = None
    calls: tuple[tuple[str, ...], ...] = ()  # of collectives, by rank

    def world(self, may_stop: bool = True) -> World:
        """A world in which every rank is about to begin."""
        world = World(self.size, list(self.specs), may_stop)
        for rank in world.ranks:
            body = collectives(world, rank.rank, self) if self.calls else training(world, rank.rank, self)
            rank.program = until_exit(world, rank.rank, body)
        return world


def until_exit(world: World, r: int, body: Program) -> Program:
    """Runs the program and leaves, as shutdown() does."""
    failure = ""
    try:
        yield from body
    except ChannelFailed as error:
        failure = str(error)
    except LeavesNow as error:
        failure = str(error)
    rank = world.ranks[r]
    for line in rank.lines.values():
        line.member.withdraw()
        line.collect()
    world.leave(r, failure)
    yield True
    while not rank.all_gone:
        yield False


def opened(line: Line) -> Program:
    while line.id is None:
        usable(line)
        yield False


def usable(line: Line) -> None:
    if line.failure:
        raise ChannelFailed(line.failure)


def wait(line: Line) -> Waiting:
    """Channel.wait()."""
    usable(line)
    while not line.member.next():
        if len(line.world.specs) > 1:
            line.member.announce_waiting()
        yield False
        usable(line)
    return line.take()


def caught_up(line: Line) -> Generator[bool, None, str]:
    """Applies all that was missed; returns "resume" or "over"."""
    while (update := (yield from wait(line)))["kind"] == "update":
        yield True
    return str(update["kind"])


def step(line: Line, plan: Plan, count: int) -> Program:
    """backward() and step()."""
    usable(line)
    line.begin(1.0 + line.rank, f"{line.spec.name} {line.rank} {count}")
    failure = plan.failure
    fails = failure is not None and failure.rank == line.rank and failure.step == count
    for bucket in range(len(line.spec.layout)):
        if fails and failure is not None and failure.buckets == bucket:
            raise failure.leave()
        line.submit(bucket)
        yield True
    while (update := (yield from wait(line)))["kind"] == "update" and not update["contributed"]:
        yield True
        if line.spec.kind == "collective":  # its result is the outcome of this very call
            break
    yield True


def training(world: World, r: int, plan: Plan) -> Program:
    """All epochs, over all channels (a GAN has two)."""
    lines = []
    if plan.failure is not None and (plan.failure.rank, plan.failure.step) == (r, -1):
        raise plan.failure.leave()
        yield
    for spec in plan.specs:
        lines.append(line := world.line(r, spec.name))
        yield from opened(line)
    steps = 0
    last = plan.last_epoch[r] if plan.last_epoch else None
    for number, epoch in enumerate(plan.epochs):
        if epoch.followed:
            steps = yield from followed(lines, plan, epoch, steps, number)
        else:
            for _ in range(epoch.data[r].batches):
                for line in lines:
                    yield from step(line, plan, steps)
                steps += 1
            for line in lines:
                yield from leave(line)
        if last == number:
            return
        if epoch.barrier:
            all_here = world.meet(r, number)
            while not all_here():
                yield False


def leave(line: Line) -> Program:
    """leave_round(): this rank enters a full collective."""
    usable(line)
    line.member.leave()
    yield True
    yield from caught_up(line)


def followed(lines: list[Line], plan: Plan, epoch: Epoch, steps: int, number: int) -> Generator[bool, None, int]:
    """A loop over follow()."""
    first, world, data = lines[0], lines[0].world, epoch.data[lines[0].rank]
    start = first.member.step
    running = True
    for line in lines:
        usable(line)
        length = data.batches if data.length_known and line is first else -1
        line.member.begin_round(length, epoch.align_every if line is first else 0)
        yield True
        running = (yield from caught_up(line)) == "resume" and running
    own = 0
    while running:
        while not first.member.round_over and (end := first.member.round_end) is not None and first.member.step >= end:
            if (yield from caught_up(first)) == "over":
                break
        if first.member.round_over or first.member.step - start >= data.batches or own == data.stop_after:
            break
        for line in lines:
            yield from step(line, plan, steps)
        steps += 1
        own += 1
        at = first.member.step
        if epoch.align_every and at > start and at % epoch.align_every == 0 and first.alignments[-1:] != [at]:
            first.alignments.append(at)
            if epoch.barrier and len(lines) == 1:
                all_here = world.meet(first.rank, (number, at))
                while not all_here():
                    yield False
    if epoch.align_every and own != data.stop_after:
        at = first.member.step
        meetings = [at for at in range(start + 1, at + 1) if at % epoch.align_every == 0]
        check(
            first.alignments == meetings, f"rank {first.rank} was at {first.alignments}, the others met at {meetings}"
        )
    first.alignments.clear()
    yield from end_rounds(lines)
    return steps


def end_rounds(lines: list[Line]) -> Program:
    """Sees the rounds of all channels to their end, all at once: the others may need all of them to go on."""
    for line in lines:
        if not line.member.round_over:
            line.member.away()
            yield True
    while not all(line.member.round_over for line in lines):
        progress = False
        for line in lines:
            usable(line)
            if not line.member.round_over and line.member.next():
                check(line.take()["kind"] != "resume", f"rank {line.rank} is away, and was told to resume")
                progress = True
        yield progress
    for line in lines:
        line.member.leave()
        yield from wait(line)


def collectives(world: World, r: int, plan: Plan) -> Program:
    """Calls by name of the channel: first_n_allreduce, or allreduce when all ranks are required. "join": join().

    "full:name": a full collective, which pauses this rank in the channels that do not require it, and meets in `name`.
    """
    lines: dict[str, Line] = {}
    for count, call in enumerate(plan.calls[r]):
        if call == "join":
            world.ranks[r].joined = True
            world.send(r, compose("Join"))
            while world.ranks[r].joined:
                yield False
            continue
        kind, _, name = call.rpartition(":")
        if kind == "full":
            world.send(r, compose("Pause"))
            yield True
        if name not in lines:
            lines[name] = world.line(r, name)
            yield from opened(lines[name])
        yield from step(lines[name], plan, count)


def random_collectives(rng: random.Random) -> Plan:
    """Ranks that call first_n_allreduce a different number of times, meet in full collectives, and join."""
    size = rng.randint(1, 5)
    required, max_lag = rng.randint(1, size), rng.choice([1, 2, 16])
    specs, calls = [], [[] for _ in range(size)]  # type: ignore[var-annotated]
    for era in range(rng.randint(1, 2)):
        first_n = ChannelSpec(f"first_n[{era}]", "collective", required, max_lag=max_lag, wait_for_all=False)
        full = ChannelSpec(f"meeting[{era}]", "collective", size, max_lag=max_lag, wait_for_all=False)
        specs += [first_n, full]
        for _ in range(rng.randint(0, 3)):
            most = rng.randint(0, 6)
            for own in calls:
                # Fewer than the others: those go on without it, as far as the journal reaches.
                fewer = rng.randint(0, most) if required < size and max_lag == 16 and rng.random() < 0.3 else most
                own += [first_n.name] * fewer + [f"full:{full.name}"]
        most = rng.randint(0, 6)
        for own in calls:
            own += [first_n.name] * rng.randint(0, most) + ["join"]
    return Plan(size, tuple(specs), calls=tuple(tuple(own) for own in calls))


def random_plan(rng: random.Random) -> Plan:
    """Any training that must come to its end: nothing of it asks for what the design does not promise."""
    size = rng.randint(1, 5)
    required = rng.randint(1, size)
    layout = rng.choice([(0,), (0, 0), (0, 1), (0, 0, 1, 2)])
    specs = []
    for number in range(rng.choice([1, 1, 1, 2])):
        specs.append(
            ChannelSpec(
                name=f"optimizer.{number}",
                required=required,
                layout=layout,
                arrive_first=rng.random() < 0.6,
                grace_us=rng.choice([0, 0, 100, 1000]),
                max_misses=rng.choice([0, 0, 1, 3]),
                max_lag=rng.choice([1, 2, 5, 64]),
            )
        )
    epochs = []
    for _ in range(rng.randint(1, 3)):
        style = rng.choice(["equal", "equal", "uneven", "unknown", "mixed", "break", "align", "unfollowed"])
        most = rng.choice([0, 1, 3, 6, 20])
        data = []
        for _ in range(size):
            batches = most if style in ("equal", "align", "break") else rng.randint(0, most)
            known = style not in ("unknown", "mixed") or (style == "mixed" and rng.random() < 0.5)
            stop = rng.randint(0, most) if style == "break" and rng.random() < 0.4 else None
            data.append(Data(batches, known, stop))
        align = rng.randint(1, 4) if style == "align" else 0
        barrier = rng.random() < (0.5 if style == "align" and len(specs) == 1 else 0.3)
        epochs.append(Epoch(tuple(data), style != "unfollowed", align, barrier))
    last = tuple(rng.randrange(len(epochs)) if rng.random() < 0.1 else None for _ in range(size))
    failure = None
    if rng.random() < 0.3 and not any(epoch.barrier for epoch in epochs):
        planned = rng.random() < 0.3
        failure = Failure(rng.randrange(size), rng.randint(-1, 8), rng.randint(0, len(layout) - 1), planned)
    return Plan(size, tuple(specs), tuple(epochs), last, failure)
