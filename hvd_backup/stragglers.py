"""Who is late, how often, by how much, and whose data is learned from less: made from a recording, live or from a file.

    print(hvd.straggler_report())                                  # on rank 0, while the run goes on
    print(stragglers.report(trace.read("trace.jsonl")))            # afterwards

A pure function of the recording. Pictures are in pictures.py; what to do about it (choosing b) is in planning.py.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hvd_backup import arrivals
from hvd_backup.arrivals import Arrivals
from hvd_backup.trace import Recording

__all__ = ["RankReport", "StragglerReport", "report"]

# Later than the middle rank by more than this share of a median step: less is the scatter of equals.
LATE = 0.25
ALWAYS = 0.5  # late in more than this share of the steps: slow always; less: slow at times
SOMETIMES = 0.05
STARVED = 0.5  # of a rank's due


@dataclass(frozen=True)
class RankReport:
    """One rank, over the steps of the report.

    Attributes:
        rank: its number.
        late: share of the steps in which it was late, as long as its process lived: it arrived more than 25 % of a
            median step after the middle rank, or did not compute the step at all because it was still busy with an
            older one. 0..1.
        lateness_s: seconds after the middle rank, at the 50th, 90th and 99th percentile and at most, over the steps
            that it computed.
        took_s: median seconds that it computes a step.
        waited_s: mean seconds from its arrival to the decision, over its contributions: what waiting for others costs.
        contributed: share of the updates that hold its gradient. 0..1.
        data: its share of all samples that updates were made of, relative to its due (1/n): 1 is fair.
        dropped: gradients that were not used.
        catch_ups, catch_up_s: how often it was late and went on, and how many seconds that took in all.
        verdict: "on time", "slow at times" or "always slow"; "died at step k", for good.
        resyncs: how often it was so far behind that it has taken over the state of another rank.
        starved: its share of the updates is under half of its due.
    """

    rank: int
    late: float
    lateness_s: tuple[float, float, float, float]
    took_s: float
    waited_s: float
    contributed: float
    data: float
    dropped: int
    catch_ups: int
    catch_up_s: float
    verdict: str
    starved: bool
    resyncs: int = 0

    @property
    def died(self) -> bool:
        """Its process has died."""
        return self.verdict.startswith("died")


@dataclass(frozen=True)
class StragglerReport:
    """What `report` finds. str() is a table; notebooks show a nicer one.

    Attributes:
        channel: which optimizer.
        size: ranks; 0: nothing is known here (the record is kept on rank 0).
        updates: decided steps that it is made from.
        first_step: the first of them. Memory is bounded: while the run goes on, old steps are forgotten.
        required: N, of the newest step.
        step_s: median seconds per update.
        seconds: from the first to the last decision.
        waited: share of the contributors' time that went into waiting for the decision.
        ranks: by number.
    """

    channel: str = ""
    size: int = 0
    updates: int = 0
    first_step: int = 0
    required: int = 0
    step_s: float = math.nan
    seconds: float = 0.0
    waited: float = 0.0
    ranks: tuple[RankReport, ...] = field(default=())

    def summary(self) -> str:
        """One line."""
        if not self.updates:
            return "no updates yet" if self.size else "what is recorded is kept on rank 0: ask there"
        slow = [r for r in self.slow if not r.died]
        late = [f"rank {r.rank} is {r.verdict} (late at {r.late:.0%} of them)" for r in slow[:3]]
        more = len(slow) - len(late)
        newest = " (the newest)" if self.first_step > 0 else ""
        starved = ", ".join(str(r.rank) for r in self.ranks if r.starved)
        dropped = sum(rank.dropped for rank in self.ranks)
        return "; ".join(
            [
                f"{self.updates} updates{newest}, {_ms(self.step_s)} ms each (median), "
                f"N = {self.required} of {self.size}",
                *(late or ["nobody is slow"]),
                *([f"and {more} more ranks"] if more else []),
                *(f"rank {r.rank} {r.verdict}" for r in self.ranks if r.died),
                f"{self.waited:.0%} of the time waiting for others",
                *([f"{dropped} gradients dropped"] if dropped else []),
                *([f"warning: the data of rank {starved} is hardly learned from"] if starved else []),
            ]
        )

    @property
    def slow(self) -> list[RankReport]:
        """Those that are not on time, the worst first."""
        return sorted((r for r in self.ranks if r.verdict != "on time"), key=lambda r: -r.late)

    @property
    def warnings(self) -> list[str]:
        """Whose data is learned from less, and what to do."""
        return [
            f"rank {r.rank} contributes to {r.contributed:.0%} of the updates, less than half of its due, so its data "
            "is hardly learned from. max_misses=k waits for a rank left out k times in a row; late='carry' keeps what "
            "came too late"
            for r in self.ranks
            if r.starved
        ] + [
            f"rank {r.rank} was further behind than the journal reaches, and has taken over the weights of another "
            f"rank{f', {r.resyncs} times' if r.resyncs > 1 else ''}: what it had missed it has not applied. A larger "
            "max_lag keeps more updates for it"
            for r in self.ranks
            if r.resyncs
        ]

    def __str__(self) -> str:
        if not self.updates:
            return f"straggler report: {self.summary()}"
        cells = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title(), "", lines[0], "-" * len(lines[0]), *lines[1:], *self.footnotes()])

    def _repr_html_(self) -> str:
        """For notebooks, and for the page of `hvd-backup report`."""
        if not self.updates:
            return f"<p>{html.escape(str(self))}</p>"

        def row(tag: str, texts: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        body = "".join(row("td", texts) for texts in self.rows())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.footnotes() if note)
        return f"<p>{html.escape(self.title())}</p><table>{row('th', COLUMNS)}{body}</table>{notes}"

    def title(self) -> str:
        """The line above the table."""
        which = f"updates {self.first_step} to {self.first_step + self.updates - 1} of {self.channel}"
        return f"{which}: N = {self.required} of {self.size} ranks, {_ms(self.step_s)} ms per update (median)"

    def rows(self) -> list[list[str]]:
        """The table's cells, under COLUMNS."""
        return [
            [
                str(r.rank), r.verdict, f"{r.late:.0%}", *(_ms(value) for value in r.lateness_s), _ms(r.took_s),
                _ms(r.waited_s), f"{r.contributed:.0%}", f"{r.data:.2f}", str(r.dropped), f"{r.catch_up_s:.2f}",
            ]
            for r in self.ranks
        ]  # fmt: skip

    def footnotes(self) -> list[str]:
        """What stands below the table: warnings, and what the columns mean."""
        return ["", *(f"warning: {text}" for text in self.warnings), *([""] if self.warnings else []), LEGEND]


