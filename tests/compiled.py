"""Shared libraries of the tests' own, compiled when they are needed, with the mpicxx in use."""

import shutil
import subprocess
from pathlib import Path


def shared_library(source: Path, folder: Path, *flags: str) -> Path:
    """Compiles one C++ file into a library in `folder`."""
    compiler = shutil.which("mpicxx")
    assert compiler is not None
    library = folder / f"{source.stem}.so"
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *flags, str(source), "-o", str(library)], check=True
    )
    return library
