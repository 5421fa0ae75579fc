"""What the training threads of tests/control_world.py do: epochs with and without follow, collectives, leaving early.

Each program is a generator that makes the calls that hvd_backup.training, follow and first_n make, in the same order,
and yields after each, so that a schedule can put anything in between.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from hvd_backup._core_testing import compose

from tests.control_gpus import GpuPlan
from tests.control_rank import ChannelFailed, ChannelSpec, Line, Program, check
from tests.control_world import Bug, World


class LeavesNow(Exception):
    """The program's own exception."""


@dataclass(frozen=True)
class Data:
    """One rank's part in one epoch. stop_after: `break` after so many steps of its own."""

    batches: int
    length_known: bool = True
    stop_after: int | None = None


@dataclass(frozen=True)
class Epoch:
    """data: of each rank. barrier: all ranks meet afterwards, and where align_every says, in a full collective."""

    data: tuple[Data, ...]
    followed: bool = True
    align_every: int = 0
    barrier: bool = False


@dataclass(frozen=True)
class Failure:
    """The program of `rank` ends in its step-th step, with so many buckets handed over; -1: before it opens anything.

    planned: it leaves without saying that anything went wrong.
    """

    rank: int
    step: int
    buckets: int = 0
    planned: bool = False

    def leave(self) -> LeavesNow:
        return LeavesNow("" if self.planned else "ValueError: on purpose")


@dataclass(frozen=True)
class Plan:
    """What all ranks do: epochs over all channels, or (by rank) calls of collectives.

    last_epoch: of each rank, after which it exits; None: it goes through all.
    nonfinite: gradients that hold NaN, as (rank, which step of its own, bucket).
    gpus: None: gradients lie in host memory.
    """

    size: int
    specs: tuple[ChannelSpec, ...]
    epochs: tuple[Epoch, ...] = ()
    last_epoch: tuple[int | None, ...] = ()
    failure: Failure | None = None
    calls: tuple[tuple[str, ...], ...] = ()
    nonfinite: frozenset[tuple[int, int, int]] = frozenset()
    gpus: GpuPlan | None = None

    def world(self, bug: Bug | None = None) -> World:
        """A world in which every rank is about to begin."""
        meets = any(epoch.barrier for epoch in self.epochs)
        world = World(self.size, self.specs + ((meeting(self.size),) if meets else ()), bug, self.gpus)
        for rank in world.ranks:
            body = collectives(world, rank.rank, self) if self.calls else training(world, rank.rank, self)
            rank.program = until_exit(world, rank.rank, body)
        return world


def meeting(size: int, name: str = "full_collective", max_lag: int = 64) -> ChannelSpec:
    """Where all ranks come together."""
    return ChannelSpec(name, "collective", size, max_lag=max_lag, wait_for_all=False)


def until_exit(world: World, r: int, body: Program) -> Program:
    """Runs the program and leaves, as shutdown() does."""
    failure = ""
    try:
        yield from body
    except (ChannelFailed, LeavesNow) as error:
        failure = str(error)
    for line in world.ranks[r].lines.values():
        if not failure:
            line.serve(unasked=True)
        line.member.withdraw()
        line.collect()
    world.leave(r, failure)
    yield False


def training(world: World, r: int, plan: Plan) -> Program:
    """All epochs, each step over all channels (a GAN has two)."""
    if plan.failure is not None and (plan.failure.rank, plan.failure.step) == (r, -1):
        raise plan.failure.leave()
    lines = []
    for spec in plan.specs:
        lines.append(line := world.open(r, spec.name))
        while line.id is None:
            usable(line)
            yield False
    steps = 0
    for number, epoch in enumerate(plan.epochs):
        if epoch.followed:
            steps = yield from followed(lines, plan, number, steps)
        else:
            for _ in range(epoch.data[r].batches):
                for line in lines:
                    yield from step(line, plan, steps)
                steps += 1
            for line in lines:
                usable(line)
                line.member.leave()
                yield True
                yield from caught_up(line)
        if plan.last_epoch and plan.last_epoch[r] == number:
            return
        if epoch.barrier:
            yield from call(world, r, plan, "full_collective")


