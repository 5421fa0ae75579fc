"""Runs an unchanged Horovod script with backup workers:

    horovodrun -np 4 python -m hvd_backup.run --backup-workers 1 train.py ARGS
    mpirun -np 4 python -m hvd_backup.run --backup-workers 1 -m package.train ARGS

Its `import horovod.torch as hvd` then means hvd_backup.torch, and its training loader follows the global step
(torch/unchanged.py). Every option of hvd_backup can be given, as in the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from hvd_backup.config import Config, environment_name
from hvd_backup.errors import ConfigError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script in this process, as `python script` would."""
    parser = argparse.ArgumentParser(
        prog="python -m hvd_backup.run",
        description="Runs an unchanged Horovod script with backup workers.",
        usage="%(prog)s [--backup-workers B] [options] (SCRIPT | -m MODULE) [ARGS...]",
    )
    for field in dataclasses.fields(Config):
        meaning = field.metadata["option"].meaning.replace("`", "").replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), metavar="VALUE", help=meaning)
    parser.add_argument("-m", dest="as_module", action="store_true", help="run a module, as python -m does")
    parser.add_argument("script", help="the script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(argv)
    for field in dataclasses.fields(Config):
        if (value := getattr(given, field.name)) is not None:
            os.environ[environment_name(field.name)] = value
    try:
        Config.from_environment()
    except ConfigError as error:
        parser.error(str(error))
    if not given.as_module and not Path(given.script).exists():
        parser.error(f"there is no script {given.script}")

    from hvd_backup.torch import unchanged

    unchanged.install()
    sys.argv = [given.script, *given.args]
    if given.as_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(given.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(given.script).resolve().parent)
        runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    main()
