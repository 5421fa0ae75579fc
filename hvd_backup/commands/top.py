"""A running job as it goes: reads its trace and shows ranks, lateness, b and updates per second, until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from hvd_backup import arrivals, stragglers
from hvd_backup.commands import count
from hvd_backup.errors import UsageError
from hvd_backup.stragglers import StragglerReport
from hvd_backup.trace import ChannelRecording, Reader

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `hvd-backup top`."""
    parser.add_argument("trace", help="file that the running job writes: HVD_BACKUP_TRACE, on rank 0's machine")
    parser.add_argument("--channel", help="which optimizer, as optimizer.0 (default: the one with the most updates)")
    parser.add_argument("--last", type=count, default=100, metavar="K", help="of the newest K updates (default 100)")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="show it once, and end")


def run(args: argparse.Namespace) -> int:
    """Shows the job until it is interrupted; returns the exit status."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        print("hvd-backup top needs rich: pip install 'hvd_backup[report]'", file=sys.stderr)
        return 1
    reader = Reader(args.trace)
    try:
        if args.once:
            Console().print(_look(reader, args))
            return 0
        with Live(_look(reader, args), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(args.every)
                live.update(_look(reader, args), refresh=True)
    except KeyboardInterrupt:
        return 0
    except (UsageError, OSError) as error:
        print(f"hvd-backup top: {error}", file=sys.stderr)
        return 1


def _look(reader: Reader, args: argparse.Namespace) -> Table | str:
    reader.poll()
    recording = reader.recording
    if recording is None or not any(channel.kind == "training" for channel in recording.channels.values()):
        return f"{args.trace}: no training yet"
    channel = recording.channel(args.channel)
    forget(channel, args.last)
    times = arrivals.of(channel, recording.size, args.last)
    report = stragglers.of_arrivals(times, channel.name)
    if not report.updates:
        return f"{args.trace}: {channel.name} is open, no updates yet"
    now = time.time() - recording.began_unix_s
    idle = max(0.0, now - float(times.opened[-1] + times.decided[-1]))
    return show(report, idle)


def show(report: StragglerReport, idle_s: float) -> Table:
    """The table. idle_s: seconds since the last decision."""
    from rich import box
    from rich.table import Table

    rate = (report.updates - 1) / report.seconds if report.seconds > 0 else 0.0
    state = f"last update {idle_s:.0f} s ago" if idle_s > max(5.0, 20 * report.step_s) else f"{rate:.1f} updates/s"
    newest = report.first_step + report.updates - 1
    table = Table(
        title=f"{report.channel} · update {newest} · {state} · b = {report.size - report.required} (N = "
        f"{report.required} of {report.size}) · {report.waited:.0%} of the time waiting",
        caption=f"the newest {report.updates} updates; lateness in ms after the middle rank",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for name in ("rank", "", "late", "p50", "p99", "in updates", "dropped"):
        table.add_column(name, justify="left" if name == "" else "right")
    colours = {"on time": "green", "slow at times": "yellow", "always slow": "red"}
    for rank, row in zip(report.ranks, report.rows(), strict=True):
        bar = "█" * round(10 * rank.late) + "·" * (10 - round(10 * rank.late))
        cells = [row[0], f"{bar} {rank.verdict}", row[2], row[3], row[5], row[9], row[11]]
        table.add_row(*cells, style=colours.get(rank.verdict, "magenta"))
    return table


def forget(channel: ChannelRecording, last: int) -> None:
    """Drops the lines of old steps, so that watching a long run needs no more memory than a short one."""
    newest = max((line["step"] for line in channel.lines), default=0)
    if len(channel.lines) > 40 * last:
        channel.lines = [line for line in channel.lines if line["step"] >= newest - 2 * last or line["event"] == "lost"]
