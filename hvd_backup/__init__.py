"""First-N allreduce: data-parallel training with backup workers, beside Horovod or over plain MPI.

Import the module of your framework: `hvd_backup.torch`, or `hvd_backup.mpi` for NumPy arrays. This package itself does
nothing at import, and loads the native core when something first asks for it.
"""

import re
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def mpi_mismatch(built_with: str, running: str) -> str:
    """Why the core must not be used with the MPI library that was loaded; empty when it may.

    Args:
        built_with, running: the first lines of MPI_Get_library_version() of the MPI that it was compiled against, and
            of the one that the dynamic linker has found.
    """
    built, found = _kind(built_with), _kind(running)
    if built is None or found is None or built == found:
        return ""
    return (
        f"it was built with {built[0]} {built[1]}, but the MPI library that was loaded is {found[0]} {found[1]}. Start "
        f"it with {built[0]} {built[1]} (its mpirun first on PATH, no other in LD_LIBRARY_PATH), or "
        "build it again with the mpicxx of this MPI first on PATH: pip install --force-reinstall --no-deps ."
    )


def _kind(version: str) -> tuple[str, int] | None:
    """Implementation and major version, across which the binary interface changes; None: not one that we know."""
    found = re.search(r"(Open MPI|MPICH|Intel\(R\) MPI|MVAPICH)\D*(\d+)", version)
    return (found[1], int(found[2])) if found else None


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """`from hvd_backup import _core`, with an error that says what to do when the core cannot be loaded."""
        if name not in ("_core", "_core_testing"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        try:
            core = importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError:
            remedy = {
                "_core": "Run `pip install .` in it, and start Python in another folder.",
                "_core_testing": "It is for tests: `make test` builds it (cmake.define.HVD_BACKUP_TESTING=ON).",
            }[name]
            raise ImportError(f"hvd_backup.{name} is not built in {__path__[0]}: a source tree? {remedy}") from None
        except ImportError as error:
            raise ImportError(
                f"hvd_backup.{name} cannot be used: {error}. It was built against another MPI or Python than the one "
                "here; with the right mpicxx first on PATH run `pip install --force-reinstall --no-deps .` again."
            ) from error
        if name == "_core" and (told := mpi_mismatch(core.mpi_built_with(), core.mpi_library_version())):
            raise ImportError(f"hvd_backup._core cannot be used: {told}")
        return core
