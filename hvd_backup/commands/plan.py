"""Which number of backup workers pays, from a recorded run: a table, a verdict and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hvd_backup import planning, trace
from hvd_backup.commands import count
from hvd_backup.errors import UsageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `hvd-backup plan`."""
    parser.add_argument("trace", help="file that a run has written with HVD_BACKUP_TRACE, best with backup_workers=0")
    parser.add_argument("--channel", help="which optimizer, as optimizer.0 (default: the one with the most updates)")
    parser.add_argument("--last", type=count, metavar="K", help="only the newest K updates")
    parser.add_argument(
        "--noise-scale",
        type=float,
        metavar="B",
        help="gradient noise scale in batches of one rank, inf for updates needed ~ 1/N (default: as measured)",
    )
    parser.add_argument(
        "--min-contributors", type=count, default=1, metavar="N", help="never wait for fewer ranks (default 1)"
    )
    parser.add_argument("--picture", metavar="FILE", help="write a picture there, as PNG")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status."""
    try:
        recording = trace.read(args.trace)
        made = planning.plan_recording(
            recording,
            args.channel,
            noise_scale=args.noise_scale,
            min_contributors=args.min_contributors,
            last=args.last,
        )
        print(
            f"{made.steps} steps of {recording.size} ranks, {made.tail_s * 1e3:.2f} ms from a decision to its update\n"
        )
        print(made)
        if args.picture:
            from hvd_backup import pictures

            Path(args.picture).write_bytes(pictures.plan_picture(made))
            print(f"\nwritten: {args.picture}")
        return 0
    except (UsageError, OSError) as error:
        print(f"hvd-backup plan: {error}", file=sys.stderr)
        return 1
