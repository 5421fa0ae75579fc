"""The subcommands of `hvd-backup`, one module each; hvd_backup/cli.py lists them."""

import argparse

from hvd_backup import option_values

__all__ = ["count"]


def count(text: str) -> int:
    """The value of an option that is a number of things, at least one."""
    try:
        return int(option_values.integer(1)(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, given {text}") from None