COLUMNS = [
    "rank", "verdict", "late", "p50 [ms]", "p90 [ms]", "p99 [ms]", "max [ms]", "computes [ms]", "waits [ms]",
    "in updates", "data", "dropped", "catch-up [s]",
]  # fmt: skip

LEGEND = (
    "late: share of steps more than 25 % of a step after the middle rank, or missed; p50..max: how long after it. "
    "computes: median.\nwaits: mean, for the decision. in updates: share that holds its gradient. data: samples "
    "learned from, 1 is fair. catch-up: in all."
)


def report(recording: Recording, channel: str | None = None, last: int | None = None) -> StragglerReport:
    """The report of a recording.

    Args:
        channel: which; None: the training channel with the most updates.
        last: only the newest so many updates.

    Raises:
        UsageError: there is no such channel.
    """
    if channel is None and not any(c.kind == "training" for c in recording.channels.values()):
        return StragglerReport(size=recording.size)
    found = recording.channel(channel)
    return of_arrivals(arrivals.of(found, recording.size, last), found.name)


def of_arrivals(times: Arrivals, name: str) -> StragglerReport:
    """The report of times that are there already."""
    count = len(times.steps)
    if count == 0:
        return StragglerReport(channel=name, size=times.size)
    seconds = times.step_seconds()
    step_s = float(np.median(seconds)) if len(seconds) else float(np.median(times.decided))
    waits = times.decided[:, None] - np.where(times.contributed, times.arrived, np.nan)
    # From decision to decision: the opening may come after the arrival of a rank that had the update before the others.
    known = ~times.first[1:]
    waited = np.nansum(np.maximum(waits, 0)[1:][known])
    spent = np.sum(times.contributed[1:], axis=1)[known] @ seconds
    ranks = tuple(_rank(times, rank, waits[:, rank], step_s) for rank in range(times.size))
    at = times.opened + times.decided
    return StragglerReport(
        channel=name,
        size=times.size,
        updates=count,
        first_step=int(times.steps[0]),
        required=int(times.required[-1]),
        step_s=step_s,
        seconds=float(at[-1] - at[0]),
        waited=float(waited / spent) if spent > 0 else 0.0,
        ranks=ranks,
    )


def _rank(times: Arrivals, rank: int, waits: arrivals.Floats, step_s: float) -> RankReport:
    lateness = times.lateness[:, rank]
    computed = lateness[~np.isnan(lateness) & ~times.first]
    missed = np.isnan(times.arrived[:, rank])
    died = times.died.get(rank)
    alive = times.steps < (math.inf if died is None else died)
    late = float(np.mean(((lateness > LATE * step_s) | missed)[alive])) if alive.any() else 0.0
    contributed = float(np.mean(times.contributed[:, rank]))
    due = float(np.mean(times.contributed))
    catch_ups = [found for found in times.catch_ups if found.rank == rank and found.missed >= times.steps[0]]
    quantiles = np.quantile(computed, [0.5, 0.9, 0.99, 1.0]) if len(computed) else np.full(4, np.nan)
    total = float(np.sum(times.weights))
    return RankReport(
        rank=rank,
        late=late,
        lateness_s=(float(quantiles[0]), float(quantiles[1]), float(quantiles[2]), float(quantiles[3])),
        took_s=_median(times.took[:, rank]),
        waited_s=float(np.nanmean(waits)) if np.any(~np.isnan(waits)) else math.nan,
        contributed=contributed,
        data=float(np.sum(times.weights[:, rank])) * times.size / total if total > 0 else math.nan,
        dropped=int(np.sum(times.dropped[:, rank])),
        catch_ups=len(catch_ups),
        catch_up_s=sum(found.seconds for found in catch_ups),
        verdict=_verdict(late, died),
        starved=died is None and contributed < STARVED * due,
        resyncs=sum(r == rank and step >= times.steps[0] for r, step in times.resyncs),
    )


def _verdict(late: float, died: int | None) -> str:
    if died is not None:
        return f"died at step {died}"
    return "always slow" if late > ALWAYS else "slow at times" if late > SOMETIMES else "on time"


def _median(values: arrivals.Floats) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def _ms(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    ms = seconds * 1e3
    return f"{ms:.0f}" if abs(ms) >= 100 else f"{ms:.1f}"
