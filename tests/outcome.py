"""What became of the ranks of a test, and how that is told: data and text only, nothing runs here."""

import re
import textwrap
from dataclasses import dataclass
from typing import Any

SHOWN_CHARACTERS = 6000  # of each rank's output: the end, where the failure is


@dataclass(frozen=True)
class RankOutcome:
    """One rank's end.

    state: "returned", "raised", "died" (ended without a report: killed, or a crash), "hung", "hung at exit" (the body
        had returned), "stopped" (SIGSTOP, at the time limit), or "never started".
    value: what it returned. error: its traceback, if it raised. exception: the end of that, "ValueError: ...". output:
        all that it printed.
    """

    rank: int
    state: str
    value: Any
    error: str
    exception: str
    output: str

    def describe(self) -> str:
        """A headed block of text: state, error, output."""
        output = self.output
        if self.exception:  # the interpreter has printed it too, on its way out
            again = r"Traceback \(most recent call last\):\n( .*\n)+" + re.escape(self.exception)
            output = re.sub(again, "[the traceback above]\n", output)
        if len(output) > SHOWN_CHARACTERS:
            output = f"[{len(output) - SHOWN_CHARACTERS} characters left out]\n{output[-SHOWN_CHARACTERS:]}"
        blocks = [f"=== rank {self.rank}: {self.state}"]
        blocks += [textwrap.indent(text.rstrip(), f"  [{self.rank}] ") for text in (self.error, output) if text.strip()]
        return "\n".join(blocks)


@dataclass(frozen=True)
class Outcome:
    """The end of a job. exit_code: mpirun's; None when the watchdog ended it, and then `verdict` says why."""

    ranks: list[RankOutcome]
    exit_code: int | None
    verdict: str
    launcher_output: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Every rank has returned, and mpirun says so too."""
        return self.exit_code == 0 and all(outcome.state == "returned" for outcome in self.ranks)

    def values(self) -> list[Any]:
        """What the ranks returned, by rank. Raises AssertionError unless `ok`."""
        if not self.ok:
            raise AssertionError(self.describe())
        return [outcome.value for outcome in self.ranks]

    def describe(self) -> str:
        """A summary line by state, then the ranks that did not return, those that raised first, then mpirun."""
        names: dict[str, list[int]] = {}
        for outcome in self.ranks:
            names.setdefault(outcome.state, []).append(outcome.rank)
        summary = ", ".join(f"{state}: {', '.join(map(str, ranks))}" for state, ranks in names.items())
        lines = [f"ranks that {summary} (of {len(self.ranks)}, after {self.seconds:.1f} s, exit code {self.exit_code})"]
        if self.verdict:
            lines.append(self.verdict)
        told = [outcome for outcome in self.ranks if outcome.state != "returned"] or self.ranks
        lines += [outcome.describe() for outcome in sorted(told, key=lambda outcome: outcome.state != "raised")]
        if self.launcher_output.strip():
            lines += ["=== mpirun", textwrap.indent(self.launcher_output.strip()[-SHOWN_CHARACTERS:], "  ")]
        return "\n".join(lines)
