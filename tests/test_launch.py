"""The test harness itself: values come back by rank, and whoever fails is named, with where and why."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import launch
from tests.launch import process_state, run_ranks, start_ranks
from tests.rank_main import launched_rank, mark
from tests.threads import run_threads, spawn


def times_ten(offset: int, scale: int = 10) -> int:
    return launched_rank() * scale + offset


def numbers_over_mpi() -> list[int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.allgather(MPI.COMM_WORLD.Get_rank())


def fail_on(rank: int) -> None:
    if launched_rank() == rank:
        print("about to fail")
        raise ValueError("the answer is 42")


def fail_to_count() -> None:
    seen = 3
    assert seen == 4


def crash_on(rank: int) -> None:
    if launched_rank() == rank:
        ctypes.string_at(0)


def hang_on(rank: int) -> str:
    if launched_rank() == rank:
        wait_for_godot()
    return "done"


def wait_for_godot() -> None:
    mark("hanging")
    time.sleep(600)


def hang_at_exit() -> None:
    import atexit

    if launched_rank() == 1:
        atexit.register(wait_for_godot)


def beat() -> int:
    mark("started", {"pid": os.getpid()})
    time.sleep(0.3)
    return os.getpid()


def settings() -> tuple[str | None, str | None]:
    return os.environ.get("HVD_BACKUP_TRACE"), os.environ.get("HVD_BACKUP_GRACE")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_come_back_by_rank(size: int) -> None:
    assert run_ranks(size, times_ten, (7,)) == [rank * 10 + 7 for rank in range(size)]
    assert run_ranks(size, times_ten, (7,), kwargs={"scale": 2}) == [rank * 2 + 7 for rank in range(size)]


def test_ranks_are_one_mpi_job() -> None:
    assert run_ranks(3, numbers_over_mpi) == [[0, 1, 2]] * 3


def test_scripts_and_source_get_arguments_and_give_results(tmp_path: Path) -> None:
    source = """
        import sys
        assert __name__ == "__main__"
        result = sys.argv[1:]
    """
    assert run_ranks(2, source, (1, "two")) == [["1", "two"]] * 2
    path = tmp_path / "script.py"
    path.write_text("import neighbour\nresult = neighbour.value")
    (tmp_path / "neighbour.py").write_text("value = 5")
    assert run_ranks(1, path) == [5]


def test_the_rank_that_raises_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "AFTER_FAILURE_S", 2.0)
    with start_ranks(4, fail_on, (2,)) as job:
        outcome = job.wait()
    assert not outcome.ok
    assert outcome.ranks[2].state == "raised"
    assert "ValueError: the answer is 42" in outcome.ranks[2].error
    assert "in fail_on" in outcome.ranks[2].error
    assert outcome.ranks[2].exception.strip() == "ValueError: the answer is 42"
    assert "about to fail" in outcome.ranks[2].output
    with pytest.raises(AssertionError, match=r"=== rank 2: raised\n(.*\n)*.*the answer is 42"):
        outcome.values()
    assert outcome.describe().count("the answer is 42") == 2, "the line and the exception, and not all of it twice"


def test_a_failed_assert_shows_its_variables() -> None:
    with pytest.raises(AssertionError, match="seen = 3"):
        run_ranks(1, fail_to_count)


def test_a_native_crash_names_rank_and_line() -> None:
    with start_ranks(2, crash_on, (1,)) as job:
        outcome = job.wait()
    assert outcome.ranks[1].state == "died"
    assert "Segmentation fault" in outcome.ranks[1].output
    assert "in crash_on" in outcome.ranks[1].output


def test_the_rank_that_hangs_is_named_with_where() -> None:
    with start_ranks(2, hang_on, (1,), timeout_s=4.0) as job:
        pid = job.pid(1)
        outcome = job.wait()
    assert outcome.ranks[1].state == "hung"
    assert "in wait_for_godot" in outcome.ranks[1].output
    assert "still running at the time limit of 4 s" in outcome.describe()
    assert outcome.ranks[0].state in ("returned", "hung at exit")
    assert process_state(pid) in ("", "Z"), "the watchdog leaves no process behind"


def test_a_hang_after_the_body_is_told_apart() -> None:
    with start_ranks(2, hang_at_exit, timeout_s=4.0) as job:
        outcome = job.wait()
    assert outcome.ranks[1].state == "hung at exit"
    assert "in wait_for_godot" in outcome.ranks[1].output


def test_marks_stop_and_resume() -> None:
    with start_ranks(2, beat) as job:
        pid = job.wait_for_mark(1, "started")["pid"]
        assert pid == job.pid(1)
        job.stop(1)
        deadline = time.monotonic() + 5
        while process_state(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(pid) == "T"
        job.resume(1)
        assert job.wait().values()[1] == pid


def test_a_stopped_rank_is_named_and_ended() -> None:
    with start_ranks(2, hang_on, (1,), timeout_s=4.0) as job:
        job.wait_for_mark(1, "hanging")
        job.stop(1)
        pid = job.pid(1)
        assert job.wait().ranks[1].state == "stopped"
    assert process_state(pid) in ("", "Z")


def test_a_mark_that_never_comes_fails_with_the_ranks_output() -> None:
    with start_ranks(1, fail_on, (0,)) as job, pytest.raises(AssertionError, match="the answer is 42"):
        job.wait_for_mark(0, "no such mark")


def test_the_developers_own_settings_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BACKUP_TRACE", "mine.jsonl")
    assert run_ranks(1, settings, env={"HVD_BACKUP_GRACE": "5"}) == [(None, "5")]


def test_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match="module-level function"):
        start_ranks(1, lambda: None)


def test_leaving_the_context_ends_the_job() -> None:
    with start_ranks(2, hang_on, (0,)) as job:
        pid = job.pid(0)
        job.wait_for_mark(0, "hanging")
    assert process_state(pid) in ("", "Z")


@pytest.mark.ranks(1, 2)
def test_marked_bodies_run_in_every_rank(size: int, tmp_path: Path) -> None:
    from mpi4py import MPI

    assert MPI.COMM_WORLD.Get_size() == size
    assert "pytest" not in Path(sys.argv[0]).name
    (tmp_path / f"rank{launched_rank()}").touch()
    MPI.COMM_WORLD.Barrier()
    assert len(list(tmp_path.iterdir())) == size


def test_thread_ranks_return_raise_and_hang_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_threads(3, lambda rank: rank * rank) == [0, 1, 4]
    with pytest.raises(AssertionError, match=r"=== rank 1 raised\n(.*\n)*ZeroDivisionError"):
        run_threads(2, lambda rank: 1 // (1 - rank))
    monkeypatch.setattr("tests.threads.AFTER_FAILURE_S", 0.2)
    with pytest.raises(AssertionError, match=r"=== rank 0 hung(.*\n)*.*in <lambda>"):
        run_threads(1, lambda rank: time.sleep(3), timeout_s=0.3)


def test_spawned_engines_are_the_ranks_of_one_hub() -> None:
    assert spawn(3, lambda engine: (engine.rank, engine.size)) == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(AssertionError, match=r"=== rank 1 raised\n(.*\n)*ZeroDivisionError"):
        spawn(2, lambda engine: 1 // (1 - engine.rank))


def test_a_killed_rank_has_died() -> None:
    with start_ranks(2, hang_on, (1,)) as job:
        job.wait_for_mark(1, "hanging")
        job.kill(1)
        outcome = job.wait()
    assert outcome.ranks[1].state == "died"
    assert signal.SIGKILL.name in outcome.launcher_output or "signal 9" in outcome.launcher_output
