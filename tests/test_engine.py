"""The engine end to end, ranks as threads on the in-process transport: real messages, transfers, journals and clocks.

Rank r contributes 2^r, so a result names its contributors. Waiting is by events, never by luck: a rank that must be
late waits until the others have gone by.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_backup import _core
from tests.threads import run_threads, spawn

ELEMENTS = 1003


class Stream:
    """One training channel of one rank, with as many float32 buckets as asked for."""

    def __init__(
        self,
        engine: Any,
        required: int,
        *,
        buckets: int = 1,
        scope: str = "step",
        elements: int = ELEMENTS,
        **options: Any,
    ) -> None:
        self.rank = engine.rank
        self.channel = engine.open("stream", "training", "the same", b"", required, wait_for_all=True, **options)
        self.channel.set_layout(
            [(elements + b, "float32") for b in range(buckets)],
            list(range(buckets)) if scope == "bucket" else [0] * buckets,
        )
        self.mine = [np.full(elements + b, 2.0**self.rank, np.float32) for b in range(buckets)]
        self.results = [np.zeros_like(mine) for mine in self.mine]
        self.channel.set_results([result.ctypes.data for result in self.results])
        self.applied: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
        self.last = ""

    def submit(self, bucket: int) -> None:
        self.channel.submit(bucket, self.mine[bucket].ctypes.data, self.results[bucket].ctypes.data)

    def step(self) -> None:
        self.channel.begin(1.0, b"from %d" % self.rank)
        for bucket in range(len(self.mine)):
            self.submit(bucket)
        self.take()

    def take(self) -> None:
        """Takes updates until this rank's own, or until there is nothing more to take; each must be what it says."""
        while True:
            update = self.channel.wait()
            self.last = update.kind
            if update.kind != "update":
                return
            scopes = update.contributors if len(update.contributors) > 1 else update.contributors * len(self.mine)
            for result, ranks in zip(self.results, scopes, strict=True):
                np.testing.assert_array_equal(
                    result, np.float32(sum(2.0**r for r in ranks)) * np.float32(1 / len(ranks))
                )
            assert update.metadata == b"from %d" % update.contributors[0][0]
            assert update.samples == len(update.contributors[0])
            self.applied.append((update.step, tuple(tuple(ranks) for ranks in update.contributors)))
            if update.contributed:
                return


def equal_histories(streams: list[Stream]) -> list[Any]:
    """I1 at the end of a run: the same updates everywhere. Returns them."""
    for stream in streams[1:]:
        assert stream.applied == streams[0].applied
    assert [step for step, _ in streams[0].applied] == list(range(len(streams[0].applied)))
    return streams[0].applied


@pytest.mark.parametrize("scope", ["step", "bucket"])
@pytest.mark.parametrize("arrive", ["first", "last"])
def test_i1_a_late_rank_applies_what_it_missed_and_goes_on_with_the_newest(scope: str, arrive: str) -> None:
    gone_by = threading.Event()
    back = threading.Event()

    def body(engine: Any) -> Stream:
        stream = Stream(engine, 3, buckets=3, scope=scope, arrive=arrive, max_lag=64)
        if engine.rank == 3:
            gone_by.wait(30)
            stream.step()
            assert stream.last == "resume"
            assert len(stream.applied) >= 20
            assert stream.channel.counters() == {
                "contributed": 0,
                "dropped": 1,
                "caught_up": len(stream.applied),
                "resynced": 0,
            }
            back.set()
        else:
            for _ in range(20):
                stream.step()
            gone_by.set()
        while not back.is_set():
            time.sleep(0.003)  # steps that take no time at all can't be caught up with
            stream.step()
        stream.channel.leave()
        stream.take()
        assert stream.last == "over"
        return stream

    applied = equal_histories(spawn(4, body))
    assert all(set(scopes) == {(0, 1, 2)} for _, scopes in applied[:20])


