"""What is started from a shell: unchanged scripts, `hvd-backup check`, horovodrun."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import hvd_backup
from hvd_backup import cli, launch

SCRIPT = str(Path(__file__).with_name("unchanged_script.py"))
RUN = [sys.executable, "-m", "hvd_backup.run"]
STEPS = 10  # in an epoch of four ranks


def reports(printed: str, ranks: int) -> list[dict[str, Any]]:
    """The JSON lines of all ranks, by rank, wherever the launcher has put them."""
    found = [json.loads(line) for line in re.findall(r"\{.*\}", printed)]
    assert sorted(report["rank"] for report in found) == list(range(ranks)), printed
    return sorted(found, key=lambda report: report["rank"])


def on_ranks(ranks: int, command: Sequence[str], **env: str) -> str:
    """What a command prints on some ranks; it must end well."""
    done = launch.run(ranks, command, env=env, timeout_s=100, capture=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("horovod", "options"), [("auto", []), ("off", []), ("off", ["--new-loaders", "--scaler"])])
def test_an_unchanged_script_trains_with_backup_workers(horovod: str, options: list[str]) -> None:
    """With Horovod, and without: then its horovod.torch is ours altogether. Loaders may be made anew for each epoch."""
    env = {"HVD_BACKUP_DELAY": "rank=3,ms=40,p=0.6", "HVD_BACKUP_HOROVOD": horovod}
    seen = reports(on_ranks(4, [*RUN, "--backup-workers", "1", SCRIPT, "--epochs", "3", *options], **env), 4)
    for report in seen:
        assert report["weights"] == seen[0]["weights"]
        assert report["scale"] == seen[0]["scale"]
        assert report["tested"] == [4, 4, 4]
        assert report["losses"] == pytest.approx(seen[0]["losses"])
    assert seen[0]["losses"][-1] < seen[0]["losses"][0]
    assert max(max(report["batches"]) for report in seen) == STEPS
    assert sum(seen[3]["batches"]) < 3 * STEPS, "the late rank skips batches"


def test_an_unchanged_script_without_backup_workers_ends_as_with_horovod() -> None:
    theirs = reports(on_ranks(2, [sys.executable, SCRIPT]), 2)
    ours = reports(on_ranks(2, [*RUN, SCRIPT]), 2)
    for of_rank, with_ours in zip(theirs, ours, strict=True):
        assert with_ours["batches"] == of_rank["batches"] == [20, 20, 20]
        assert with_ours["losses"] == pytest.approx(of_rank["losses"], rel=1e-4)
        assert with_ours["weights"] == pytest.approx(of_rank["weights"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--backup-workers", "-1", SCRIPT], "HVD_BACKUP_BACKUP_WORKERS='-1': expected"),
        (["no_such_script.py"], "there is no script no_such_script.py"),
        (["--backup-worker-count", "1", SCRIPT], "unrecognized arguments|there is no script"),
    ],
)
def test_run_says_what_is_wrong(arguments: list[str], told: str) -> None:
    done = subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and re.search(told, done.stderr), done.stderr


needs_open_mpi = pytest.mark.skipif(
    launch.find_launcher().dialect == "hydra", reason="horovodrun 0.28.1 does not know the mpirun of today's MPICH"
)


def horovodrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs horovodrun on two ranks of this machine, with what Open MPI 5 needs."""
    program = shutil.which("horovodrun", path=str(Path(sys.executable).parent)) or "horovodrun"
    env = launch.rank_environment(2, {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    binding = []
    if "--gloo" not in arguments and launch.find_launcher().dialect == "openmpi5":
        binding = ["--binding-args=--bind-to none --map-by :OVERSUBSCRIBE"]
    command = [program, "-np", "2", *binding, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=env)


@needs_open_mpi
def test_under_horovodrun() -> None:
    done = horovodrun(*RUN, "--backup-workers", "1", SCRIPT, "--epochs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = reports(done.stdout, 2)
    assert first["weights"] == second["weights"]


@needs_open_mpi
@pytest.mark.parametrize(
    "example", [("keras_digits.py", "--epochs", "1"), ("tensorflow_tape.py", "--steps", "50")], ids=["keras", "tape"]
)
def test_tensorflow_under_horovodrun(example: tuple[str, ...]) -> None:
    script = str(Path(__file__).parents[1] / "examples" / example[0])
    done = horovodrun(sys.executable, script, *example[1:], "--backup-workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights identical   yes" in done.stdout


def test_horovodrun_with_gloo_is_told_what_works() -> None:
    done = horovodrun("--gloo", sys.executable, "-c", "import hvd_backup.torch as hvd; hvd.init()")
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert printed.count("Either of these works:") == 1, printed
    assert "horovodrun --mpi" in printed and "mpirun -np 2 python" in printed


def test_check_reports_and_tests_the_ranks() -> None:
    printed = on_ranks(3, [sys.executable, "-m", "hvd_backup.cli", "check"])
    for line in (
        r"hvd_backup +\d",
        r"PyTorch +\d",
        r"Horovod +0\.28\.1; torch: controllers mpi, gloo",
        r"MPI +.*thread level MULTIPLE",
        r"ranks +3 on ",
        r"ring +ok: 1 MiB",
        r"first N +ok: rank 2 came 500 ms late",
    ):
        assert re.search(f"^{line}", printed, re.MULTILINE), f"{line} is missing:\n{printed}"


def test_check_with_one_rank_says_how_to_test(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hvd_backup.cli", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "mpirun -np 4 hvd-backup check" in done.stdout, done.stdout + done.stderr


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0 and f"hvd-backup {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("built", "running", "told"),
    [
        ("Open MPI v5.0.11, package: x", "Open MPI v5.0.8, package: y", ""),
        ("Open MPI v4.1.4", "Open MPI v5.0.8", "built with Open MPI 4, but.*loaded is Open MPI 5.*mpicxx"),
        ("MPICH Version:\t4.0.2", "Open MPI v5.0.8", "built with MPICH 4, but.*loaded is Open MPI 5"),
        ("unknown MPI 3.1", "MPICH Version: 4.0.2", ""),
    ],
)
def test_another_mpi_than_that_of_the_build_is_explained(built: str, running: str, told: str) -> None:
    assert re.fullmatch(f".*{told}.*" if told else "", hvd_backup.mpi_mismatch(built, running))
