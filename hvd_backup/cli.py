"""The command `hvd-backup`: a dispatcher, with one module of hvd_backup.commands for each subcommand.

A subcommand's module opens with the line that `hvd-backup --help` shows, and has add_arguments(parser) and
run(args) -> exit status. It is imported only when it is asked for, so that none pays for another's imports.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "check": "what is here (MPI, Horovod, frameworks, GPU), and whether the launched ranks can work together",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hvd-backup ARGV`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="hvd-backup", description="Tools around training with backup workers.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, meaning in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=meaning, description=meaning[:1].upper() + meaning[1:] + ".")
        if arguments[:1] == [name]:
            module = importlib.import_module(f"hvd_backup.commands.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())
