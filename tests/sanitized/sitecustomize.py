"""Makes Python take hvd_backup's compiled modules from the folder SANITIZED_MODULES: see tools/sanitize.py.

Python imports a module of this name by itself when its folder is on PYTHONPATH; ranks that mpirun starts get it, too.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class SanitizedModules:
    """Finds `hvd_backup._core` and `hvd_backup._core_testing` before anybody else does."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in ("hvd_backup._core", "hvd_backup._core_testing"):
            return None
        (file,) = Path(os.environ["SANITIZED_MODULES"]).glob(f"{name.rpartition('.')[2]}.*so")
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.insert(0, SanitizedModules)  # type: ignore[arg-type]