def followed(lines: list[Line], plan: Plan, number: int, steps: int) -> Generator[bool, None, int]:
    """A loop over follow(); returns how many steps this rank has made in all."""
    first, epoch = lines[0], plan.epochs[number]
    data = epoch.data[first.rank]
    seen, own = [], 0
    running = True
    for line in lines:
        usable(line)
        length = data.batches if data.length_known and line is first else -1
        line.member.begin_round(length, epoch.align_every if line is first else 0)
        yield True
        running = (yield from caught_up(line)) == "resume" and running
    start = first.member.round_start
    while running:
        while not first.member.round_over and (end := first.member.round_end) is not None and first.member.step >= end:
            if (yield from caught_up(first)) == "over":
                break
        if first.member.round_over or first.member.step - start >= data.batches or own == data.stop_after:
            break
        for line in lines:
            try:
                yield from step(line, plan, steps)
            except LeavesNow:
                for each in lines:
                    each.member.away()
                raise
        steps, own, at = steps + 1, own + 1, first.member.step
        if epoch.align_every and start < at <= end_of(first) and at % epoch.align_every == 0 and seen[-1:] != [at]:
            seen.append(at)
            if epoch.barrier:
                yield from call(first.world, first.rank, plan, "full_collective")
    if epoch.align_every and own != data.stop_after:
        last = min(first.member.step, end_of(first))  # with another's state, it may have come into a later round
        meetings = [at for at in range(start + 1, last + 1) if at % epoch.align_every == 0]
        check(seen == meetings, f"rank {first.rank} was at {seen}, the others met at {meetings}")
    yield from end_rounds(lines)
    return steps


def end_of(line: Line) -> int:
    """The step at which this rank's round ends, as far as it knows."""
    end = line.member.round_end
    return 1 << 60 if end is None else int(end)


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
            line.serve()
            if not line.member.round_over and line.member.next():
                check(line.take()["kind"] != "resume", f"rank {line.rank} is away, and was told to resume")
                progress = True
        yield progress
    for line in lines:
        line.member.leave()
        yield from wait(line)


def collectives(world: World, r: int, plan: Plan) -> Program:
    """Calls by name of the channel: first_n_allreduce, or allreduce where all ranks are required. "join": join().

    "full:name": a full collective, which pauses this rank in the channels that do not require all, and meets in `name`.
    """
    for count, what in enumerate(plan.calls[r]):
        if what == "join":
            world.ranks[r].joined = True
            world.send(r, compose("Join"))
            while world.ranks[r].joined:
                yield False
            continue
        kind, _, name = what.rpartition(":")
        if kind == "full":
            world.send(r, compose("Pause"))
            yield True
        yield from call(world, r, plan, name, count)


def call(world: World, r: int, plan: Plan, name: str, count: int = 0) -> Program:
    """One collective, which this rank may be the first to call."""
    line = world.ranks[r].lines.get(name)
    if line is None:
        line = world.open(r, name)
        while line.id is None:
            usable(line)
            yield False
    yield from step(line, plan, count)


def usable(line: Line) -> None:
    if line.failure:
        raise ChannelFailed(line.failure)


def serve(world: World, r: int) -> None:
    """The training thread is between two updates."""
    for line in world.ranks[r].lines.values():
        line.serve()


def wait(line: Line) -> Generator[bool, None, dict[str, Any]]:
    """Channel.wait(), as UpdateStream calls it: serves other ranks, and takes over another's state, on the way.

    A collective only waits, and says so.
    """
    trains = line.spec.kind == "training"
    while True:
        usable(line)
        if trains:
            serve(line.world, line.rank)
        if line.member.next():
            if (update := line.take())["kind"] != "resync":
                return update
            yield True
            continue
        if not trains or line.world.trainings > 1:
            line.member.announce_waiting()
        yield False


def caught_up(line: Line) -> Generator[bool, None, str]:
    """Applies all that was missed; returns "resume" or "over"."""
    while (update := (yield from wait(line)))["kind"] == "update":
        yield True
    return str(update["kind"])


def step(line: Line, plan: Plan, count: int) -> Program:
    """backward() and step(); or one collective, of which the outcome is the result of this very call."""
    usable(line)
    line.begin(1.0 + line.rank, f"{line.spec.name} {line.rank} {count}")
    failure = plan.failure if line.spec.kind == "training" else None
    buckets = list(range(len(line.spec.layout)))
    if plan.gpus is not None and line.rank in plan.gpus.backwards:
        buckets[1:] = buckets[:0:-1]
    for bucket in buckets:
        if failure is not None and (failure.rank, failure.step, failure.buckets) == (line.rank, count, bucket):
            raise failure.leave()
        line.submit(bucket, (line.rank, count, bucket) not in plan.nonfinite or line.spec.kind == "collective")
        yield True
    while (update := (yield from wait(line)))["kind"] == "update" and not update["contributed"]:
        yield True
        if line.spec.kind == "collective":
            break
    yield True
