"""Horovod in the same process: whether it can be used, and its start, for what hvd_backup leaves to it.

Horovod is started when the program first uses something of it, not by init(): its background thread then runs a
collective of all ranks every millisecond, which one stopped process stalls, and those who need none of it are spared
that. Nothing here is called within a training step. Framework-neutral; which names are Horovod's own is decided in the
frameworks' horovod_names.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hvd_backup import context, launch_check
from hvd_backup.config import Config
from hvd_backup.errors import ConfigError, UsageError

__all__ = ["Horovod", "HorovodNames", "is_global", "words"]

_log = logging.getLogger("hvd_backup")


class Horovod:
    """One of Horovod's framework modules, such as horovod.torch. framework: its name."""

    def __init__(self, framework: str) -> None:
        self._name = f"horovod.{framework}"
        self._module: SimpleNamespace | None = None
        self._why_not = ""
        self._wanted_before_init = False

    def why_not(self) -> str:
        """Why Horovod cannot be used in this process; empty when it can. Imports it, and starts nothing."""
        if self._module is None and not self._why_not:
            self._why_not = self._load()
        if _switched_off():
            return "HVD_BACKUP_HOROVOD=off"
        if context.is_initialized() and context.current().engine.survives_losses:
            return "it ends when a process dies, which MPI survives in this run (--with-ft ulfm)"
        return self._why_not

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

    def init(self, comm: Any = None, process_sets: Any = None) -> None:
        """Starts the engine: collective over `comm`. A second call does nothing.

        Args:
            comm: mpi4py communicator of the ranks that take part, or a list of ranks; None: MPI.COMM_WORLD.
            process_sets: Horovod's: a list of ProcessSet, or "dynamic"; starts Horovod at once.

        Raises:
            ConfigError, UsageError: on every rank; see hvd_backup.context.init.
        """
        context.init(comm)
        if process_sets or self._wanted_before_init:
            self.start(process_sets)

    def use_after_init(self) -> None:
        """Something is used that works by itself once Horovod runs: starts it now, or together with init()."""
        if context.is_initialized():
            self.start()
        else:
            self._wanted_before_init = True

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

    def join(self, *arguments: Any) -> int:
        """Ours and, if it can be used, Horovod's join() at the same time; returns when all ranks have joined.

        Returns:
            The rank that joined last.
        """
        here = context.current()
        if not self.usable():
            return here.join()
        here.begin_join()
        # Horovod's collectives of the others go on meanwhile. It may not have been started yet, which takes all ranks.
        theirs = threading.Thread(target=lambda: self.start().join(*arguments), daemon=True)
        theirs.start()
        last = here.end_join()
        theirs.join()
        return last

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


@dataclass(frozen=True)
class HorovodNames:
    """Names of a module of ours that are Horovod's own: resolved when they are used.

    Attributes:
        package: our module.
        horovod: its twin.
        collectives: they first end the rounds of optimizers, as every full collective.
        started: using them starts Horovod.
        plain: they need no start.
    """

    package: str
    horovod: Horovod
    collectives: frozenset[str]
    started: frozenset[str]
    plain: frozenset[str]

    def all(self) -> frozenset[str]:
        """Every one."""
        return self.collectives | self.started | self.plain

    def there(self) -> frozenset[str]:
        """Those that can be used here."""
        return self.all() if self.horovod.usable() else frozenset()

    def join(self) -> int:
        """For uneven data: this rank's part is over; returns when all ranks have joined, the one that did so last.

        Until then the collectives and the training of the others go on, and this rank applies their updates. In updates
        without backup workers it counts as zeros.
        """
        return self.horovod.join()

    def resolve(self, name: str) -> Any:
        """The object behind a name.

        Raises:
            AttributeError: no such name; or it needs Horovod, which cannot be used: says why.
        """
        if name not in self.all():
            raise AttributeError(f"module {self.package!r} has no attribute {name!r}")
        if why_not := self.horovod.why_not():
            raise AttributeError(f"{self.package}.{name} is Horovod's own, and Horovod cannot be used here: {why_not}")
        theirs = getattr(self.horovod.module(), name)
        if name in self.plain:
            return theirs
        if name in self.started:
            self.horovod.start()
            return theirs

        @functools.wraps(theirs)
        def collective(*args: Any, **kwargs: Any) -> Any:
            return self.enter(name)(*args, **kwargs)

        return collective

    def enter(self, name: str) -> Any:
        """One of Horovod's collectives, to be called now: rounds have ended, and Horovod is started."""
        context.current().before_full_collective(f"{name}()")
        return getattr(self.horovod.start(), name)


def words(text: str) -> frozenset[str]:
    """For tables of names."""
    return frozenset(text.split())


def is_global(process_set: Any) -> bool:
    """Whether a process set is that of all ranks: None, or Horovod's global one."""
    return process_set is None or getattr(process_set, "process_set_id", None) == 0


def _switched_off() -> bool:
    if context.is_initialized():
        return context.current().config.horovod == "off"
    try:
        return Config.from_environment().horovod == "off"
    except ConfigError:
        return False  # init() says so, on every rank