def test_the_kth_call_is_the_kth_collective() -> None:
    gone_by = threading.Event()

    def body(engine: Any) -> list[tuple[int, ...]]:
        channel = engine.open("sum", "collective", "", b"", 2, average=False)
        channel.set_layout([(5, "int64")], [0])
        seen = []
        for k in range(10):
            if engine.rank == 2 and k == 2:
                gone_by.wait(30)
            mine, result = np.full(5, 2**engine.rank * (k + 1), np.int64), np.zeros(5, np.int64)
            channel.begin(1.0, b"")
            channel.submit(0, mine.ctypes.data, result.ctypes.data)
            update = channel.wait()
            (ranks,) = update.contributors
            np.testing.assert_array_equal(result, (k + 1) * sum(2**r for r in ranks))
            assert update.contributed == (engine.rank in ranks)
            seen.append(tuple(ranks))
        if engine.rank == 0:
            gone_by.set()
        return seen

    seen = spawn(3, body)
    assert seen[0] == seen[1] == seen[2]
    assert all(ranks == (0, 1) for ranks in seen[0][2:])


def in_the_middle_of_step_3(engine: Any, handed_over: threading.Event) -> Stream:
    """After three updates of N = 3; rank 1 has handed over the first of its three buckets for the next one."""
    stream = Stream(engine, 3, buckets=3)
    while stream.channel.step < 3:
        stream.step()
    if engine.rank == 1:
        stream.channel.begin(1.0, b"from 1")
        stream.submit(0)
        handed_over.set()
    return stream


@pytest.mark.parametrize("decided", [True, False])
def test_i6_a_rank_that_fails_in_the_middle_of_its_contribution_is_replaced(decided: bool, tmp_path: Path) -> None:
    """With arrive="first" the others may have begun to reduce what the rank will never complete."""
    handed_over = threading.Event()
    trace = tmp_path / "trace.jsonl"

    def body(engine: Any) -> Stream | None:
        stream = in_the_middle_of_step_3(engine, handed_over)
        if engine.rank == 1:
            if decided:
                wait_for_line(trace, lambda line: line["event"] == "decision" and line["step"] == 3)
            raise ZeroDivisionError("in the middle of backward")
        handed_over.wait(30)
        if not decided and engine.rank == 0:
            wait_for_line(trace, lambda line: line["event"] == "gone")
        if decided and engine.rank == 3:  # so that rank 1 is needed
            wait_for_line(trace, lambda line: line["event"] == "decision" and line["step"] == 3)
        for _ in range(5):
            stream.step()
        stream.channel.leave()
        stream.take()
        return stream

    values = collect_despite_one_failure(4, body, ZeroDivisionError, str(trace))
    equal_histories([values[rank] for rank in (0, 2, 3)])
    lines = read_trace(trace)
    assert not any(1 in line["ranks"] for line in lines if line["event"] == "decision" and line["step"] > 3)
    if decided:
        (replaced,) = [line for line in lines if line["event"] == "replaced"]
        assert (replaced["ranks"], replaced["attempt"]) == ([1], 1)


def test_i4_a_contributor_that_turns_slow_is_replaced_by_who_has_arrived_since(tmp_path: Path) -> None:
    """With arrive="first" rank 1 is in the decision with its first bucket, and has not finished the others."""
    arrived = threading.Event()
    trace = tmp_path / "trace.jsonl"

    def body(engine: Any) -> Stream:
        stream = in_the_middle_of_step_3(engine, arrived)
        if engine.rank == 1:
            wait_for_line(trace, lambda line: line["event"] == "final" and line["step"] == 3)
            stream.submit(1)
            stream.submit(2)
            stream.take()
        arrived.wait(30)
        if engine.rank == 3:
            wait_for_line(trace, lambda line: line["event"] == "decision" and line["step"] == 3)
        for _ in range(3):
            stream.step()
        stream.channel.leave()
        stream.take()
        return stream

    equal_histories(spawn(4, body, trace=str(trace)))
    lines = [line for line in read_trace(trace) if line.get("step") == 3]
    (replaced,) = [line for line in lines if line["event"] == "replaced"]
    assert replaced["ranks"] == [1] and "rank 1 is still computing its gradient" in replaced["reason"]
    first, second = [line for line in lines if line["event"] == "decision"]
    assert (first["ranks"], second["ranks"], second["attempt"]) == ([0, 1, 2], [0, 2, 3], 1)
    assert [line["ranks"] for line in lines if line["event"] == "dropped"] == [[1]]


