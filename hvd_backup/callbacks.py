"""The run's stragglers in TensorBoard and Prometheus, through their own libraries (optional).

    optimizer.on_update(TensorBoard("runs/1"))     # on every rank; rank 0 writes
    optimizer.on_update(Prometheus(port=9200))     # rank 0 answers http://<its machine>:9200/metrics

Both are functions of an update, for `optimizer.on_update`. What an update says they give at once; what needs the
straggler report (rank 0 has it) every `every` updates, so that it costs nothing that can be measured.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from typing import TYPE_CHECKING, Any

from hvd_backup import context
from hvd_backup.applied import AppliedUpdate
from hvd_backup.errors import UsageError
from hvd_backup.stragglers import StragglerReport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Prometheus", "TensorBoard"]


class TensorBoard:
    """Writes scalars: hvd_backup/contributors, required, samples, seconds_per_update; by rank: late, contributed.

    Args:
        log_dir: folder of the event files; or a writer that is there already, TensorBoard's or torch's.
        every: updates between two straggler reports.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | Any, every: int = 100) -> None:
        self._every = _positive(every)
        self._is_writing = context.current().rank == 0
        self._before: float | None = None
        if self._is_writing:
            given: Any = log_dir
            self._writer: Any = given if hasattr(given, "add_scalar") else _summary_writer(os.fspath(given))
            atexit.register(self._writer.flush)

    def __call__(self, update: AppliedUpdate) -> None:
        """For on_update."""
        if not self._is_writing:
            return
        now = time.monotonic()
        self._write("contributors", len(update.contributors), update.step)
        self._write("required", update.required, update.step)
        self._write("samples", update.samples, update.step)
        if self._before is not None:
            self._write("seconds_per_update", now - self._before, update.step)
        self._before = now
        if update.step % self._every == self._every - 1:
            for rank in _report(self._every).ranks:
                self._write(f"late/rank_{rank.rank}", rank.late, update.step)
                self._write(f"contributed/rank_{rank.rank}", rank.contributed, update.step)
                self._write(f"lateness_p90_s/rank_{rank.rank}", rank.lateness_s[1], update.step)
            self._writer.flush()

    def _write(self, name: str, value: float, step: int) -> None:
        if not math.isnan(value):
            self._writer.add_scalar(f"hvd_backup/{name}", value, step)


class Prometheus:
    """Offers hvd_backup_* to a Prometheus server.

    updates_total, contributors, required, samples_total; and labelled with `rank`: late_ratio, contributed_ratio,
    lateness_p90_seconds, dropped (over the updates since the last report).

    Args:
        port: serves /metrics there, on rank 0; None: only registers, for a program that serves its own.
        every: updates between two straggler reports.
        registry: a prometheus_client registry; None: the library's own.
    """

    def __init__(self, port: int | None = None, every: int = 100, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise UsageError("Prometheus metrics need its client: pip install 'hvd_backup[prometheus]'") from None
        self._every = _positive(every)
        self._is_writing = context.current().rank == 0
        if not self._is_writing:
            return
        where = client.REGISTRY if registry is None else registry
        self._updates = client.Counter("hvd_backup_updates", "Updates applied", registry=where)
        self._samples = client.Counter("hvd_backup_samples", "Samples in these updates", registry=where)
        self._contributors = client.Gauge("hvd_backup_contributors", "Ranks in the newest update", registry=where)
        self._required = client.Gauge("hvd_backup_required", "N: ranks that updates wait for", registry=where)

        def by_rank(name: str, meaning: str) -> client.Gauge:
            return client.Gauge(f"hvd_backup_{name}", meaning, ["rank"], registry=where)

        self._late = by_rank("late_ratio", "Share of steps at which the rank was late")
        self._contributed = by_rank("contributed_ratio", "Share of updates that hold the rank's gradient")
        self._lateness = by_rank("lateness_p90_seconds", "Seconds after the middle rank, 90th percentile")
        self._dropped = by_rank("dropped", "Gradients of the rank that were not used")
        if port is not None:
            client.start_http_server(port, registry=where)

    def __call__(self, update: AppliedUpdate) -> None:
        """For on_update."""
        if not self._is_writing:
            return
        self._updates.inc()
        self._samples.inc(update.samples)
        self._contributors.set(len(update.contributors))
        self._required.set(update.required)
        if update.step % self._every != self._every - 1:
            return
        for rank in _report(self._every).ranks:
            label = str(rank.rank)
            self._late.labels(label).set(rank.late)
            self._contributed.labels(label).set(rank.contributed)
            self._lateness.labels(label).set(rank.lateness_s[1])
            self._dropped.labels(label).set(rank.dropped)


def _report(last: int) -> StragglerReport:
    return context.straggler_report(last=last)


def _summary_writer(folder: str) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise UsageError("TensorBoard files need its library: pip install 'hvd_backup[tensorboard]'") from None
    return Writer(folder)


def _positive(every: int) -> int:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UsageError(f"every={every!r}: expected a number of updates >= 1")
    return every
