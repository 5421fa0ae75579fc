"""Runs a function, a script or a piece of source on several ranks under mpirun, and says what became of each rank.

    values = run_ranks(4, body, args=(3,))              # body(3) in four processes; what each returned, by rank
    run_ranks(2, Path("examples/bare.py"), args=["--steps", "5"])
    with start_ranks(4, body) as job:                   # without waiting: stop ranks, wait for marks, then
        job.wait_for_mark(3, "computing"); job.stop(3); ...; job.resume(3); values = job.wait().values()

A failure names the ranks that raised, died or hung, with what each of them printed and, for those that hung, where: no
test needs a watchdog of its own. `tests/rank_main.py` is the other side; `@pytest.mark.ranks(1, 2, 4)` (conftest.py)
runs a whole test this way; ranks as threads of one process are in `tests/threads.py`.
"""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hvd_backup import launch
from tests.outcome import Outcome, RankOutcome

POLL_S = 0.01
KILL_PATIENCE_S = 1.0  # for mpirun to end its ranks; after that each is killed
# Once one rank has failed the others have this long to end by themselves; a test of just that asks for less or more.
AFTER_FAILURE_S = 15.0
# A developer's own settings would change what the tests test.
FOREIGN_PREFIXES = ("HVD_BACKUP_", "HOROVOD_")
# Whether Horovod is installed or not: what is tested is ours, unless a test says otherwise.
OUR_OWN = {"HVD_BACKUP_HOROVOD": "off"}