def test_a_channel_that_fails_before_an_update_is_final_gives_it_to_nobody() -> None:
    """And nobody waits for it."""
    begun, failed = threading.Event(), threading.Event()

    def body(engine: Any) -> None:
        stream = Stream(engine, 2, buckets=2)
        if engine.rank == 2:
            begun.wait(30)
            stream.channel.begin_round(5, align_every=2)
        else:
            stream.channel.begin_round(5, align_every=0)
            stream.channel.begin(1.0, b"from %d" % engine.rank)
            stream.submit(0)
        if engine.rank == 0:
            stream.submit(1)
            threading.Timer(0.2, begun.set).start()  # it has begun to sum with rank 1, which does not go on
            with pytest.raises(_core.CoreError, match="align_every"):
                stream.take()
            failed.set()
        failed.wait(30)

    spawn(3, body)


def test_with_no_backup_workers_a_rank_that_fails_ends_the_others_with_its_reason() -> None:
    def body(engine: Any) -> str:
        stream = Stream(engine, 3)
        stream.step()
        if engine.rank == 2:
            raise ZeroDivisionError("boom")
        with pytest.raises(_core.CoreError, match=r"rank 2 has left at step 1 \(ZeroDivisionError: boom\)") as caught:
            for _ in range(3):
                stream.step()
        return str(caught.value)

    values = collect_despite_one_failure(3, body, ZeroDivisionError)
    assert values[0] == values[1]


