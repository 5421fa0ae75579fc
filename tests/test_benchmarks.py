"""The benchmarks run, verify what they measure, and compute what their headers define.

Their numbers are not judged here: a shared test machine cannot. The pure parts run inside ranks, because importing a
benchmark starts MPI.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_backup import launch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # ranks inherit this process's path


def quick_results(name: str, folder: Path, *options: str, survive_losses: bool = False) -> tuple[Any, str]:
    """Runs a benchmark on four ranks in its quick mode; returns the results from its JSON, and what it printed."""
    file = folder / "results.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json", str(file), *options]
    done = launch.run(4, command, timeout_s=120, capture=True, survive_losses=survive_losses)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["benchmark"] == name
    assert document["settings"]["ranks"] == 4
    assert document["machine"]["cores"] >= 1
    return document["results"], done.stdout


def test_allreduce_perf(tmp_path: Path) -> None:
    results, printed = quick_results("allreduce_perf", tmp_path, "--max-kib", "64")
    contestants = {"first-N, nobody late", "first-N, one late", "MPI_Allreduce", "gloo"}
    assert {(r["bytes"], r["contestant"]) for r in results} == {
        (size, contestant) for size in (1024, 4096, 16384, 65536) for contestant in contestants
    }
    for r in results:
        assert r["verified"] and 0 < r["p50_us"] <= r["p99_us"]
        assert r["bytes_per_s"] == pytest.approx(r["bytes"] / r["p50_us"] * 1e6)
        assert (r["time_to_mpi_allreduce"] == 1.0) == (r["contestant"] == "MPI_Allreduce")
    assert all(contestant in printed for contestant in contestants)


@pytest.mark.parametrize("options", [(), ("--scope", "bucket", "--arrive", "last", "--model-mib", "0.5")])
def test_step_perf(tmp_path: Path, options: tuple[str, ...]) -> None:
    results, printed = quick_results("step_perf", tmp_path, *options)
    cases = {(r["case"], r["backup_workers"]): r for r in results["cases"]}
    assert set(cases) == {("nobody slow", 0), ("nobody slow", 1), ("straggler", 0), ("straggler", 1)}
    assert cases["straggler", 0]["p50_ms"] >= 170  # computing and straggling
    assert cases["straggler", 1]["p50_ms"] < 170
    assert results["straggler_back"]["since"] > 0
    assert "time / ideal" in printed


def test_killed_rank_perf(tmp_path: Path) -> None:
    results, printed = quick_results("killed_rank_perf", tmp_path, survive_losses=True)
    assert results["kills"] == 1 and results["verified"]
    assert results["longest_extra_wait_ms"] < 500
    assert "longest extra wait" in printed


def test_stopped_rank_perf(tmp_path: Path) -> None:
    results, printed = quick_results("stopped_rank_perf", tmp_path)
    assert results["stops"] == 2
    assert min(results["stopped_s"]) >= 0.5
    assert min(results["caught_up"]) >= 2
    assert results["median_extra_wait_ms"] <= results["p90_extra_wait_ms"] <= results["longest_extra_wait_ms"] < 500
    assert "longest extra wait" in printed


def test_idle_perf_started_without_mpirun(tmp_path: Path) -> None:
    file = tmp_path / "idle.json"
    command = [sys.executable, str(BENCHMARKS / "idle_perf.py"), "--quick", "--ranks", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())["results"]
    assert [r["situation"] for r in results] == ["nothing to do", "in the middle of a step"]
    assert all(0 < r["engine_percent"] < 50 for r in results)


@pytest.mark.ranks(1)
def test_a_wrong_sum_ends_the_allreduce_benchmark() -> None:
    import numpy as np
    from mpi4py import MPI

    import allreduce_perf

    contribution = np.ones(8, dtype=np.float32)
    one = allreduce_perf.Contestant("sum", lambda: (0, 1), late=1)  # there is no rank 1: nobody waits for it
    allreduce_perf.verify(MPI.COMM_WORLD, one, contribution, contribution, calls=1)
    with pytest.raises(AssertionError, match=r"element 3 is 2\.0, expected 1\.0"):
        allreduce_perf.verify(MPI.COMM_WORLD, one, contribution, np.float32([1, 1, 1, 2, 1, 1, 1, 1]), calls=1)
    with pytest.raises(AssertionError, match=r"contributors \(0, 1\), expected \(0,\)"):
        allreduce_perf.run_block(MPI.COMM_WORLD, one, 1, lambda: 0.0)


@pytest.mark.ranks(1)
def test_ideal_is_the_nth_arrival_and_what_it_still_needs() -> None:
    from simulated_training import StepRecord
    from step_perf import against_ideal

    def record(step: int, ready: float, ended: float, contributed: bool = True) -> StepRecord:
        return StepRecord(step, began=0.0, ready=ready, ended=ended, contributed=contributed, caught_up=0)

    # The third rank is late for step 1 and, after it has caught up, does not count as the end of that update.
    ranks = [
        [record(0, 1.0, 2.0), record(1, 3.0, 5.0)],
        [record(0, 1.1, 2.1), record(1, 4.0, 5.5)],
        [record(0, 1.2, 2.2), record(1, 9.0, 9.5, contributed=False)],
    ]
    ((measured, ideal),) = against_ideal(ranks, required=2, last_s=0.5, steps=range(2))
    assert measured == pytest.approx(5.5 - 2.2)
    assert ideal == pytest.approx(4.0 - 2.2 + 0.5)


@pytest.mark.ranks(1)
def test_extra_wait_is_beyond_the_usual_step() -> None:
    from simulated_training import StepRecord
    from stopped_rank_perf import extra_waits

    ends = [1.0, 2.0, 3.0, 4.0, 5.3, 6.3]
    records = [StepRecord(i, end - (1.3 if i == 4 else 1.0), 0.0, end, True, 0) for i, end in enumerate(ends)]
    stops = [(4.1, 4.2)]
    assert extra_waits(records, stops, spans=stops) == [pytest.approx(0.3)]
    assert extra_waits(records, stops, spans=[(2.5, 2.6)]) == [pytest.approx(0.0)]


def test_recording_perf(tmp_path: Path) -> None:
    results, printed = quick_results("recording_perf", tmp_path)
    assert results["step_p50_ms"] > 50 and results["trace_bytes_per_update"] > 100
    assert "What recording costs" in printed


def test_plan_perf(tmp_path: Path) -> None:
    results, printed = quick_results("plan_perf", tmp_path)
    assert [r["backup_workers"] for r in results] == [0, 1, 2]
    assert all(0.5 < r["predicted_to_measured"] < 2 for r in results)
    assert "predicted / measured" in printed


def test_auto_perf(tmp_path: Path) -> None:
    results, printed = quick_results("auto_perf", tmp_path)
    assert [(r["case"], r["backup_workers"]) for r in results] == [
        (case, b) for case in ("stationary", "changing") for b in (0, 1, 2, "auto")
    ]
    for r in results:
        assert sum(r["updates_by_required"].values()) == 30
    assert "auto / best fixed" in printed


def test_horovod_perf(tmp_path: Path) -> None:
    results, printed = quick_results("horovod_perf", tmp_path)
    assert {(r["what"], r["contestant"]) for r in results} == {
        *((f"allreduce {size}", contestant) for size in (1024, 4096) for contestant in ("hvd_backup", "Horovod")),
        *(("step", contestant) for contestant in ("hvd_backup, b = 0", "hvd_backup, b = 1", "Horovod")),
    }
    for r in results:
        assert (r["time_to_horovod"] == 1.0) == (r["contestant"] == "Horovod")
    assert "time / Horovod" in printed


def test_tensorflow_perf(tmp_path: Path) -> None:
    results, printed = quick_results("tensorflow_perf", tmp_path)
    assert {r["what"] for r in results} == {"op 1024", "op 65536", "step", "fit"}
    fit = {r["contestant"]: r["p50_us"] for r in results if r["what"] == "fit"}
    assert fit["hvd_backup, b = 0, one rank late"] > 2 * fit["hvd_backup, b = 1, one rank late"]
    assert "fit: to nobody late" in printed


def test_gpu_perf_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    """And where there is one, measures."""
    import torch

    if torch.cuda.is_available():
        results, _ = quick_results("gpu_perf", tmp_path)
        assert all(r["verified"] for r in results["kernels"]) and len(results["steps"]) == 4
        return
    command = [sys.executable, str(BENCHMARKS / "gpu_perf.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert (
        done.stderr == "gpu_perf: PyTorch finds no GPU here (torch.cuda.is_available() is False), nothing to measure\n"
    )
