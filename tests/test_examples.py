"""The examples run and say what they promise, and the tour of the code leads past every file."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_backup import launch
from tests.launch import process_state

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run_example(name: str, ranks: int, *options: str, env: dict[str, str] | None = None) -> str:
    """What an example prints; it must end well."""
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = launch.run(ranks, command, env=env, timeout_s=120, capture=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_demo(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = launch.rank_environment(1, variables)
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--epochs", "1", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_first_n_allreduce(ranks: int) -> None:
    printed = run_example("first_n_allreduce.py", ranks)
    steps = re.findall(r"^ +(\d+)  ([\d ]+?)   ", printed, re.MULTILINE)
    assert [int(step) for step, _ in steps] == list(range(6))
    for _, contributors in steps:
        assert len(contributors.split()) >= max(1, ranks - 1)


def test_pytorch_digits_learns_and_accounts_for_what_it_drops(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    printed = run_example(
        "pytorch_digits.py",
        4,
        *("--epochs", "4", "--backup-workers", "1", "--json", str(file), "--trace", str(tmp_path / "trace")),
        env={"HVD_BACKUP_DELAY": "rank=3,ms=50,p=0.5"},
    )
    report = json.loads(file.read_text())
    assert report["weights_identical"] and "weights identical   yes" in printed
    assert report["updates"] == len(report["update_seconds"]) == 4 * 23  # 1437 images, 4 ranks, 16 each
    assert report["test_accuracy"] > 0.8
    assert sum(report["dropped"]) > 0
    decisions = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    training = [d for d in decisions if d["event"] == "decision" and d["channel"].startswith("optimizer")]
    assert len(training) == report["updates"]
    assert all(len(d["ranks"]) >= 3 for d in training)


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_keras_digits_learns_with_a_rank_that_is_late(backend: str) -> None:
    options = ("--epochs", "3", "--backup-workers", "1")
    env = {"HVD_BACKUP_DELAY": "rank=1,ms=30,p=0.5", "KERAS_BACKEND": backend}
    printed = run_example("keras_digits.py", 2, *options, env=env)
    assert "weights identical   yes" in printed
    assert re.search(r"updates +132\n", printed)  # 1437 images, 2 ranks, 16 each: 44 in an epoch
    assert float(re.findall(r"val_accuracy: ([\d.]+)", printed)[-1]) > 0.7  # by chance: 0.1. It is 0.84 to 0.92


def test_tensorflow_tape_does_not_wait_for_a_slow_rank() -> None:
    env = {"HVD_BACKUP_DELAY": "rank=1,ms=100"}
    printed = run_example("tensorflow_tape.py", 2, "--steps", "100", "--backup-workers", "1", env=env)
    assert "weights identical   yes" in printed
    assert float(re.findall(r"loss +([\d.]+) after 100 updates", printed)[0]) < 0.1
    on_time, slow = re.findall(r"batches computed +(\d+), (\d+)", printed)[0]
    assert int(on_time) > 90 and int(slow) < 50


def test_demo_compares_three_runs_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "demo.png"
    done = run_demo("--delay-ms", "50", "--picture", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("seconds", "time per update, p50", "updates", "test accuracy", "gradients dropped"):
        assert row in done.stdout
    assert re.search(r"weights identical( +yes){3}", done.stdout)
    assert "One slow rank stretches plain synchronous training" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_shows_the_output_of_a_run_that_fails(tmp_path: Path) -> None:
    done = run_demo("--picture", str(tmp_path / "demo.png"), HVD_BACKUP_NONSENSE="1")
    assert done.returncode == 1
    assert "the run 'nobody slow' ended with status" in done.stdout
    assert "HVD_BACKUP_NONSENSE" in done.stdout


def test_demo_is_interrupted_cleanly(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--picture", str(tmp_path / "demo.png")]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (ranks := ranks_below(demo.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ranks, "no rank was started"
        demo.send_signal(signal.SIGINT)
        printed, _ = demo.communicate(timeout=30)
    finally:
        demo.kill()
    assert demo.returncode == 130, printed
    assert "interrupted" in printed and "Traceback" not in printed
    assert not [pid for pid in ranks if process_state(pid) not in ("", "Z", "X")]


def ranks_below(pid: int) -> list[int]:
    """Process ids of the training script's ranks that `pid` has started."""
    return [
        below
        for below in launch.descendants(pid)
        if b"pytorch_digits" in (file.read_bytes() if (file := Path(f"/proc/{below}/cmdline")).exists() else b"")
    ]


def test_tour_leads_past_every_file() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text()
    linked = set(re.findall(r"\]\(\.\./([^)]+)\)", tour))
    headers = {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/*/*.h")} - {"csrc/bindings/testing.h"}
    modules = {str(file.relative_to(ROOT)) for file in ROOT.glob("hvd_backup/**/*.py") if file.name != "__init__.py"}
    assert headers | modules <= linked, "missing in docs/tour.md"
    assert not [link for link in linked if not (ROOT / link).exists()], "docs/tour.md leads nowhere"
