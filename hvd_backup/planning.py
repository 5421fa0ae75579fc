"""Which number of backup workers pays: time per update against what an update is worth, for every b.

    print(planning.plan_recording(trace.read("trace.jsonl")))

For each b, with N = n - b:

- Time per update: the measured computing times are run through the rules of who contributes (csrc/control/forecast.h),
  late work carried over into the next steps as it is in reality. Without carrying over it is the mean of the N-th order
  statistic of n computing times, as in Chen et al. 2016 (arXiv 1604.00981, section 3.1) and, for exponential times,
  Dutta et al. 2018 (arXiv 1803.01113, section 3).
- Updates needed for the same progress: a + c / N, that is (1 + B / N) up to a factor, where B is the gradient noise
  scale in batches of one rank (McCandlish et al. 2018, arXiv 1812.06162, section 2.2). B infinite is the gain
  proportional to N of Xu et al. 2020 (arXiv 2004.14696): twice the batch, half the updates. B = 0: the batch does not
  matter.
- The best b has the least time * updates. Confidence: the same for resampled recordings (moving blocks of steps).

Pure functions of arrays. What it is not: a statement about generalisation; nor does it know of grace and max_misses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvd_backup import _core, arrivals
from hvd_backup.arrivals import Floats, Noise
from hvd_backup.errors import UsageError
from hvd_backup.trace import Recording

__all__ = ["Choice", "Plan", "noise_scale_of", "plan", "plan_recording"]

RESAMPLED = 200
WORK = 2e8  # elements that the resampling may go through: seconds
BLOCK = 10  # steps that stay together when a recording is resampled: delays come in a row


@dataclass(frozen=True)
class Choice:
    """What to expect of b backup workers.

    Attributes:
        backup_workers: b.
        required: N.
        update_s: seconds per update.
        updates: updates needed for the progress of one update with b = 0.
        speedup: progress per second, relative to b = 0.
        interval: of the speed-up, 5 % to 95 %; (nan, nan) when nothing was resampled.
        rank_seconds: what all n ranks spend on the progress of one update with b = 0.
        contributed: for each rank, the share of updates that it is part of.
    """

    backup_workers: int
    required: int
    update_s: float
    updates: float
    speedup: float
    interval: tuple[float, float]
    rank_seconds: float
    contributed: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """A choice for every b. str() is a table and a verdict.

    Attributes:
        choices: by b, from 0.
        best: the one with the largest speed-up.
        confidence: the share of the resampled recordings in which it is within 1 % of the best; nan: not resampled.
        noise_scale: B, in batches of one rank; may be infinite.
        noise_known: whether it was measured or given. Otherwise it counts as infinite, which favours few backups.
        steps: how many steps were measured.
        tail_s: seconds from a decision until its update is everywhere.
    """

    choices: tuple[Choice, ...]
    best: Choice
    confidence: float
    noise_scale: float
    noise_known: bool
    steps: int
    tail_s: float

    def why(self) -> str:
        """The verdict, in one sentence or two."""
        none = self.choices[0]
        if self.best.backup_workers == 0:
            return "b = 0: no update is so much faster without its last ranks that it makes up for the smaller batch."
        sure = (
            ""
            if math.isnan(self.confidence)
            else f" (at most 1 % from the best in {self.confidence:.0%} of resamplings)"
        )
        low, high = self.best.interval
        between = "" if math.isnan(low) else f", {low:.2f} to {high:.2f}"
        return (
            f"b = {self.best.backup_workers}: an update takes {_ms(self.best.update_s)} ms instead of "
            f"{_ms(none.update_s)} ms, and {self.best.updates:.2f} times as many are needed: "
            f"{self.best.speedup:.2f} times the progress per second{between}{sure}."
        )

    def noise(self) -> str:
        """What is assumed about gradient noise."""
        if not self.noise_known:
            return (
                "gradient noise scale: not measured, taken as infinite (updates needed grow as 1/N). Record a training "
                "run, or give --noise-scale"
            )
        if math.isinf(self.noise_scale):
            return "gradient noise scale: infinite (updates needed grow as 1/N)"
        return f"gradient noise scale: {self.noise_scale:.3g} batches of a rank"

    def rows(self) -> list[list[str]]:
        """The table's cells, under COLUMNS."""
        return [
            [
                f"{c.backup_workers}{' *' if c is self.best else ''}", str(c.required), _ms(c.update_s),
                f"{c.updates:.3f}", f"{c.speedup:.3f}",
                "-" if math.isnan(c.interval[0]) else f"{c.interval[0]:.3f} - {c.interval[1]:.3f}",
                f"{c.rank_seconds:.3g}", f"{min(c.contributed):.0%}",
            ]
            for c in self.choices
        ]  # fmt: skip

    def __str__(self) -> str:
        cells = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", self.noise(), f"best: {self.why()}"])


