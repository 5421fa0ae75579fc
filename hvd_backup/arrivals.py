"""Tables of times from a recording: for each step and rank, when its gradient arrived and how long it took.

    times = arrivals.of(trace.read("trace.jsonl").channel(), size=4)

All times are seconds on the coordinator's clock: what a message needs to rank 0 is part of them. A rank begins with a
step when it has the update before (or, when it was late, when it is told to go on), and arrives when the coordinator
hears that its gradient is ready: with arrive="first" the first bucket, so the rest of the backward pass is part of the
`tail`. With scope="bucket" the first bucket stands for the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hvd_backup.trace import ChannelRecording, Line

__all__ = ["Arrivals", "CatchUp", "Noise", "of"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class CatchUp:
    """A rank was late at step `missed`, and began with step `resumed` after `seconds` of catching up and waiting."""

    rank: int
    missed: int
    resumed: int
    seconds: float


@dataclass(frozen=True)
class Noise:
    """Squared norms of one update's gradients.

    Attributes:
        contributors: k.
        contribution_squares: summed over the k contributions.
        mean_squares: of their mean.
        weights: the contributors' samples [k].
    """

    contributors: int
    contribution_squares: float
    mean_squares: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Arrivals:
    """S decided steps of n ranks.

    Attributes:
        steps: their numbers [S].
        took: seconds from a rank's beginning with the step to its arrival [S, n]; NaN: it did not compute this step, or
            it is not known when it began (the first step of a round).
        arrived: seconds from the opening of the step to the arrival [S, n]; NaN: the rank did not compute this step.
        contributed: the rank's gradient is in the update, in every scope [S, n].
        dropped: the rank's gradient was not used, at least not whole [S, n].
        weights: samples of the contributors [S, n], 0 for others.
        opened: when the step could be computed, in seconds of the trace's own time [S].
        decided: seconds from the opening to the decision [S].
        tail: seconds from the decision until the last contributor had the update [S]; NaN: not known.
        required: N [S].
        first: the first step, or the first of a round: what ranks did before is not known [S].
        catch_ups: in order.
        resyncs: (rank, step) for each time that a rank beyond the journal has taken over the state of another one.
        noise: of the updates that it was measured for.
        died: the first step that a rank has not finished, because its process has died.
    """

    steps: NDArray[np.int64]
    took: Floats
    arrived: Floats
    contributed: Flags
    dropped: Flags
    weights: Floats
    opened: Floats
    decided: Floats
    tail: Floats
    required: NDArray[np.int64]
    first: Flags
    catch_ups: tuple[CatchUp, ...]
    noise: tuple[Noise, ...]
    died: dict[int, int] = field(default_factory=dict)
    resyncs: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """n."""
        return int(self.took.shape[1])

    @property
    def lateness(self) -> Floats:
        """Seconds that each arrival came after the middle one of its step (of n ranks, the ceil(n/2)-th) [S, n].

        Not after the N-th: without backup workers nobody is later than that, and yet somebody is waited for.
        """
        middle = np.sort(self.arrived, axis=1)[:, (self.size - 1) // 2 : (self.size - 1) // 2 + 1]  # NaN comes last
        return self.arrived - middle

    def step_seconds(self) -> Floats:
        """Seconds from decision to decision, for steps whose predecessor is in the same round."""
        at = self.opened + self.decided
        return np.diff(at)[~self.first[1:]]

    def time_to_kth(self) -> Floats:
        """Seconds from the opening of a step to its k-th arrival [usable steps, n], NaN where fewer than k arrived."""
        return np.sort(self.arrived[~self.first], axis=1)


def of(channel: ChannelRecording, size: int, last: int | None = None) -> Arrivals:
    """The times of a channel; last: of its newest so many steps only."""
    lines = _by_step(channel)
    numbers = sorted(lines.decisions)
    if last is not None:
        numbers = numbers[-last:]
    index = {step: i for i, step in enumerate(numbers)}
    shape = (len(numbers), size)
    took, arrived = np.full(shape, np.nan), np.full(shape, np.nan)
    contributed, dropped, weights = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape)
    opened, decided, tail = np.zeros(len(numbers)), np.zeros(len(numbers)), np.full(len(numbers), np.nan)
    required, first = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), bool)

    def arrival(i: int, step: int, rank: int, at_us: int) -> None:
        arrived[i, rank] = (at_us - decision["opened_us"]) / 1e6
        began = lines.resumed.get((step, rank), lines.done.get(step - 1, {}).get(rank))
        if began is not None and not first[i]:
            took[i, rank] = (at_us - began) / 1e6

    for step, i in index.items():
        decision = lines.decisions[step]
        opened[i] = decision["opened_us"] / 1e6
        decided[i] = (decision["t_us"] - decision["opened_us"]) / 1e6
        required[i] = decision["required"]
        first[i] = step == 0 or step in lines.round_starts
        # An update that nobody contributes to (all have withdrawn, or hold NaN) has none of these.
        contributions = (decision.get(name, []) for name in ("ranks", "arrivals_us", "weights"))
        for rank, at, weight in zip(*contributions, strict=True):
            contributed[i, rank], weights[i, rank] = True, weight
            arrival(i, step, rank, at)
        for rank, at in lines.dropped.get(step, {}).items():
            contributed[i, rank], dropped[i, rank], weights[i, rank] = False, True, 0.0
            if np.isnan(arrived[i, rank]):
                arrival(i, step, rank, at)
        if done := lines.done.get(step):
            tail[i] = (max(done.values()) - decision["t_us"]) / 1e6
    return Arrivals(
        np.array(numbers, np.int64),
        took, arrived, contributed, dropped, weights, opened, decided, tail, required, first,
        tuple(_catch_ups(channel)),
        tuple(lines.noise[step] for step in numbers if step in lines.noise),
        {line["ranks"][0]: line["step"] for line in channel.of("lost")},
        tuple((line["ranks"][0], line["step"]) for line in channel.of("resynced")),
    )  # fmt: skip


class _by_step:  # noqa: N801
    """The lines of a channel, sorted."""

    def __init__(self, channel: ChannelRecording) -> None:
        self.decisions: dict[int, Line] = {}  # of scope 0
        self.dropped: dict[int, dict[int, int]] = {}  # step, rank: when
        self.done: dict[int, dict[int, int]] = {}
        self.resumed: dict[tuple[int, int], int] = {}
        self.round_starts: set[int] = set()
        self.noise: dict[int, Noise] = {}
        take: dict[str, Callable[[Line], None]] = {
            "decision": self._decision,
            "dropped": self._dropped,
            "final": self._final,
            "resumed": self._resumed,
            "round_over": lambda line: self.round_starts.add(line["step"]),
        }
        for line in channel.lines:
            if line["event"] in take:
                take[line["event"]](line)

    def _decision(self, line: Line) -> None:
        if line["scope"] == 0:
            self.decisions[line["step"]] = line

    def _dropped(self, line: Line) -> None:
        self.dropped.setdefault(line["step"], {})[line["ranks"][0]] = line["arrivals_us"][0]

    def _final(self, line: Line) -> None:
        self.done[line["step"]] = dict(zip(line.get("ranks", []), line.get("done_us", []), strict=True))
        decision = self.decisions.get(line["step"])
        if decision is not None and "mean_squares" in line:
            weights = tuple(decision.get("weights", []))
            squares = line["contribution_squares"], line["mean_squares"]
            if None not in squares and len(weights) == len(line.get("ranks", [])) > 0:
                self.noise[line["step"]] = Noise(len(weights), *squares, weights)

    def _resumed(self, line: Line) -> None:
        self.resumed[line["step"], line["ranks"][0]] = line["t_us"]


def _catch_ups(channel: ChannelRecording) -> list[CatchUp]:
    since: dict[int, tuple[int, int]] = {}
    found = []
    for line in channel.lines:
        if line["event"] == "dropped":
            since.setdefault(line["ranks"][0], (line["step"], line["arrivals_us"][0]))
        elif line["event"] == "resumed" and (began := since.pop(line["ranks"][0], None)):
            found.append(CatchUp(line["ranks"][0], began[0], line["step"], (line["t_us"] - began[1]) / 1e6))
    return found
