"""Misuses by name: what is done wrong, what one gets, and the code that does it. tests/misuse_*_cases.py register
them, tests/test_misuse.py runs them and compares, and docs/misuse.md is made of the same list:

    python -m tests.misuse > docs/misuse.md

A case is a function that runs on every rank, in a program of its own between init() and shutdown(). It does what is
right first, and the wrong thing within `with scene.misuse():`. There an exception is caught; weights that are given to
the scene must be the same before and after, bit for bit, and the same on all ranks.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from hvd_backup import context

COMMAND = "python -m tests.misuse > docs/misuse.md"


@dataclass(frozen=True)
class Gets:
    """What a rank gets.

    Attributes:
        kind: the class name of an exception or a warning; empty: neither, the call works, as `told` says.
        told: literally a part of the message; "…" stands for anything.
    """

    kind: str
    told: str

    def fits(self, kind: str, message: str) -> bool:
        parts = [re.escape(part) for part in self.told.split("…")]
        return kind == self.kind and (not kind or re.search(".*?".join(parts), message, re.DOTALL) is not None)

    def __str__(self) -> str:
        return f"`{self.kind}`: {self.told}" if self.kind else self.told


@dataclass(frozen=True)
class Misuse:
    """One row of the table.

    Attributes:
        part: the heading that it belongs under.
        wrong: what is done wrong, in Markdown.
        gets: on the rank(s) that do it; others: on the other ranks, if they get something else.
        on: those ranks; None: all.
        run: the case.
        trains: updates are made within the misuse, so weights change, but alike on all ranks.
    """

    part: str
    wrong: str
    gets: Gets
    run: Callable[[Any], None]
    on: tuple[int, ...] | None = None
    others: Gets | None = None
    trains: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    def expected(self, rank: int) -> Gets:
        if self.on is None or rank in self.on:
            return self.gets
        assert self.others is not None, f"{self.name}: what do the other ranks get?"
        return self.others


@dataclass
class Seen:
    """What a rank got."""

    kind: str = ""
    message: str = ""
    before: str = ""
    after: str = ""


MISUSES: dict[str, list[Misuse]] = {}


def table_of(group: str) -> Callable[..., Callable[[Callable[[Any], None]], Callable[[Any], None]]]:
    """The decorator that registers the cases of one file (those that run in one launch)."""

    def misuse(
        part: str, wrong: str, kind: str, told: str, **more: Any
    ) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
            MISUSES.setdefault(group, []).append(Misuse(part, wrong, Gets(kind, told), run, **more))
            return run

        return register

    return misuse


class Scene:
    """One case on one rank. `weights`: gives the weights that must not change silently, as bytes."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.weights: Callable[[], bytes] = lambda: b""

    @contextmanager
    def misuse(self) -> Iterator[None]:
        """Within it the wrong thing is done; whatever it raises, or warns of, is what one gets."""
        self.seen.before = self._digest()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                self.seen.kind, self.seen.message = type(error).__name__, str(error)
            except SystemExit as error:
                self.seen.kind, self.seen.message = "SystemExit", str(error.code)
        if not self.seen.kind and caught:
            self.seen.kind = caught[-1].category.__name__
            self.seen.message = str(caught[-1].message)
        self.seen.after = self._digest()

    def _digest(self) -> str:
        weights = self.weights()
        return hashlib.sha256(weights).hexdigest()[:12] if weights else ""


@contextmanager
def program(begin: Callable[[], object]) -> Iterator[None]:
    """A program of its own, which begins with `begin`: what it has started is ended, its variables are taken back."""
    try:
        begin()
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("HVD_BACKUP_") and name != "HVD_BACKUP_HOROVOD"]:
            del os.environ[name]
        context.shutdown()


def run_all(group: str, around: Callable[[], AbstractContextManager[None]]) -> dict[str, Seen]:
    """Runs the cases of a group, one after the other, on this rank.

    Args:
        around: makes the context manager within which each case runs.
    """
    seen = {}
    for each in MISUSES[group]:
        print(f"--- {each.name}", flush=True)  # so that a hang has a name
        scene = Scene()
        with around():
            each.run(scene)
        seen[each.name] = scene.seen
    return seen


def complaints(each: Misuse, by_rank: list[Seen]) -> list[str]:
    """What is not as the table says."""
    told = []
    for rank, seen in enumerate(by_rank):
        wanted = each.expected(rank)
        if not wanted.fits(seen.kind, seen.message):
            told.append(f"rank {rank} got {seen.kind or 'nothing'}: {seen.message}\n  expected {wanted}")
        if seen.before != seen.after and not each.trains:
            told.append(f"rank {rank}: the weights were changed silently")
    if len({seen.after for seen in by_rank if seen.after}) > 1:
        told.append(f"the ranks have different weights: {[seen.after for seen in by_rank]}")
    return told


def page() -> str:
    """docs/misuse.md."""
    from tests import all_misuses  # noqa: F401  (registers them)

    rows: dict[str, list[Misuse]] = {}
    for each in (each for group in MISUSES.values() for each in group):
        rows.setdefault(each.part, []).append(each)
    lines = [
        "# What is done wrong, and what one gets",
        "",
        f"{sum(map(len, rows.values()))} misuses, each of them a test: none hangs, none takes the interpreter down, "
        "none changes weights silently.",
        "An ellipsis stands for what depends on the case. This page is made of the tests' own list:",
        f"`{COMMAND}`.",
    ]
    for part, misuses in rows.items():
        lines += ["", f"## {part}", "", "| what is done wrong | what one gets |", "| --- | --- |"]
        for each in misuses:
            gets = str(each.gets)
            if each.others is not None:
                assert each.on is not None
                who = "rank " + " and ".join(map(str, each.on))
                gets = f"{who}: {gets}<br>the others: {each.others}"
            lines.append(f"| {_cell(each.wrong)} | {_cell(gets)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    from tests import misuse

    sys.stdout.write(misuse.page())
