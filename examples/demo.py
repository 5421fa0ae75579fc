"""The demo (`make demo`): four ranks train the same CNN three times, and one of them is slow.

    python examples/demo.py [--ranks 4] [--delay-ms 200] [--picture FILE]

Nobody slow; one rank slow, plain synchronous; one rank slow, one backup worker. The training script is
pytorch_digits.py, unchanged: HVD_BACKUP_DELAY makes the rank slow. Prints one table and what it means, draws a picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from demo_picture import Curve, draw
from hvd_backup import launch

TRAIN = Path(__file__).with_name("pytorch_digits.py")
SEED = 1


@dataclass(frozen=True)
class Run:
    """One training: its name, whether the last rank is slow, and how many backup workers there are."""

    title: str
    slow: bool
    backup_workers: int


RUNS = (
    Run("nobody slow", slow=False, backup_workers=0),
    Run("one rank slow, plain synchronous", slow=True, backup_workers=0),
    Run("one rank slow, one backup worker", slow=True, backup_workers=1),
)


class JobError(RuntimeError):
    """A training job ended with an error or took too long; carries what it printed."""


def train(run: Run, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs one training with a running clock on the console; returns what it reports.

    Raises:
        JobError: with the job's output.
    """
    env = {"HVD_BACKUP_DELAY": f"rank={args.ranks - 1},ms={args.delay_ms:g}"} if run.slow else {}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "output").open("w+") as output:
        report = Path(folder, "report.json")
        options = ["--epochs", args.epochs, "--backup-workers", run.backup_workers, "--seed", SEED, "--json", report]
        job = launch.start(
            args.ranks,
            [sys.executable, str(TRAIN), *map(str, options)],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        began = time.monotonic()
        spinner = Spinner("dots")
        try:
            with Live(spinner, console=console, transient=True, refresh_per_second=8):
                while job.poll() is None and time.monotonic() - began < args.timeout_s:
                    spinner.update(text=f"{run.title}: {time.monotonic() - began:.0f} s")
                    time.sleep(0.1)
            late = job.poll() is None
        finally:
            launch.stop(job)
        if late or job.returncode != 0 or not report.exists():
            output.seek(0)
            how = f"still ran after {args.timeout_s:g} s" if late else f"ended with status {job.returncode}"
            raise JobError(f"the run {run.title!r} {how}. What it printed:\n\n{output.read()}")
        console.print(f"[green]done[/green]  {run.title}, {time.monotonic() - began:.1f} s with starting up")
        return dict(json.loads(report.read_text()))


def milliseconds(update_s: Sequence[float], q: float) -> float:
    """Percentile q of the time per update. The first, in which connections are made, does not count."""
    return float(np.percentile(update_s[1:], q)) * 1e3


def comparison(reports: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Four ranks train a CNN on handwritten digits", title_justify="left", title_style="bold")
    table.add_column("run")
    for column in (
        "seconds",
        "per update\np50 [ms]",
        "p99 [ms]",
        "updates",
        "test\naccuracy",
        "gradients dropped\nrank 0, 1, ...",
    ):
        table.add_column(column, justify="right")
    table.add_column("weights\nidentical")
    for run, report in zip(RUNS, reports, strict=True):
        table.add_row(
            run.title,
            f"{report['seconds']:.1f}",
            f"{milliseconds(report['update_seconds'], 50):.0f}",
            f"{milliseconds(report['update_seconds'], 99):.0f}",
            str(report["updates"]),
            f"{report['test_accuracy']:.1%}",
            ", ".join(map(str, report["dropped"])),
            "yes" if report["weights_identical"] else "NO",
        )
    return table


def meaning(reports: Sequence[dict[str, Any]]) -> str:
    """One sentence that says what the table shows, from its numbers."""
    nobody, synchronous, backup = (report["seconds"] for report in reports)
    gained = synchronous / backup
    points = (reports[2]["test_accuracy"] - reports[0]["test_accuracy"]) * 100
    return (
        f"One slow rank makes plain synchronous training {synchronous / nobody:.1f} times as long. With one backup "
        f"worker it takes {backup / nobody:.1f} times as long as with nobody slow, {gained:.1f} times faster than "
        f"waiting, at {abs(points):.1f} points {'more' if points >= 0 else 'less'} test accuracy."
    )


def picture(path: Path, reports: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    curves = [
        Curve(
            run.title,
            report["update_seconds"],
            f"{report['updates']} updates in {sum(report['update_seconds']):.1f} s\n"
            f"test accuracy {report['test_accuracy']:.1%}",
        )
        for run, report in zip(RUNS, reports, strict=True)
    ]
    draw(
        path, f"One of {args.ranks} ranks sleeps {args.delay_ms:g} ms in every step. A backup worker hides it.", curves
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--delay-ms", type=float, default=200.0, help="what the slow rank sleeps in each step (default 200)"
    )
    parser.add_argument("--epochs", type=int, default=5, help="of each training (default 5)")
    parser.add_argument(
        "--picture", type=Path, default=Path("build/demo.png"), help="where the picture goes (default build/demo.png)"
    )
    parser.add_argument("--timeout-s", type=float, default=120.0, help="longest time for one training (default 120)")
    args = parser.parse_args()
    launch.exit_on_signals()
    console = Console(width=max(Console().width, 100))
    try:
        reports = [train(run, args, console) for run in RUNS]
    except KeyboardInterrupt:
        console.print("interrupted; all ranks have ended")
        sys.exit(130)
    except (JobError, launch.LaunchError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    console.print(comparison(reports))
    console.print(meaning(reports))
    picture(args.picture, reports, args)
    console.print(f"picture: {args.picture.resolve()}")
    if not all(report["weights_identical"] for report in reports):
        sys.exit("the ranks' weights differ: this must never happen, please report it")


if __name__ == "__main__":
    main()
