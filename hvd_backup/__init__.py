"""First-N allreduce: data-parallel training with backup workers, beside Horovod or over plain MPI.

Import the module of your framework: `hvd_backup.torch`, or `hvd_backup.mpi` for NumPy arrays. This package itself does
nothing at import, and loads the native core when something first asks for it.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """`from hvd_backup import _core`, with an error that says what to do when the core cannot be loaded."""
        if name not in ("_core", "_core_testing"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError:
            remedy = {
                "_core": "Run `pip install .` in it, and start Python in another folder.",
                "_core_testing": "It is for tests: `make test` builds it (cmake.define.HVD_BACKUP_TESTING=ON).",
            }[name]
            raise ImportError(f"hvd_backup.{name} is not built in {__path__[0]}: a source tree? {remedy}") from None
        except ImportError as error:
            raise ImportError(
                f"hvd_backup.{name} cannot be loaded: {error}. It was built against another MPI or Python than the one "
                "here; with the right mpicxx first on PATH run `pip install --force-reinstall --no-deps .` again."
            ) from error
