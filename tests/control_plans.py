"""Random plans for tests/control_world.py: only what must come to its end by the design, whatever the schedule is.

Each takes a random.Random, which may be Hypothesis's own, so that failing plans shrink; smaller numbers are simpler.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

from tests.control_gpus import GpuPlan
from tests.control_programs import Data, Epoch, Failure, Plan, meeting
from tests.control_rank import ChannelSpec

LAYOUTS = [(0,), (0, 0), (0, 1), (0, 0, 1, 2)]


def optimizers(rng: Random, size: int, count: int, required: int | None = None) -> tuple[ChannelSpec, ...]:
    """One optimizer or two, as one program makes them."""
    required = rng.randint(1, size) if required is None else required
    layout = rng.choice(LAYOUTS)
    return tuple(
        ChannelSpec(
            f"optimizer.{number}",
            required=required,
            layout=layout,
            arrive_first=rng.random() < 0.6,
            grace_us=rng.choice([0, 0, 100, 1000]),
            max_misses=rng.choice([0, 0, 1, 3]),
            max_lag=rng.choice([64, 5, 2, 1]),
            resync=rng.random() < 0.5,
        )
        for number in range(count)
    )


def epoch(rng: Random, size: int, most: int, alone: bool) -> Epoch:
    """Any epoch. alone: with one optimizer; two do not go together with meetings of all ranks inside an epoch."""
    style = rng.choice(["equal", "uneven", "unknown", "mixed", "break", "align", "unfollowed"])
    data = []
    for _ in range(size):
        batches = most if style in ("equal", "align", "break") else rng.randint(0, most)
        known = style != "unknown" and (style != "mixed" or rng.random() < 0.5)
        stop = rng.randint(0, most) if style == "break" and rng.random() < 0.4 else None
        data.append(Data(batches, known, stop))
    align = rng.randint(1, 4) if style == "align" else 0
    barrier = rng.random() < 0.3 and (alone or not align)
    return Epoch(tuple(data), style != "unfollowed", align, barrier)


def nonfinite(rng: Random, size: int, specs: tuple[ChannelSpec, ...]) -> frozenset[tuple[int, int, int]]:
    """Which gradients hold NaN; none where ranks arrive before they know."""
    share = rng.choice([0, 0, 0.05, 0.3, 0.9])
    if any(spec.arrive_first for spec in specs):
        return frozenset()
    places = itertools.product(range(size), range(20), range(len(specs[0].layout)))
    return frozenset(place for place in places if rng.random() < share)


def training(rng: Random) -> Plan:
    """Training that ends as planned, though some ranks may go through fewer epochs."""
    size = rng.randint(1, 5)
    specs = optimizers(rng, size, rng.choice([1, 1, 1, 2]))
    epochs = [epoch(rng, size, rng.choice([1, 3, 6, 20, 0]), len(specs) == 1) for _ in range(rng.randint(1, 3))]
    last = [rng.randrange(len(epochs)) if rng.random() < 0.1 else None for _ in range(size)]
    for number in range(min((each for each in last if each is not None), default=len(epochs)), len(epochs)):
        epochs[number] = replace(epochs[number], barrier=False)  # which would need those who have left, too
    return Plan(size, specs, tuple(epochs), tuple(last), nonfinite=nonfinite(rng, size, specs))


def behind(rng: Random) -> Plan:
    """Ranks fall out of the journal again and again, and come back by taking over another one's state."""
    size = rng.randint(2, 5)
    count = rng.choice([1, 1, 2])
    specs = optimizers(rng, size, count, required=rng.randint(1, size - 1))
    specs = tuple(replace(spec, max_lag=rng.choice([1, 2, 3, 4]), resync=True) for spec in specs)
    epochs = [epoch(rng, size, rng.choice([3, 6, 12]), count == 1) for _ in range(rng.randint(1, 3))]
    return Plan(size, specs, tuple(epochs))


def failing(rng: Random) -> Plan:
    """One rank leaves where it should not: before it opens anything, or in the middle of a step."""
    size = rng.randint(2, 4)
    specs = optimizers(rng, size, 1)
    styles = [epoch(rng, size, rng.randint(0, 3), True) for _ in range(rng.randint(1, 2))]
    epochs = tuple(Epoch(each.data, each.followed, each.align_every) for each in styles)
    failure = Failure(rng.randrange(size), rng.randint(-1, 3), rng.randrange(len(specs[0].layout)), rng.random() < 0.3)
    return Plan(size, specs, epochs, failure=failure, nonfinite=nonfinite(rng, size, specs))


def collectives(rng: Random) -> Plan:
    """first_n_allreduce and full collectives; at the end of an era all ranks join, after unequal numbers of calls."""
    size = rng.randint(1, 5)
    required, max_lag = rng.randint(1, size), rng.choice([16, 2, 1])
    specs: list[ChannelSpec] = []
    calls: list[list[str]] = [[] for _ in range(size)]
    for era in range(rng.randint(1, 2)):
        first_n = ChannelSpec(f"first_n[{era}]", "collective", required, max_lag=max_lag, wait_for_all=False)
        specs += [first_n, meeting(size, f"meeting[{era}]", max_lag)]
        for _ in range(rng.randint(0, 3)):
            most = rng.randint(0, 5)
            for own in calls:
                # Fewer than the others: those go on without it, as far as the journal reaches.
                fewer = required < size and max_lag == 16 and rng.random() < 0.3
                own += [first_n.name] * (rng.randint(0, most) if fewer else most) + [f"full:{specs[-1].name}"]
        for own in calls:
            own += [first_n.name] * rng.randint(0, 5) + ["join"]
    return Plan(size, tuple(specs), calls=tuple(tuple(own) for own in calls))


def without_one(rng: Random) -> Plan:
    """Training that N ranks can do by themselves: nothing asks for all of them but the start.

    Two contributors at least, so that every shard has two keepers. Equal lengths: a rank's length in its next epoch is
    known before it begins. One optimizer with follow: the rounds of a second one are of unknown length, and end when
    all are away.
    """
    size = rng.randint(3, 5)
    count = rng.choice([1, 2])
    specs = optimizers(rng, size, count, required=rng.randint(2, size - 1))
    max_lag = rng.choice([64, 5, 2, 1])
    specs = tuple(
        ChannelSpec(
            s.name,
            required=s.required,
            layout=s.layout,
            arrive_first=s.arrive_first,
            grace_us=s.grace_us,
            max_lag=max_lag,
            resync=max_lag < 64,
        )
        for s in specs
    )
    each = Epoch((Data(rng.randint(1, 8)),) * size, followed=count == 1 and rng.random() < 0.6)
    return Plan(size, specs, (each,) * rng.randint(1, 3))


def on_gpus(rng: Random, plan: Plan) -> Plan:
    """The same with gradients on GPUs, most of which can exchange data directly."""
    why_not = tuple("no NCCL" if rng.random() < 0.1 else "" for _ in range(plan.size))
    failures, hangs = rng.choice([0, 0, 1, 3]), rng.choice([0, 0, 0, 1, 2])
    backwards = frozenset(rank for rank in range(plan.size) if rng.random() < 0.4)
    return replace(plan, gpus=GpuPlan(why_not, failures, hangs, backwards, first=rng.random() < 0.6))
