"""A rank beyond the journal takes over another one's state through the engine: ranks as threads of one process.

The "weights" of a rank are the list of its updates, followed by so much ballast that they travel in several pieces.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_backup import _core
from tests.test_engine import read_trace, wait_for_line
from tests.threads import spawn

BALLAST = np.arange(11 << 20, dtype=np.uint8)  # two whole pieces and a part
LAG = 3


class Trainee:
    """One channel of one rank, with one float32 bucket."""

    def __init__(self, engine: Any, required: int, name: str = "stream", max_lag: int = LAG) -> None:
        self.rank = engine.rank
        options: dict[str, Any] = {"wait_for_all": True, "max_lag": max_lag, "resync": True}
        self.channel = engine.open(name, "training", "the same", b"", required, **options)
        self.channel.set_layout([(1000, "float32")], [0])
        self.mine = np.full(1000, 2.0**self.rank, np.float32)
        self.result = np.zeros_like(self.mine)
        self.channel.set_results([self.result.ctypes.data])
        self.weights = np.zeros(0)
        self.served = self.taken_over = 0
        self.others: list[Trainee] = [self]

    def step(self) -> None:
        self.channel.begin(1.0, b"")
        self.channel.submit(0, self.mine.ctypes.data, self.result.ctypes.data)
        self.take()

    def take(self) -> str:
        while True:
            update = self.channel.wait()
            if update.kind == "offer":
                for other in self.others:
                    other.serve()
            elif update.kind == "resync":
                self.take_over(update)
            elif update.kind == "update":
                assert update.step == len(self.weights)
                self.weights = np.append(self.weights, self.result[0])
                if update.contributed:
                    return "update"
            else:
                return str(update.kind)

    def serve(self) -> None:
        if self.channel.state_wanted:
            parts = [self.weights, np.zeros(0), BALLAST]
            self.channel.offer_state([(part.ctypes.data, part.nbytes) for part in parts])
            self.served += 1

    def take_over(self, update: Any) -> None:
        address, size = self.channel.state()
        state = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * size).from_address(address))
        np.testing.assert_array_equal(state[-len(BALLAST) :], BALLAST)
        self.weights = state[: -len(BALLAST)].copy().view(np.float64)
        assert len(self.weights) == update.step == self.channel.step
        self.taken_over += 1


def equal(trainees: list[Trainee]) -> None:
    for trainee in trainees[1:]:
        np.testing.assert_array_equal(trainee.weights, trainees[0].weights)


def test_i4_a_rank_that_is_far_behind_holds_nobody_up(capfd: Any, tmp_path: Path) -> None:
    trace, away = tmp_path / "trace.jsonl", threading.Event()

    def body(engine: Any) -> Trainee:
        trainee = Trainee(engine, 2)
        if engine.rank == 2:
            away.wait(30)
        else:
            while len(trainee.weights) < 20:
                trainee.step()
            away.set()
        while len(trainee.weights) < 200:
            trainee.step()
            assert trainee.channel.journal_bytes() <= 2 * LAG * 4096
        trainee.channel.leave()
        trainee.take()
        return trainee

    trainees = spawn(3, body, trace=str(trace))
    equal(trainees)
    assert trainees[2].taken_over >= 1 and trainees[0].served + trainees[1].served >= 1
    counters = trainees[2].channel.counters()
    assert counters["resynced"] > LAG
    assert counters["contributed"] + counters["caught_up"] + counters["resynced"] == len(trainees[2].weights)
    events = [line["event"] for line in read_trace(trace)]
    assert "beyond" in events and "resynced" in events and "held" not in events[: events.index("resynced")]
    told = capfd.readouterr().err
    assert "rank 2 is 3 updates behind" in told or "updates behind" in told
    assert "rank 2 has taken over the state of rank" in told


def test_i6_the_state_is_there_when_the_others_have_left(tmp_path: Path) -> None:
    """They have been asked for it before their round was over; then they wait for the rank that is behind."""
    left, trace = threading.Barrier(3, timeout=60), tmp_path / "trace.jsonl"

    def body(engine: Any) -> Trainee:
        trainee = Trainee(engine, 2)
        if engine.rank == 2:
            wait_for_line(trace, lambda line: line["event"] == "round_over")
            while trainee.take() != "over":
                pass
        else:
            while len(trainee.weights) < 20:
                trainee.step()
            trainee.channel.leave()
            while trainee.take() != "over":
                pass
        left.wait()
        return trainee

    trainees = spawn(3, body, trace=str(trace))
    equal(trainees)
    assert trainees[2].taken_over == 1


def test_a_thread_that_waits_elsewhere_is_asked_there(tmp_path: Path) -> None:
    """Two channels, as of a GAN: the others wait in the second one for the rank that is behind in the first one."""
    trace, away = tmp_path / "trace.jsonl", threading.Event()

    def body(engine: Any) -> list[Trainee]:
        first, second = Trainee(engine, 2, "first"), Trainee(engine, 3, "second")
        first.others = second.others = [first, second]
        if engine.rank == 2:
            away.wait(30)
        else:
            while len(first.weights) < 20:
                first.step()
            away.set()
            second.step()
        if engine.rank == 2:
            while len(first.weights) < 20:
                first.take()
            second.step()
        return [first, second]

    both = spawn(3, body, trace=str(trace))
    for trainees in zip(*both, strict=True):
        equal(list(trainees))
    assert both[2][0].taken_over >= 1


def test_nobody_is_left_to_take_over_from() -> None:
    gone = threading.Event()

    def body(engine: Any) -> str:
        trainee = Trainee(engine, 1)
        if engine.rank == 0:
            while len(trainee.weights) < 20:
                trainee.step()
            gone.set()
            return ""
        gone.wait(30)
        with pytest.raises(_core.CoreError, match="no rank is left whose state it could take over") as caught:
            while True:
                trainee.step()
        return str(caught.value)

    spawn(2, body)


def test_state_is_there_only_when_it_was_said() -> None:
    def body(engine: Any) -> None:
        trainee = Trainee(engine, 1)
        with pytest.raises(_core.CoreUsageError, match="there is no state to take over"):
            trainee.channel.state()

    spawn(1, body)
