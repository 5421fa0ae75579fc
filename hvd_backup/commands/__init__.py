"""The subcommands of `hvd-backup`, one module each; hvd_backup/cli.py lists them."""

import argparse

__all__ = ["count"]


def count(text: str) -> int:
    """The value of an option that is a number of things, at least one."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, given {text}")
    return number
