"""How the value of each option is read and checked; config.py says which option uses which.

Every function here takes a value from Python, or text from the environment, and returns it in its normal form (which it
accepts again, unchanged). A value that cannot be used raises ValueError with what was expected; the caller adds the
option's name and what was given.
"""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

from hvd_backup import faults
from hvd_backup.errors import ConfigError

POLICIES = ("synchronous", "backup", "auto")
PLANNED_POLICIES = (
    "asynchronous",
    "deadline",
    "delayed",
    "eager-majority",
    "eager-solo",
    "softsync",
    "staleness-aware",
)

Check = Callable[[Any], Any]


MOST = (1 << 31) - 1  # what the core counts with


def integer(low: int, or_else: str = "", most: int | None = None) -> Check:
    """An integer of at least `low`, and at most `most`; `or_else` names what else the caller would take."""

    def check(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool) or number < low:
            raise ValueError(f"expected an integer >= {low}{or_else}")
        if most is not None and number > most:
            raise ValueError(f"expected an integer from {low} to {most}{or_else}")
        return number

    return check


def one_of(*names: str) -> Check:
    """One of some names, in any case."""

    def check(value: Any) -> str:
        if isinstance(value, str) and value.lower() in names:
            return value.lower()
        raise ValueError("expected " + " or ".join(f'"{name}"' for name in names))

    return check


def backup_workers(value: Any) -> int | float | str:
    """A count (integer >= 0), a fraction of the ranks (0 < f < 1), or "auto"."""
    expected = 'expected an integer >= 0, a fraction of the ranks between 0 and 1 (0.25: every fourth rank), or "auto"'
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    try:
        return integer(0)(value)  # type: ignore[no-any-return]
    except ValueError:
        fraction = _real(value)
    if fraction is None or not 0 < fraction < 1:  # false for NaN, too
        raise ValueError(expected)
    return fraction


def seconds(value: Any) -> float:
    """A duration in seconds."""
    number = _real(value)
    if number is None or not 0 <= number < 1e9:
        raise ValueError("expected a number of seconds >= 0, below 1e9")
    return number


def byte_count(value: Any) -> int:
    """A number of bytes, "25MiB" included."""
    factor, number = 1, value
    if isinstance(value, str):
        for suffix, power in (("kib", 10), ("mib", 20), ("gib", 30)):
            if value.strip().lower().endswith(suffix):
                factor, number = 1 << power, value.strip()[: -len(suffix)]
    try:
        return factor * integer(0)(number)  # type: ignore[no-any-return]
    except ValueError:
        raise ValueError('expected a number of bytes >= 0, such as 26214400 or "25MiB" (KiB, MiB, GiB)') from None


def max_staleness(value: Any) -> int:
    """0, until gradients of older weights can be used."""
    if integer(0)(value) != 0:
        raise ValueError("expected 0: gradients of older weights cannot be used yet, only dropped or carried")
    return 0


def max_lag(value: Any) -> int | str:
    """A number of updates, or "auto"."""
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    return integer(1, or_else=', or "auto"', most=MOST)(value)  # type: ignore[no-any-return]


def on_max_lag(value: Any) -> str:
    """ "resync" or "wait"."""
    return one_of("resync", "wait")(value)  # type: ignore[no-any-return]


def policy(value: Any) -> str | None:
    """The name of a policy, or None: whatever the other options say."""
    if value is None:
        return None
    name = value.lower() if isinstance(value, str) else value
    if name in POLICIES:
        return str(name)
    what = "is not there yet" if name in PLANNED_POLICIES else f"is unknown{did_you_mean(name, POLICIES)}"
    raise ValueError(f"this policy {what}; those that exist: {', '.join(POLICIES)}")


def path(value: Any) -> str:
    """A file name as text."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise ValueError("expected a path") from None


def delay(value: Any) -> str:
    """Delay specifications, as text."""
    if not isinstance(value, str):
        raise ValueError(f"expected text: {faults.GRAMMAR}")
    try:
        faults.parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


def did_you_mean(given: object, known: Iterable[str], prefix: str = "") -> str:
    """A hint to append to an error text: the known name that is closest, or nothing when none is close."""
    close = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.6)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _real(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