COLUMNS = [
    "b", "N", "update [ms]", "updates needed", "speed-up", "5 % - 95 %", "rank-seconds", "least rank's share",
]  # fmt: skip


def plan(
    took: Floats,
    *,
    tail_s: float = 0.0,
    noise_scale: float | None = None,
    carry_over: bool = True,
    min_contributors: int = 1,
    resampled: int = RESAMPLED,
    seed: int = 0,
) -> Plan:
    """The plan for computing times.

    Args:
        took: seconds [steps, ranks]; NaN: the rank did not compute this step (it was busy with an older one), and is
            given another of its own times.
        tail_s: from a decision until its contributors have the update.
        noise_scale: B, in batches of one rank; None: not known, taken as infinite.
        carry_over: False: steps are independent, nobody is late for a step because of the one before.
        min_contributors: N is never below it.
        resampled: how many resampled recordings the intervals come from; fewer when there is much to go through.

    Raises:
        UsageError: there are no complete times, or the noise scale is negative.
    """
    if noise_scale is not None and not noise_scale >= 0:
        raise UsageError(f"noise_scale={noise_scale}: expected a number >= 0, or inf")
    generator = np.random.default_rng(seed)
    times = np.ascontiguousarray(_filled(took, generator) * 1e6)
    steps, size = times.shape
    if not 1 <= min_contributors <= size:
        raise UsageError(f"min_contributors={min_contributors}: expected 1 to {size}, the number of ranks")
    scale = math.inf if noise_scale is None else noise_scale
    needed = np.array([_updates_needed(size - b, size, scale) for b in range(size - min_contributors + 1)])
    point = [_forecast(times, size - b, tail_s, carry_over) for b in range(len(needed))]
    update_s = np.array([seconds for seconds, _ in point])
    speedup = update_s[0] / (update_s * needed)
    best = int(np.argmax(speedup))
    samples = _resample(
        times, needed, tail_s, carry_over, min(resampled, int(WORK / times.size / len(needed))), generator
    )
    intervals = np.quantile(samples, [0.05, 0.95], axis=0).T if len(samples) else np.full((len(needed), 2), np.nan)
    choices = tuple(
        Choice(
            backup_workers=b,
            required=size - b,
            update_s=float(update_s[b]),
            updates=float(needed[b]),
            speedup=float(speedup[b]),
            interval=(float(intervals[b, 0]), float(intervals[b, 1])),
            rank_seconds=float(size * update_s[b] * needed[b]),
            contributed=tuple(point[b][1]),
        )
        for b in range(len(needed))
    )
    good = float(np.mean(samples[:, best] >= 0.99 * samples.max(axis=1))) if len(samples) else math.nan
    return Plan(choices, choices[best], good, scale, noise_scale is not None, steps, tail_s)


