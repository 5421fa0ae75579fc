"""Horovod in the same process: whether it can be used, and its start, for what hvd_backup leaves to it.

Horovod is started when the program first uses something of it, not by init(): its background thread then runs a
collective of all ranks every millisecond, which one stopped process stalls, and those who need none of it are spared
that. Nothing here is called within a training step. Framework-neutral; which names are Horovod's own is decided in
torch/horovod_names.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

from hvd_backup import context, launch_check
from hvd_backup.config import Config
from hvd_backup.errors import ConfigError, UsageError

__all__ = ["Horovod"]

_log = logging.getLogger("hvd_backup")


class Horovod:
    """One of Horovod's framework modules, such as horovod.torch. framework: its name."""

    def __init__(self, framework: str) -> None:
        self._name = f"horovod.{framework}"
        self._module: SimpleNamespace | None = None
        self._why_not = ""

    def why_not(self) -> str:
        """Why Horovod cannot be used in this process; empty when it can. Imports it, and starts nothing."""
        if self._module is None and not self._why_not:
            self._why_not = self._load()
        return "HVD_BACKUP_HOROVOD=off" if _switched_off() else self._why_not

    def usable(self) -> bool:
        """Whether Horovod can be used."""
        return not self.why_not()

    def module(self) -> Any:
        """What Horovod's module has.

        Raises:
            UsageError: it cannot be used; says why.
        """
        if why_not := self.why_not():
            raise UsageError(f"this needs Horovod ({self._name}), which cannot be used here: {why_not}")
        return self._module

    def start(self, process_sets: Any = None) -> Any:
        """Initialises Horovod, with the communicator that init() was given, unless it is initialised; returns it.

        Collective over all ranks when it is not initialised yet.

        Raises:
            NotInitializedError: before hvd.init().
            UsageError: Horovod cannot be used, or was initialised by the program for other ranks than hvd_backup.
        """
        here = context.current()
        horovod = self.module()
        if not horovod.is_initialized():
            _log.info("rank %d: starting Horovod", here.rank)
            horovod.init(comm=here.requested_comm, process_sets=process_sets)
            here.before_close.append(horovod.shutdown)
        elif process_sets:
            raise UsageError(
                "init(process_sets=...), but Horovod is initialised already: give them to the first init()"
            )
        if (horovod.rank(), horovod.size()) != (here.rank, here.size):
            raise UsageError(
                f"Horovod was initialised for other ranks than hvd_backup: this process is rank {horovod.rank()} of "
                f"{horovod.size()} there, and rank {here.rank} of {here.size} here: give both init() the same comm"
            )
        return horovod

    def _load(self) -> str:
        """Imports Horovod; returns why that does not do."""
        if importlib.util.find_spec("horovod") is None:
            return "Horovod is not installed"
        try:
            module = importlib.import_module(self._name)
        except Exception as error:  # a build that does not fit its framework fails in many ways
            return f"it cannot be imported: {error}"
        if not hasattr(module, "mpi_built"):
            return "it was installed without support for this framework"
        if not module.mpi_built():
            return "it was built without MPI: build it with HOROVOD_WITH_MPI=1 and mpicxx on PATH"
        libraries = launch_check.mapped_mpi_libraries()
        if len(libraries) > 1:
            return (
                f"it was built with another MPI than hvd_backup and mpi4py use; loaded are {', '.join(libraries)}: "
                "rebuild Horovod with the mpicxx of this MPI first on PATH"
            )
        self._module = SimpleNamespace(**vars(module))  # a script that runs unchanged sees our names in the module
        return ""


def _switched_off() -> bool:
    if context.is_initialized():
        return context.current().config.horovod == "off"
    try:
        return Config.from_environment().horovod == "off"
    except ConfigError:
        return False  # init() says so, on every rank