def test_i5_the_journal_holds_max_lag_updates_and_the_others_wait_at_the_bound(capfd: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"

    def body(engine: Any) -> Stream:
        stream = Stream(engine, 2, max_lag=4)
        per_update = 2 * 512 * 4  # of two contributors, each keeps both shards of 1003 float32, at most
        if engine.rank == 2:
            wait_for_line(trace, lambda line: line["event"] == "held")
            held = [line for line in read_trace(trace) if line["event"] == "held"]
            assert held[0]["ranks"] == [2]
            assert held[0]["step"] == 4
            stream.step()
            assert [step for step, _ in stream.applied[:4]] == [0, 1, 2, 3]
        while len(stream.applied) < 12:
            stream.step()
            assert stream.channel.journal_bytes() <= 4 * per_update
        stream.channel.leave()
        stream.take()
        return stream

    equal_histories(spawn(3, body, trace=str(trace)))
    assert "rank 2 is 4 updates behind" in capfd.readouterr().err


@pytest.mark.parametrize("elements", [ELEMENTS, 100_003])  # goes with the arrival; is exchanged
@pytest.mark.parametrize("required", [2, 3])
def test_a_gradient_that_is_not_finite_is_in_no_sum(required: int, elements: int) -> None:
    def body(engine: Any) -> Stream:
        stream = Stream(engine, required, elements=elements, arrive="last", drop_nonfinite=True)
        stream.channel.measure(1)
        while (step := stream.channel.step) < 4:
            stream.mine[0][-1] = np.nan if engine.rank == step or step == 3 else 2.0**engine.rank
            stream.step()
        assert len(stream.applied) == 3, "the last step is over, without an update"
        assert stream.channel.counters()["dropped"] >= (2 if required == 3 else 1)
        return stream

    applied = equal_histories(spawn(3, body))
    for step, (ranks,) in applied:
        assert step not in ranks and len(ranks) >= min(required, 2)


def test_nothing_is_kept_when_nobody_is_missing() -> None:
    def body(engine: Any) -> int:
        stream = Stream(engine, engine.size)
        for _ in range(5):
            stream.step()
        return int(stream.channel.journal_bytes())

    assert spawn(3, body) == [0, 0, 0]


@pytest.mark.parametrize("known", [True, False])
def test_i6_uneven_rounds_end_at_one_step(known: bool) -> None:
    def body(engine: Any) -> Stream:
        stream = Stream(engine, 2)
        for _ in range(3):  # epochs
            start = len(stream.applied)
            length = 3 + 2 * engine.rank
            stream.channel.begin_round(length if known else -1, 0)
            stream.take()
            while stream.last != "over" and stream.channel.step - start < length:
                stream.step()
            stream.channel.away()
            while stream.last != "over":
                stream.take()
            stream.channel.leave()
            stream.take()
            if known:
                assert len(stream.applied) - start == 7
        return stream

    equal_histories(spawn(3, body))


def test_different_descriptions_are_an_error_on_every_rank() -> None:
    def body(engine: Any) -> str:
        lines = ["weight float32 [3, 4]", "bias float32 [4]" if engine.rank != 2 else "bias float64 [4]"]
        with pytest.raises(_core.CoreError) as caught:
            engine.open("stream", "training", "\n".join(lines), b"", 2, wait_for_all=True)
        return str(caught.value)

    values = spawn(3, body)
    assert len(set(values)) == 1
    assert "line 2" in values[0] and "rank 2" in values[0] and "bias float64 [4]" in values[0]


def test_wrong_calls_are_told_and_change_nothing() -> None:
    def body(engine: Any) -> None:
        with pytest.raises(_core.CoreUsageError, match="requires 3 contributors: give 1 to 2"):
            engine.open("much", "training", "", b"", 3)
        stream = Stream(engine, 2)
        with pytest.raises(_core.CoreUsageError, match=r"submit\(\) before begin\(\)"):
            stream.submit(0)
        stream.channel.begin(1.0, b"from %d" % engine.rank)
        with pytest.raises(_core.CoreUsageError, match="bucket 0 was not submitted"):
            stream.channel.wait()
        with pytest.raises(_core.CoreUsageError, match="there is no bucket 1"):
            stream.channel.submit(1, 0, 0)
        stream.submit(0)
        with pytest.raises(_core.CoreUsageError, match="bucket 0 was submitted before"):
            stream.submit(0)
        with pytest.raises(_core.CoreUsageError, match="is open already"):
            engine.open("stream", "training", "the same", b"", 2)
        stream.take()
        assert stream.applied == [(0, ((0, 1),))]

    spawn(2, body)


def test_a_joined_rank_is_not_waited_for_and_all_learn_who_joined_last() -> None:
    def body(engine: Any) -> tuple[list[int], int]:
        mine, result = np.full(1, 2.0**engine.rank), np.zeros(1)

        def contributors(name: str) -> list[int]:
            channel = engine.open(name, "collective", "", b"", engine.size, average=False)
            channel.set_layout([(1, "float64")], [0])
            channel.begin(1.0, b"")
            channel.submit(0, mine.ctypes.data, result.ctypes.data)
            (ranks,) = channel.wait().contributors
            assert result[0] == sum(2.0**r for r in ranks)
            return list(ranks)

        assert contributors("before") == [0, 1, 2]
        seen = [] if engine.rank != 1 else contributors("while the others have joined")
        engine.join()
        last = engine.joined()
        assert contributors("after") == [0, 1, 2]
        return seen, last

    values = spawn(3, body)
    assert values[1][0] == [1]
    assert [last for _, last in values] == [1, 1, 1]


def wait_for_line(trace: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    for _ in range(3000):
        if any(wanted(line) for line in read_trace(trace)):
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"the trace never showed it: {trace.read_text()}")


def read_trace(trace: Path) -> list[dict[str, Any]]:
    text = trace.read_text() if trace.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def collect_despite_one_failure(
    size: int, body: Callable[[Any], Any], expected: type[Exception], trace: str = ""
) -> dict[int, Any]:
    """Like spawn, for a body that raises `expected` on one rank: the values of the others."""
    hub = _core.Hub(size)
    values: dict[int, Any] = {}

    def run(rank: int) -> None:
        engine = _core.Engine.in_process(hub, rank, trace)
        try:
            values[rank] = body(engine)
        except expected as error:
            engine.shutdown(f"{type(error).__name__}: {error}")
        except BaseException as error:
            engine.shutdown(f"{type(error).__name__}: {error}")
            raise
        else:
            engine.shutdown()

    run_threads(size, run)
    return values