def plan_recording(
    recording: Recording,
    channel: str | None = None,
    *,
    noise_scale: float | None = None,
    min_contributors: int = 1,
    last: int | None = None,
) -> Plan:
    """The plan for a recorded run, best one with b = 0: then every rank's time is known for every step.

    Args:
        channel: None: the training channel with the most updates.
        noise_scale: None: as measured in the run.
        last: only the newest so many updates.
    """
    times = arrivals.of(recording.channel(channel), recording.size, last)
    tails = times.tail[~times.first & ~np.isnan(times.tail)]
    if noise_scale is None:
        noise_scale = noise_scale_of(times.noise)
    return plan(
        times.took,
        tail_s=float(np.mean(tails)) if len(tails) else 0.0,
        noise_scale=noise_scale,
        min_contributors=min_contributors,
    )


def noise_scale_of(noise: Sequence[Noise]) -> float | None:
    """B = S / |G|^2 in batches of one rank, from squared norms: McCandlish et al. 2018, appendix A.1.

    Over k contributions with w_i samples, W in all, E|g_i|^2 = |G|^2 + S / w_i and E|mean|^2 = |G|^2 + S / W. S and
    |G|^2 are averaged over the updates before they are divided.

    Returns:
        None when no update had two contributions; inf when the noise hides the gradient.
    """
    noises, signals, weights = [], [], []
    for each in noise:
        total = math.fsum(each.weights)
        apart = math.fsum(1 / weight for weight in each.weights) / each.contributors - 1 / total
        if each.contributors < 2 or apart <= 0:
            continue
        excess = (each.contribution_squares / each.contributors - each.mean_squares) / apart
        noises.append(excess)
        signals.append(each.mean_squares - excess / total)
        weights.append(total / each.contributors)
    if not noises:
        return None
    signal = float(np.mean(signals))
    return max(float(np.mean(noises)), 0.0) / signal / float(np.mean(weights)) if signal > 0 else math.inf


def _updates_needed(required: int, size: int, scale: float) -> float:
    """Updates with N = `required` that make the progress of one with N = n."""
    if math.isinf(scale):
        return size / required
    return (1 + scale / required) / (1 + scale / size)


def _filled(took: Floats, generator: np.random.Generator) -> Floats:
    """Without the steps of which nothing is known, and with every rank's gaps filled from its other times."""
    if took.ndim != 2 or took.shape[1] < 1:
        raise UsageError(f"computing times of shape {took.shape}: expected [steps, ranks]")
    known: Floats = took[~np.all(np.isnan(took), axis=1)].astype(np.float64)
    for rank in range(known.shape[1]):
        column = known[:, rank]
        missing = np.isnan(column)
        if np.all(missing):
            raise UsageError(
                f"nothing is known about how long rank {rank} computes ({len(known)} steps are usable): record more "
                "steps, best with backup_workers=0"
            )
        column[missing] = generator.choice(column[~missing], np.sum(missing))
    return known


def _forecast(times_us: Floats, required: int, tail_s: float, carry_over: bool) -> tuple[float, list[float]]:
    steps, size = times_us.shape
    tail_us = tail_s * 1e6
    update_us, contributed = _core.forecast(times_us.ctypes.data, steps, size, required, tail_us, tail_us, carry_over)
    return update_us / 1e6, contributed


def _resample(
    times_us: Floats, needed: Floats, tail_s: float, carry_over: bool, count: int, generator: np.random.Generator
) -> Floats:
    """The speed-up of each b [count, b] in recordings made of random blocks of this one."""
    steps, size = times_us.shape
    block = max(1, min(BLOCK, steps // 10))
    found = np.empty((max(count, 0), len(needed)))
    for row in found:
        begins = generator.integers(0, steps - block + 1, math.ceil(steps / block))
        picked = (begins[:, None] + np.arange(block)).ravel()[:steps]
        times = np.ascontiguousarray(times_us[picked])
        update_s = np.array([_forecast(times, size - b, tail_s, carry_over)[0] for b in range(len(needed))])
        row[:] = update_s[0] / (update_s * needed)
    return found


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"