class Job:
    """Ranks that have been started; a context manager, at whose end no process of theirs is left."""

    def __init__(
        self, size: int, job: dict[str, Any], env: Mapping[str, str] | None, timeout_s: float, survive_losses: bool
    ) -> None:
        self._all = range(size)
        self._started = time.monotonic()
        self._deadline = self._started + timeout_s
        self._limit = f"the time limit of {timeout_s:g} s"
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        if source := job.pop("source", None):
            job["script"] = str(self._folder / "script.py")
            Path(job["script"]).write_text(source)
        (self._folder / "job").write_bytes(pickle.dumps(job))
        main = Path(__file__).with_name("rank_main.py")
        inherited = {k: v for k, v in launch.rank_environment(size).items() if not k.startswith(FOREIGN_PREFIXES)}
        with open(self._folder / "launcher.log", "wb") as log:
            self._process = subprocess.Popen(
                launch.find_launcher().command(
                    size, [sys.executable, "-u", str(main), str(self._folder)], survive_losses
                ),
                env={**inherited, **OUR_OWN, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def pid(self, rank: int, timeout_s: float = 30.0) -> int:
        """The process id of a rank; waits until the rank has started."""
        return int(self._await(lambda: self._read(rank, "pid"), f"rank {rank} to start", timeout_s))

    def stop(self, rank: int) -> None:
        """Freezes the whole process of a rank (SIGSTOP): training thread and engine thread."""
        os.kill(self.pid(rank), signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """Lets a stopped rank go on (SIGCONT)."""
        os.kill(self.pid(rank), signal.SIGCONT)

    def stop_now_and_then(self, rank: int, times: int, seconds: float) -> None:
        """Stops a rank several times for so long, with pauses of up to 0.2 s."""
        chance = random.Random(1)
        for _ in range(times):
            self.stop(rank)
            time.sleep(seconds)
            self.resume(rank)
            time.sleep(chance.random() * 0.2)

    def kill(self, rank: int) -> None:
        """Ends a rank's process at once (SIGKILL)."""
        os.kill(self.pid(rank), signal.SIGKILL)

    def wait_for_mark(self, rank: int, name: str, timeout_s: float = 60.0) -> Any:
        """Waits until the rank has called `rank_main.mark(name, value)`; returns the value of its first such call."""
        found = self._await(
            lambda: [mark["value"] for mark in self.marks(rank) if mark["name"] == name],
            f"rank {rank}'s mark {name!r}",
            timeout_s,
        )
        return found[0]

    def marks(self, rank: int) -> list[dict[str, Any]]:
        """All marks of a rank so far, in order: name, value, time (seconds since the epoch)."""
        lines = self._read(rank, "marks").decode().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self) -> Outcome:
        """Waits for the end of the job or the watchdog, and says what became of each rank. Raises nothing itself."""
        verdict = ""
        while self._process.poll() is None and not verdict:
            time.sleep(POLL_S)
            now = time.monotonic()
            if now >= self._deadline:
                verdict = f"still running at {self._limit}"
            elif self._deadline > now + AFTER_FAILURE_S and any(self._report(r)[0] == "raised" for r in self._all):
                self._deadline = now + AFTER_FAILURE_S
                self._limit = f"{AFTER_FAILURE_S:g} s after a rank had raised"
        running = self._dump_stacks() if verdict else {}
        launch.stop(self._process, patience_s=KILL_PATIENCE_S)
        outcome = Outcome(
            ranks=[self._outcome(rank, running) for rank in self._all],
            exit_code=None if verdict else self._process.returncode,
            verdict=verdict,
            launcher_output=(self._folder / "launcher.log").read_text(errors="replace"),
            seconds=time.monotonic() - self._started,
        )
        self.close()
        return outcome

    def close(self) -> None:
        """Ends what still runs, and removes the job's files. Idempotent."""
        launch.stop(self._process, patience_s=KILL_PATIENCE_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _await(self, probe: Callable[[], Any], what: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := probe()):
            ended = self._process.poll() is not None
            if (ended and not probe()) or time.monotonic() > deadline:
                how = "the job ended" if ended else f"{timeout_s:g} s went by"
                self._deadline, self._limit = 0.0, "that moment"
                raise AssertionError(f"waited for {what}, but {how}\n{self.wait().describe()}")
            time.sleep(POLL_S)
        return found

    def _read(self, rank: int, kind: str) -> bytes:
        try:
            return (self._folder / f"rank{rank}.{kind}").read_bytes()
        except FileNotFoundError:
            return b""

    def _report(self, rank: int) -> tuple[str, Any]:
        data = self._read(rank, "report")
        return pickle.loads(data) if data else ("", None)

    def _dump_stacks(self) -> dict[int, str]:
        """Asks every rank that still runs for its stacks; returns those ranks with their process state (/proc)."""
        running: dict[int, str] = {}
        for rank in self._all:
            if (pid := self._read(rank, "pid")) and (state := process_state(int(pid))) not in ("", "Z", "X"):
                running[rank] = state
                with open(self._folder / f"rank{rank}.log", "a") as log:
                    log.write("--- where it is, thread by thread, innermost call first\n")
                os.kill(int(pid), signal.SIGUSR1)
        time.sleep(0.5 if running else 0.0)  # each writes its own; a stopped one cannot
        return running

    def _outcome(self, rank: int, running: Mapping[int, str]) -> RankOutcome:
        reported, value = self._report(rank)
        state = reported or ("died" if self._read(rank, "pid") else "never started")
        if rank in running and reported != "raised":
            state = "stopped" if running[rank] in "Tt" else "hung at exit" if reported else "hung"
        return RankOutcome(
            rank=rank,
            state=state,
            value=value if reported == "returned" else None,
            error=value[0] if reported == "raised" else "",
            exception=value[1] if reported == "raised" else "",
            output=self._read(rank, "log").decode(errors="replace"),
        )


def process_state(pid: int) -> str:
    """One letter as in /proc/PID/stat (R running, S sleeping, T stopped, Z zombie); empty: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def start_ranks(
    size: int,
    target: Callable[..., Any] | Path | str,
    args: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
    survive_losses: bool = False,
) -> Job:
    """Starts `target` on `size` ranks and returns at once.

    Args:
        target: a module-level function, called as target(*args, **kwargs); the path of a script, started with `args`
            as its command line; or source text (more than one line), likewise. A script's value is its global `result`.
        env: variables set in the ranks, beside this process's own without HVD_BACKUP_* and HOROVOD_*.
        timeout_s: seconds from the start after which `Job.wait` ends the job and names the ranks that hung.
        survive_losses: the others go on when a process dies (Open MPI 5).
    """
    job: dict[str, Any] = {"sys_path": [os.path.abspath(path) for path in sys.path]}
    if callable(target):
        try:
            job["call"] = pickle.dumps((target, tuple(args), dict(kwargs or {})))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"ranks need a module-level function and arguments that pickle, got {target!r}") from error
    else:
        source = target if isinstance(target, str) and "\n" in target else None
        job["script"] = "script.py" if source else str(Path(target).resolve(strict=True))
        job["source"] = textwrap.dedent(source) if source else None
        job["args"] = [str(arg) for arg in args]
    return Job(size, job, env, timeout_s, survive_losses)


def run_ranks(
    size: int,
    target: Callable[..., Any] | Path | str,
    args: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Runs `target` on `size` ranks to its end; returns the ranks' values, by rank. Arguments as in `start_ranks`.

    Raises:
        AssertionError: a rank raised, died or hung, or mpirun failed; the text shows every rank concerned.
    """
    with start_ranks(size, target, args, kwargs=kwargs, env=env, timeout_s=timeout_s) as job:
        return job.wait().values()
