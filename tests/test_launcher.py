"""hvd_backup.launch: which flags for which mpirun, what ranks inherit, and that nothing of a job is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_backup import launch

VERSIONS = {
    "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/": "openmpi5",
    "mpirun (Open MPI) 4.1.6": "openmpi4",
    "mpirun (Open MPI) 10.0.0": "openmpi5",
    "mpirun (IBM Spectrum MPI) 10.4.0": "openmpi4",
    "HYDRA build details:\n    Version:                                 4.2.1": "hydra",
    "Intel(R) MPI Library for Linux* OS, Version 2021.11": "hydra",
    "something else 1.0": None,
}

# Every rank writes its process id and sleeps; rank 1 is stopped besides, so that it cannot answer a polite request.
SLEEPERS = """
import os, signal, sys, time
from hvd_backup import launch
if not launch.inside_mpi():
    launch.run_self_on(2)
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
open(os.path.join(sys.argv[1], rank), "w").write(str(os.getpid()))
if rank == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(600)
"""


@pytest.mark.parametrize(("text", "dialect"), VERSIONS.items())
def test_dialect_is_read_from_the_version(text: str, dialect: str | None) -> None:
    assert launch.dialect_of(text) == dialect


@pytest.mark.parametrize("user", [0, 1000])
def test_flags_by_dialect(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    root = ["--allow-run-as-root"] if user == 0 else []
    expected = {
        "openmpi5": ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *root],
        "openmpi4": ["--oversubscribe", "--bind-to", "none", *root],
        "hydra": [],
    }
    for dialect, flags in expected.items():
        assert launch.Launcher("mpirun", dialect).command(3, ["x", "y"]) == ["mpirun", "-n", "3", *flags, "x", "y"]


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(launch.LaunchError, match="0 ranks"):
        launch.Launcher("mpirun", "hydra").command(0, ["x"])


def test_ranks_forget_an_outer_job_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setenv("OMPI_MCA_btl", "self,tcp")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    env = launch.rank_environment(3, {"HVD_BACKUP_GRACE": "0.1"})
    assert "OMPI_COMM_WORLD_RANK" not in env and "PMIX_RANK" not in env
    assert env["OMPI_MCA_btl"] == "self,tcp"
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["HVD_BACKUP_GRACE"] == "0.1"


def test_run_captures_what_ranks_print_and_how_they_end() -> None:
    done = launch.run(2, [sys.executable, "-c", "print('here')"], capture=True, timeout_s=60)
    assert (done.returncode, done.stdout.split()) == (0, ["here", "here"])
    assert launch.run(1, [sys.executable, "-c", "raise SystemExit(7)"], capture=True, timeout_s=60).returncode == 7


def wait_for_ranks(folder: Path, ranks: int, timeout_s: float = 60.0) -> list[int]:
    """The process ids of SLEEPERS, once all have written theirs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        pids = [int(text) for file in folder.iterdir() if (text := file.read_text())]
        if len(pids) == ranks:
            return pids
        time.sleep(0.05)
    raise AssertionError(f"{ranks} ranks did not start within {timeout_s:g} s")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_job_that_takes_too_long_is_ended_with_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        launch.run(2, [sys.executable, "-c", SLEEPERS, str(tmp_path)], timeout_s=3)
    assert not any(is_alive(pid) for pid in wait_for_ranks(tmp_path, 2))


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_started_itself_takes_its_ranks_along(tmp_path: Path, received: signal.Signals) -> None:
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    folder = tmp_path / "pids"
    folder.mkdir()
    outer = subprocess.Popen([sys.executable, str(script), str(folder)])
    try:
        pids = wait_for_ranks(folder, 2)
        outer.send_signal(received)
        assert outer.wait(30) == 128 + received
        assert not any(is_alive(pid) for pid in pids)
    finally:
        outer.kill()
