"""Who is late, how often and by how much: a table, and pictures as PNG files and in one HTML page."""

from __future__ import annotations

import argparse
import base64
import html
import sys
from pathlib import Path

from hvd_backup import arrivals, pictures, stragglers, trace
from hvd_backup.commands import count
from hvd_backup.errors import UsageError
from hvd_backup.stragglers import StragglerReport

__all__ = ["add_arguments", "page", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `hvd-backup report`."""
    parser.add_argument("trace", help="file that a run has written with HVD_BACKUP_TRACE")
    parser.add_argument("--channel", help="which optimizer, as optimizer.0 (default: the one with the most updates)")
    parser.add_argument("--last", type=count, metavar="K", help="only the newest K updates")
    parser.add_argument("--output", metavar="FOLDER", help="for the pictures and the page (default: beside the trace)")
    parser.add_argument("--no-pictures", action="store_true", help="only the table")


def run(args: argparse.Namespace) -> int:
    """Prints the table, writes the pictures; returns the exit status."""
    try:
        recording = trace.read(args.trace)
        channel = recording.channel(args.channel)
        times = arrivals.of(channel, recording.size, args.last)
        report = stragglers.of_arrivals(times, channel.name)
        print(report)
        if args.no_pictures or not report.updates:
            return 0
        made = {
            "arrivals": pictures.arrivals_by_rank(times),
            "lateness": pictures.lateness_map(times),
            "time_to_kth": pictures.time_to_kth(times),
        }
        source = Path(args.trace)
        folder = Path(args.output) if args.output else source.parent
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in made.items():
            (folder / f"{source.stem}_{name}.png").write_bytes(png)
        target = folder / f"{source.stem}_report.html"
        target.write_text(page(report, made, source.name))
        print(f"\nwritten: {target} and {len(made)} pictures {folder / source.stem}_*.png")
        return 0
    except (UsageError, OSError) as error:
        print(f"hvd-backup report: {error}", file=sys.stderr)
        return 1


def page(report: StragglerReport, made: dict[str, bytes], source: str) -> str:
    """One HTML page that needs nothing else: pictures are inside."""
    images = "\n".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in made.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Stragglers in {html.escape(source)}</title>
<style>
body {{ font-family: sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #ccc; font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; display: block; margin: 1.5em 0; }}
@media print {{ img {{ break-inside: avoid; }} }}
</style></head><body>
<h1>Stragglers in {html.escape(source)}</h1>
<p>{html.escape(report.summary())}</p>
{report._repr_html_()}
{images}
</body></html>
"""
