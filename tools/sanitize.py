"""Runs the tests of the C++ core with sanitizers: `make sanitize`.

    python tools/sanitize.py address     # ASan, LSan and UBSan: what the core does in one process
    python tools/sanitize.py thread      # TSan: engines as threads of one process

Builds the core and its Python modules once more, into build/sanitize-*, and has pytest import those (tests/sanitized).
Python itself is not instrumented. What a sanitizer finds ends the run, with its report. Nothing in our own code is
suppressed; what is left out, and why, is said beside each option. More arguments are pytest's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sanitizer:
    """How one is built and run.

    Attributes:
        flags: for the compiler and the linker.
        preload: runtime libraries that must come before all others, since Python is not linked with them.
        modules: what is built.
        options: environment of the run.
        tests: pytest's arguments.
    """

    flags: str
    preload: tuple[str, ...]
    modules: tuple[str, ...]
    options: dict[str, str]
    tests: tuple[str, ...]


SANITIZERS = {
    "address": Sanitizer(
        # Without optimisation: it compiles in half the time, and the tests take little longer.
        flags="-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        preload=("libasan.so", "libstdc++.so"),  # the latter, because ASan looks for __cxa_throw as it starts
        modules=("_core", "_core_testing"),
        options={
            # What asks for as much as this has believed a message that lies about its length.
            "ASAN_OPTIONS": "max_allocation_size_mb=512",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Python leaves objects behind when it ends. Leaks are looked for in the report: those that the core made.
            "LSAN_OPTIONS": "exitcode=0",
            "PYTHONMALLOC": "malloc",  # one allocation for each object, which the sanitizers can follow
        },
        tests=(
            *("tests/test_messages.py", "tests/test_message_fuzz.py", "tests/test_engine.py"),
            *("tests/test_transport.py", "tests/test_node_exchange.py", "tests/test_collective.py"),
            *("tests/test_control_rules.py", "tests/test_control_policy.py", "tests/test_chooser.py"),
            *("tests/test_kernels.py", "tests/test_gpu_kernels.py", "tests/test_nccl.py"),
            *("tests/test_engine_device.py", "tests/test_device_groups.py"),
            # Not ranks as processes (MPI's own memory), not 9 GiB, not hundreds of members where a few will do. Not
            # megabytes: a rank that fetches them is so slow here that it may never come up with the others.
            *(
                "-k",
                "not ranks and not asked and not 2_to_the_31 and not finalize and not wrong_state and not stopped "
                "and not hundreds and not megabytes",
            ),
        ),
    ),
    "thread": Sanitizer(
        # -Wno-tsan: TSan does not understand the fence in node_exchange.cpp, which synchronises processes, not threads.
        flags="-O1 -fsanitize=thread -Wno-tsan",
        preload=("libtsan.so",),
        modules=("_core", "_core_testing"),
        options={
            # What Python and NumPy do themselves (memcpy under the interpreter's lock, say) is not seen as ordered.
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
            # UCX, which comes with MPI, takes a lock when a thread has ended: TSan crashes there.
            "UCX_MEM_MMAP_HOOK_MODE": "none",
            "UCX_MEM_EVENTS": "n",
        },
        tests=("tests/test_engine.py", "tests/test_engine_device.py", "-k", "not megabytes"),
    ),
}


def build(sanitizer: Sanitizer, folder: Path) -> None:
    """Compiles what has changed."""
    subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-Wno-dev", "--log-level=WARNING"),
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Sanitize",  # none of CMake's own, so assertions are on
            f"-DCMAKE_CXX_FLAGS=-g1 -fno-omit-frame-pointer {sanitizer.flags}",
            *("-DHVD_BACKUP_TESTING=ON", "-DHVD_BACKUP_TENSORFLOW=OFF", "-DHVD_BACKUP_GPU=OFF"),
        ],
        check=True,
    )
    subprocess.run(["cmake", "--build", str(folder), "--parallel", "2", "--target", *sanitizer.modules], check=True)


def runtime(library: str) -> str:
    """The path of one of the compiler's libraries."""
    told = subprocess.run(["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True)
    return os.path.realpath(told.stdout.strip())


def leaks_of_the_core(report: str) -> str:
    """Those blocks of LeakSanitizer's report that were allocated, directly or not, by our own code."""
    ours = str(ROOT / "csrc")
    return "\n\n".join(block for block in report.split("\n\n") if "leak of" in block and ours in block)


def run(sanitizer: Sanitizer, folder: Path, arguments: list[str]) -> int:
    """Runs the tests; returns the exit status."""
    for old in folder.glob("report.*"):
        old.unlink()
    reports = {name: f"{value}:log_path={folder}/report" for name, value in sanitizer.options.items() if "SAN" in name}
    environment = {
        **os.environ,
        **sanitizer.options,
        **reports,
        "LD_PRELOAD": " ".join(runtime(library) for library in sanitizer.preload),
        "PYTHONPATH": str(ROOT / "tests" / "sanitized"),
        "SANITIZED_MODULES": str(folder),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sanitizer.tests, *arguments]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    report = "\n\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("report.*")))
    if leaks := leaks_of_the_core(report):
        print(leaks, "\nthe core has leaked memory, see above", file=sys.stderr)
        return 1
    if status:
        print(report, f"\npytest has ended with status {status}", file=sys.stderr)
    return status


def main() -> int:
    """Builds and runs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Runs the tests of the C++ core with a sanitizer.")
    parser.add_argument("sanitizer", choices=SANITIZERS)
    given, arguments = parser.parse_known_args()
    folder = ROOT / "build" / f"sanitize-{given.sanitizer}"
    build(SANITIZERS[given.sanitizer], folder)
    return run(SANITIZERS[given.sanitizer], folder, arguments)


if __name__ == "__main__":
    sys.exit(main())
