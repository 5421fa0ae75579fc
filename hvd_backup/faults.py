"""Delays for trying things out: which rank is late, at which steps, by how much.

    HVD_BACKUP_DELAY="rank=3,ms=200,p=0.3" mpirun -np 4 python train.py     # any script, unchanged
    faults.inject(faults.Delay(rank="rotate:5", ms=50, distribution="lognormal"))  # the same from Python

Several specifications are separated by ";" and add up. The optimizers sleep once per step, before they hand over the
gradient. A delay is a pure function of (seed, rank, step): it does not depend on the calls before it, so a run can be
repeated, and every rank knows the delays of all. Delays sleep; they never burn CPU. This is not a fault model of the
network: messages are never delayed, only the training thread is.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from hvd_backup.errors import ConfigError

__all__ = ["GRAMMAR", "Delay", "Injection", "clear", "delay_ms", "inject", "injected", "parse", "sleep"]

GRAMMAR = (
    "rank=R,ms=MILLISECONDS[,p=PROBABILITY][,steps=S][,distribution=constant|exponential|lognormal|pareto][,seed=INTEGER]"
    ' with R: "3", "1-2", "0,2", "*" or "rotate:K", S: "10-20", "10,30" or "every:5"; several separated by ";"'
)

LOGNORMAL_SIGMA = 1.0  # standard deviation of the logarithm: the 99th percentile is 6.2 times the mean
PARETO_ALPHA = 2.5  # tail index; above 2, so that the variance is finite: the 99th percentile is 3.8 times the mean

_KEYS = ("rank", "ms", "p", "steps", "distribution", "seed")
_DISTRIBUTIONS = ("constant", "exponential", "lognormal", "pareto")


@dataclass(frozen=True)
class Delay:
    """One source of delays. Every distribution has the mean `ms`, given that the delay happens (probability `p`).

    Attributes:
        rank: who is late: a rank, "1-2" (inclusive), "0,2", "*" (all), or "rotate:K": at step s rank (s // K) % size.
        ms: mean delay in milliseconds, >= 0.
        p: probability of being late at a step, 0..1, drawn for each (rank, step) on its own.
        steps: None (all), a step, "10-20" (inclusive), "10,30", "every:5" (steps 0, 5, 10, ...), or integers.
        distribution: "constant"; "exponential"; "lognormal" (median ms / e^(sigma^2 / 2), sigma 1); "pareto" (tail
            index 2.5, minimum 0.6 ms).
        seed: delays with equal seeds draw the same numbers.
    """

    rank: int | str
    ms: float
    p: float = 1.0
    steps: int | str | Iterable[int] | None = None
    distribution: str = "constant"
    seed: int = 0
    _ranks: _Numbers = field(init=False, repr=False, compare=False)
    _steps: _Numbers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.ms, (int, float)) and math.isfinite(self.ms) and self.ms >= 0):
            raise _bad("ms", self.ms, "milliseconds >= 0")
        if not (isinstance(self.p, (int, float)) and 0 <= self.p <= 1):
            raise _bad("p", self.p, "a probability from 0 to 1")
        if self.distribution not in _DISTRIBUTIONS:
            raise _bad("distribution", self.distribution, "one of " + ", ".join(_DISTRIBUTIONS))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise _bad("seed", self.seed, "an integer")
        steps = self.steps
        if steps is not None and not isinstance(steps, (int, str)):
            steps = ",".join(str(step) for step in steps)
            object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "_ranks", _Numbers.parse("rank", str(self.rank), prefix="rotate:"))
        object.__setattr__(self, "_steps", _Numbers.parse("steps", "*" if steps is None else str(steps), "every:"))

    def concerns(self, rank: int) -> bool:
        """Whether `rank` is late at some step, as far as `rank` says."""
        return self._ranks.period > 0 or self._ranks.contains(rank)

    def ms_at(self, rank: int, step: int, size: int) -> float:
        """The delay of `rank` at `step` among `size` ranks, in milliseconds; 0.0 when it is on time."""
        period = self._ranks.period
        is_named = rank == (step // period) % size if period else self._ranks.contains(rank)
        if not is_named or not (step % self._steps.period == 0 if self._steps.period else self._steps.contains(step)):
            return 0.0
        draw = random.Random(f"{self.seed}/{rank}/{step}")
        if draw.random() >= self.p:
            return 0.0
        if self.distribution == "exponential":
            return draw.expovariate(1.0) * self.ms
        if self.distribution == "lognormal":  # mean of exp(N(mu, sigma)) is exp(mu + sigma^2 / 2)
            return draw.lognormvariate(-(LOGNORMAL_SIGMA**2) / 2, LOGNORMAL_SIGMA) * self.ms
        if self.distribution == "pareto":  # mean of a Pareto variable with minimum 1 is alpha / (alpha - 1)
            return draw.paretovariate(PARETO_ALPHA) * (PARETO_ALPHA - 1) / PARETO_ALPHA * self.ms
        return float(self.ms)


@dataclass(frozen=True)
class Injection:
    """The delays that are in force in this process; they add up."""

    delays: tuple[Delay, ...] = ()

    def delay_ms(self, rank: int, step: int, size: int) -> float:
        """The delay of `rank` at `step`, in milliseconds. Pure."""
        return math.fsum(delay.ms_at(rank, step, size) for delay in self.delays)

    def without_effect(self, size: int) -> list[Delay]:
        """The delays that concern none of `size` ranks."""
        return [delay for delay in self.delays if not any(delay.concerns(rank) for rank in range(size))]

    def sleep(self, rank: int, step: int, size: int) -> None:
        """Sleeps for the delay of `rank` at `step`."""
        delay = self.delay_ms(rank, step, size)
        if delay > 0:
            time.sleep(delay / 1000)


def parse(text: str) -> tuple[Delay, ...]:
    """Reads specifications in the form of HVD_BACKUP_DELAY. The i-th has seed i unless it says otherwise.

    Raises:
        ConfigError: with the grammar, when the text does not follow it.
    """
    return tuple(_parse_one(spec, index) for index, spec in enumerate(text.split(";")) if spec.strip())


def inject(*delays: Delay) -> None:
    """Puts `delays` in force in this process, in place of those that were. Call it on every rank alike."""
    global _injected
    _injected = Injection(tuple(delays))


def clear() -> None:
    """Nobody is delayed any more."""
    inject()


def injected() -> Injection:
    """What is in force: from `inject`, or from HVD_BACKUP_DELAY as read by init()."""
    return _injected


def delay_ms(rank: int, step: int, size: int) -> float:
    """The delay in force for `rank` at `step` among `size` ranks, in milliseconds."""
    return _injected.delay_ms(rank, step, size)


def sleep(step: int) -> None:
    """Sleeps for this rank's delay at `step`: for loops without one of our optimizers. Needs init()."""
    from hvd_backup import context  # here, because context reads the specifications with this module

    place = context.current()
    _injected.sleep(place.rank, step, place.size)


_injected = Injection()


@dataclass(frozen=True)
class _Numbers:
    """A set of ranks or steps: inclusive ranges, or a period ("rotate:K", "every:K") when that is not 0."""

    ranges: tuple[tuple[int, float], ...] = ()
    period: int = 0

    def contains(self, number: int) -> bool:
        return any(low <= number <= high for low, high in self.ranges)

    @classmethod
    def parse(cls, key: str, text: str, prefix: str) -> _Numbers:
        text = text.strip()
        try:
            if text == "*":
                return cls(ranges=((0, math.inf),))
            if text.startswith(prefix):
                period = int(text.removeprefix(prefix))
                if period < 1:
                    raise ValueError
                return cls(period=period)
            ranges = []
            for piece in text.split(","):
                low, dash, high = piece.partition("-")
                ranges.append((int(low), int(high if dash else low)))
            if any(high < low for low, high in ranges):
                raise ValueError
        except ValueError:
            raise _bad(key, text, f'"3", "1-2", "0,2", "*" or "{prefix}K" with K >= 1') from None
        return cls(ranges=tuple(ranges))


def _parse_one(spec: str, index: int) -> Delay:
    values: dict[str, str] = {}
    key = ""
    for piece in spec.split(","):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if equals and name in _KEYS and name not in values:
            key, values[name] = name, value
        elif not equals and key in ("rank", "steps"):  # "steps=10,30": the comma belongs to the list
            values[key] += "," + name
        else:
            what = "is not key=value" if not equals else "is given twice" if name in values else "has an unknown key"
            raise ConfigError(f"delay {spec.strip()!r}: {piece.strip()!r} {what}; expected {GRAMMAR}")
    missing = [name for name in ("rank", "ms") if name not in values]
    if missing:
        raise ConfigError(f"delay {spec.strip()!r}: {' and '.join(missing)} missing; expected {GRAMMAR}")
    return Delay(
        rank=values["rank"],
        ms=_number("ms", values["ms"]),
        p=_number("p", values.get("p", "1")),
        steps=values.get("steps"),
        distribution=values.get("distribution", "constant"),
        seed=int(_number("seed", values.get("seed", str(index)))),
    )


def _number(key: str, text: str) -> float:
    try:
        return int(text) if key == "seed" else float(text)
    except ValueError:
        raise _bad(key, text, "an integer" if key == "seed" else "a number") from None


def _bad(key: str, given: object, expected: str) -> ConfigError:
    return ConfigError(f"delay: {key}={given!r}, expected {expected}; the grammar is {GRAMMAR}")
