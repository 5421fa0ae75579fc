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
from rich import box
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


def comparison(reports: Sequence[dict[str, Any]], ranks: int) -> Table:
    """One column for each run, so that it fits into 80."""
    table = Table(title=f"{ranks} ranks train a CNN on handwritten digits", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in RUNS:
        table.add_column(run.title.replace(", ", ",\n"), justify="right", no_wrap=True)
    rows = {
        "seconds": [f"{r['seconds']:.1f}" for r in reports],
        "time per update, p50": [f"{milliseconds(r['update_seconds'], 50):.0f} ms" for r in reports],
        "time per update, p99": [f"{milliseconds(r['update_seconds'], 99):.0f} ms" for r in reports],
        "updates": [str(r["updates"]) for r in reports],
        "test accuracy": [f"{r['test_accuracy']:.1%}" for r in reports],
        f"gradients dropped, rank 0 to {ranks - 1}": [" ".join(map(str, r["dropped"])) for r in reports],
        "weights identical": ["yes" if r["weights_identical"] else "NO" for r in reports],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def meaning(reports: Sequence[dict[str, Any]]) -> str:
    """One sentence that says what the table shows, from its numbers."""
    nobody, synchronous, backup = (report["seconds"] for report in reports)
    points = (reports[2]["test_accuracy"] - reports[1]["test_accuracy"]) * 100
    accuracy = (
        f"{abs(points):.1f} points {'more' if points > 0 else 'less'} test accuracy" if points else "equal accuracy"
    )
    return (
        f"One slow rank stretches plain synchronous training from {nobody:.1f} s to {synchronous:.1f} s; with one "
        f"backup worker it takes {backup:.1f} s, {synchronous / backup:.1f} times faster, at {accuracy}."
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
    title = (
        f"One of {args.ranks} ranks sleeps {args.delay_ms:g} ms in every step: with a backup worker nobody waits for it"
    )
    draw(path, title, curves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--delay-ms", type=float, default=200.0, help="sleep of the slow rank in each step (default 200)"
    )
    parser.add_argument("--epochs", type=int, default=4, help="of each training (default 4)")
    parser.add_argument(
        "--picture", type=Path, default=Path("build/demo.png"), help="its file (default build/demo.png)"
    )
    parser.add_argument("--timeout-s", type=float, default=120.0, help="longest time for one training (default 120)")
    args = parser.parse_args()
    launch.exit_on_signals()
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # of a file or a pipe nothing is known
    try:
        reports = [train(run, args, console) for run in RUNS]
    except KeyboardInterrupt:
        console.print("interrupted; all ranks have ended")
        sys.exit(130)
    except (JobError, launch.LaunchError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    console.print(comparison(reports, args.ranks))
    console.print(meaning(reports))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    picture(args.picture, reports, args)
    console.print(f"picture: {args.picture.resolve()}", soft_wrap=True)
    if not all(report["weights_identical"] for report in reports):
        sys.exit("the ranks' weights differ: this must never happen, please report it")


if __name__ == "__main__":
    main()
