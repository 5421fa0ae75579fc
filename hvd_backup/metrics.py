"""Scalars that travel with the updates: optimizer.metrics(loss=...) on each rank, the mean on every rank.

They form one small bucket of float64 (value, 1) pairs, (0, 0) where a rank has no number; dividing the two means gives
the mean over those that had one. The names are fixed when the channel opens. What it is not: a log or a history.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

from hvd_backup.errors import UsageError

__all__ = ["Metrics"]


class Metrics:
    """This rank's values for the next update, and room for the result."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._names: tuple[str, ...] | None = None
        self._contribution = array("d")
        self._result = array("d")

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the bucket: sorted."""
        return tuple(sorted(self._values)) if self._names is None else self._names

    @property
    def elements(self) -> int:
        """Length of the bucket: two for each metric."""
        return len(self._contribution)

    def freeze(self) -> None:
        """The channel opens: from now on the names are fixed."""
        self._names = self.names
        self._contribution = array("d", bytes(16 * len(self._names)))
        self._result = array("d", bytes(16 * len(self._names)))

    def thaw(self) -> None:
        """The channel is closed: until the next one opens there may be more names."""
        if self._names is not None:
            self._values = {**dict.fromkeys(self._names, math.nan), **self._values}
        self._names = None

    def give(self, scalars: dict[str, Any]) -> None:
        """Sets values for the next update. NaN, None: this rank has no number.

        Raises:
            UsageError: a name that was not there when the channel opened, or a value that is no number.
        """
        if self._names is not None and (unknown := sorted(set(scalars) - set(self._names))):
            known = ", ".join(self._names) or "none"
            raise UsageError(
                f"metrics({', '.join(unknown)}=...): the names are fixed at the first step(), and were: {known}. "
                'Give all names before it, on every rank (float("nan") for those that have no value yet)'
            )
        for name, value in scalars.items():
            try:
                number = value.item() if hasattr(value, "item") else value
                self._values[name] = math.nan if number is None else float(number)
            except (TypeError, ValueError, RuntimeError):
                told = f"metrics({name}={value!r}): expected a number, or a tensor with one element"
                raise UsageError(told) from None

    def pack(self) -> tuple[int, int]:
        """Moves the values into the bucket and forgets them; returns the addresses (contribution, result)."""
        for index, name in enumerate(self.names):
            value = self._values.pop(name, math.nan)
            given = not math.isnan(value)
            self._contribution[2 * index] = value if given else 0.0
            self._contribution[2 * index + 1] = 1.0 if given else 0.0
        return self.contribution_address, self.result_address

    @property
    def contribution_address(self) -> int:
        """Where the bucket is made."""
        return self._contribution.buffer_info()[0]

    @property
    def result_address(self) -> int:
        """Where the bucket's result is to be written."""
        return self._result.buffer_info()[0]

    def means(self, has_result: bool = True) -> dict[str, float]:
        """The means, from the bucket's result; NaN when it has none."""
        if not has_result:
            return dict.fromkeys(self.names, math.nan)
        sums, counts = self._result[0::2], self._result[1::2]
        return {name: s / c if c > 0 else math.nan for name, s, c in zip(self.names, sums, counts, strict=True)}
