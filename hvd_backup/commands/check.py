"""`hvd-backup check`: what is here, and whether the launched ranks can work together."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None yet."""


def run(args: argparse.Namespace) -> int:
    """Prints versions; the status is 0."""
    from hvd_backup import __version__

    print(f"hvd_backup {__version__}")
    return 0
