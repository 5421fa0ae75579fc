"""The rules of one channel, resolved: who is waited for, for how long, and what becomes of a gradient that is late.

A pure function of the options and the number of ranks. What it is not: the rules at work (csrc/control), which receive
these numbers when a channel opens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hvd_backup.config import Config
from hvd_backup.errors import ConfigError

__all__ = ["Policy", "journal_depth"]

MIN_AUTO_LAG = 4  # a rank that is a few steps behind must never stop the others, however large the model
MAX_AUTO_LAG = 1024  # a rank that is further behind has stopped rather than fallen back


@dataclass(frozen=True)
class Policy:
    """N = `required` of `size` ranks per update, and the rest of the rules.

    Attributes:
        size: number of ranks, n.
        backup_workers: b, 0 <= b < n. When `automatic`, the most that it may become.
        automatic: b is chosen while the run goes on.
        grace: seconds after the N-th arrival during which others still count.
        max_misses: a rank left out this many times in a row is waited for; 0: never.
        max_staleness: always 0 yet.
        late: "drop" or "carry".
        max_lag: updates kept for ranks that are behind, or "auto" (see `lag_bound`).
        on_max_lag: "resync": a rank beyond that takes over the state of another one; "wait": the others wait for it.
        scope: "step" or "bucket".
        arrive: "first" or "last".
        nonfinite: "pass" or "drop"; with "drop", arrive is "last".
        journal_bytes: what `max_lag="auto"` may use, on each rank.
    """

    size: int
    backup_workers: int
    automatic: bool = False
    grace: float = 0.0
    max_misses: int = 0
    max_staleness: int = 0
    late: str = "drop"
    max_lag: int | str = "auto"
    on_max_lag: str = "resync"
    scope: str = "step"
    arrive: str = "first"
    nonfinite: str = "pass"
    journal_bytes: int = 1 << 30

    @classmethod
    def resolve(cls, config: Config, size: int, **arguments: Any) -> Policy:
        """The policy of `config` among `size` ranks, with `arguments` (DistributedOptimizer's; None: not given).

        A fraction f of backup workers means floor(f * n): 0.25 is 1 of 4 to 7 ranks, and 0 of 3. (A product that
        misses a whole number by a rounding error counts as that number: 0.29 of 100 ranks is 29.)

        Raises:
            ConfigError: an unknown option, a value that cannot be used, b >= n, or options that contradict each other.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"size={size!r}: expected a number of ranks >= 1")
        options = config.override(**arguments)
        automatic = options.backup_workers == "auto" or options.policy == "auto"
        if options.policy == "auto" and options.backup_workers not in (0, "auto"):
            raise ConfigError(
                f'policy="auto" chooses the number of backup workers, but backup_workers={options.backup_workers}: '
                "give one of them"
            )
        if automatic:
            backup_workers = size - _least(options.min_contributors, size)
        else:
            backup_workers = _whole(options.backup_workers, size)
        if options.policy == "synchronous" and options.backup_workers != 0:
            raise ConfigError(
                f'policy="synchronous" waits for all ranks, but backup_workers={options.backup_workers}: '
                'give one of them, or policy="backup"'
            )
        if options.policy == "backup" and options.backup_workers == 0:
            raise ConfigError('policy="backup" needs backup_workers: how many ranks need not be waited for, at least 1')
        drops = options.nonfinite == "drop"
        if drops and arguments.get("arrive") is not None and options.arrive == "first":
            raise ConfigError(
                'nonfinite="drop" with arrive="first": whether a gradient is finite is known when its last bucket is '
                'ready, so a rank arrives with that: leave arrive out, or give arrive="last"'
            )
        return cls(
            size=size,
            backup_workers=backup_workers,
            automatic=automatic,
            grace=options.grace,
            max_misses=options.max_misses,
            max_staleness=options.max_staleness,
            late=options.late,
            max_lag=options.max_lag,
            on_max_lag=options.on_max_lag,
            scope=options.scope,
            arrive="last" if drops else options.arrive,
            nonfinite=options.nonfinite,
            journal_bytes=options.journal_bytes,
        )

    @property
    def required(self) -> int:
        """N: how many contributors an update waits for; when `automatic`, at least."""
        return self.size - self.backup_workers

    @property
    def may_leave_out(self) -> bool:
        """Whether a rank may have to apply an update that its gradient is not part of."""
        return self.backup_workers > 0 or self.nonfinite == "drop"

    @property
    def grace_us(self) -> int:
        """The grace time in whole microseconds."""
        return round(self.grace * 1e6)

    def lag_bound(self, update_bytes: int) -> int:
        """`max_lag` as a number, for updates of `update_bytes` bytes."""
        if isinstance(self.max_lag, int):
            return self.max_lag
        return journal_depth(update_bytes, self.size, self.journal_bytes)

    def description(self) -> str:
        """Lines that must be equal on all ranks, for the description of a channel."""
        return "\n".join(
            (
                f"backup_workers {'auto, up to ' if self.automatic else ''}{self.backup_workers} of {self.size} ranks",
                f"grace {self.grace} s",
                f"max_misses {self.max_misses}",
                f"max_staleness {self.max_staleness}",
                f"late {self.late}",
                f"max_lag {self.max_lag}" + (f" of {self.journal_bytes} bytes" if self.max_lag == "auto" else ""),
                f"on_max_lag {self.on_max_lag}",
                f"scope {self.scope}",
                f"arrive {self.arrive}",
                f"nonfinite {self.nonfinite}",
            )
        )


def journal_depth(update_bytes: int, size: int, journal_bytes: int) -> int:
    """How many updates of `update_bytes` bytes to keep within `journal_bytes` bytes on each rank: 4 to 1024.

    Each of the k contributors keeps its own shard of an update and a neighbour's, 2 M / k bytes (design, section 3,
    rule 5); the depth reckons with all `size` ranks contributing.
    """
    return max(MIN_AUTO_LAG, min(MAX_AUTO_LAG, journal_bytes // (2 * update_bytes // size + 1)))


def _least(min_contributors: int, size: int) -> int:
    if min_contributors > size:
        raise ConfigError(
            f"min_contributors={min_contributors}, but there are {size} ranks: at most {size}, or 0 for half"
        )
    return min_contributors or (size + 1) // 2


def _whole(backup_workers: int | float | str, size: int) -> int:
    assert not isinstance(backup_workers, str)  # "auto" is the caller's
    if isinstance(backup_workers, float):
        return min(math.floor(backup_workers * size + 1e-9), size - 1)
    if backup_workers >= size:
        ranks = "is 1 rank" if size == 1 else f"are {size} ranks"
        remedy = f"at most {size - 1}, more ranks (mpirun -np ...), or a fraction such as 0.25, which suits any number"
        raise ConfigError(f"backup_workers={backup_workers}, but there {ranks}, of which one must count: {remedy}")
    return backup_workers
