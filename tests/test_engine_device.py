"""The engine with gradients on a GPU: ranks as threads, and in the GPU's place one whose memory is the host's, whose
queue runs late, and whose groups exchange files (csrc/bindings/testing_device.cpp). Whoever uses its addresses without
it crashes. By MPI instead, groups exchange its memory through the transport.

Rank r contributes 2^r times an element's number, so a result names its contributors.
"""

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_backup import _core
from hvd_backup import _core_testing as testing
from hvd_backup.errors import UsageError
from tests.threads import spawn

ELEMENTS = 1003
NUMBERS = [np.arange(ELEMENTS + b, dtype=np.float32) % 61 for b in range(3)]


class DeviceStream:
    """One training channel of one rank, with three float32 buckets on its GPU and one float64 in host memory."""

    def __init__(self, engine: Any, required: int, device: Any, numbers: Any = NUMBERS, **options: Any) -> None:
        self.rank, self.device, self.numbers = engine.rank, device, numbers
        self.stream = testing.HostStream()
        self.channel = engine.open(
            "stream", "training", "the same", b"", required, wait_for_all=True, on_device=True, **options
        )
        layout = [(len(each), "float32") for each in numbers] + [(1, "float64")]
        self.channel.set_layout(layout, [0] * 4, [True] * 3 + [False])
        self.mine, self.device_results, self.sent, self.received = (
            [np.full(len(each), np.nan, np.float32) for each in numbers] for _ in range(4)
        )
        self.scalar, self.mean = np.zeros(1), np.zeros(1)
        self.channel.set_results([r.ctypes.data for r in [*self.received, self.mean]])
        self.channel.measure(3)
        self.applied: list[tuple[int, tuple[int, ...]]] = []
        self.direct = False  # the last update of this rank's own was summed on its GPU
        self.last = ""

    def step(self, pause: Callable[[], object] = lambda: None) -> None:
        """pause: called between the first bucket and the second."""
        sums = self.device.sums
        self.channel.begin(1.0, b"from %d" % self.rank)
        for bucket, numbers in enumerate(self.numbers):
            if bucket == 1:
                pause()
            self.mine[bucket][:] = np.nan  # until the caller's stream gets there
            place = self.mine[bucket].ctypes.data
            self.stream.write(place, (numbers * np.float32(2.0**self.rank)).tobytes())
            self.channel.submit_on_device(
                bucket,
                self.sent[bucket].ctypes.data,
                self.received[bucket].ctypes.data,
                place | testing.disguise,
                self.device_results[bucket].ctypes.data | testing.disguise,
                self.stream.address,
            )
        self.scalar[0] = 2.0**self.rank
        self.channel.submit(3, self.scalar.ctypes.data, self.mean.ctypes.data)
        if self.take():
            self.direct = self.device.sums > sums

    def paced_step(self) -> None:
        """Steps that take no time at all can't be caught up with."""
        time.sleep(0.003)
        self.step()

    def take(self) -> bool:
        """Takes updates until this rank's own, or until there is nothing more to take; each must be what it says.

        Returns whether it was its own.
        """
        while True:
            update = self.channel.wait()
            self.last = update.kind
            if update.kind != "update":
                return False
            ranks = update.contributors[0]
            mean = np.float32(sum(2.0**r for r in ranks)) * np.float32(1 / len(ranks))
            for result, numbers in zip(
                self.device_results if update.contributed else self.received, self.numbers, strict=True
            ):
                np.testing.assert_allclose(result, mean * numbers, rtol=1e-6)
                result[:] = np.nan
            assert self.mean[0] == pytest.approx(mean)
            self.applied.append((update.step, tuple(ranks)))
            if update.contributed:
                return True

    def leave(self) -> None:
        self.channel.leave()
        while self.last != "over":
            self.take()


def equal_histories(streams: list[DeviceStream]) -> list[tuple[int, tuple[int, ...]]]:
    """I1 at the end of a run."""
    for stream in streams[1:]:
        assert stream.applied == streams[0].applied
    assert [step for step, _ in streams[0].applied] == list(range(len(streams[0].applied)))
    return streams[0].applied


def devices(folder: Path, size: int, why_no_groups: str = "") -> list[Any]:
    return [testing.HostDevice(str(folder), rank + 1, why_no_groups) for rank in range(size)]


def until(condition: Callable[[], bool], step: Callable[[], None]) -> None:
    """Steps until it is true; not for ever."""
    deadline = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < deadline, "it has not become true"
        step()


def until_all_are_out_of_the_group(stream: DeviceStream, on: list[Any], out: set[int]) -> None:
    """Steps until each rank has had an update of its own from now on that was not summed on its GPU.

    out: one for all ranks, empty.
    """
    stream.direct = True

    def step() -> None:
        stream.paced_step()
        out.update(set() if stream.direct else {stream.rank})

    until(lambda: len(out) == len(on), step)


both_means = pytest.mark.parametrize("means", ["nccl", "mpi"])


def train(
    size: int,
    folder: Path,
    body: Callable[[DeviceStream, list[Any]], None],
    why_no_groups: str = "",
    trace: str = "",
    means: str = "nccl",
    journal_on_device: bool = False,
    **options: Any,
) -> Any:
    """Runs body(stream, all devices) on each rank, then leaves. Returns streams and devices."""
    on = devices(folder, size, why_no_groups)
    options = {"required": size - 1, "grace_us": 2000} | options

    def run(engine: Any) -> DeviceStream:
        device = on[engine.rank]
        engine.use_device(device, means, journal_on_device)
        stream = DeviceStream(engine, device=device, **options)
        body(stream, on)
        stream.leave()
        return stream

    return spawn(size, run, trace=trace, takes_device_memory=means == "mpi"), on


@both_means
@pytest.mark.parametrize("arrive", ["first", "last"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_gpus_exchange_data_directly_once_their_group_is_formed(
    size: int, arrive: str, means: str, tmp_path: Path
) -> None:
    def body(stream: DeviceStream, on: list[Any]) -> None:
        until(lambda: all(device.exchanges >= 20 for device in on), stream.step)

    streams, on = train(size, tmp_path, body, means=means, arrive=arrive)
    equal_histories(streams)
    assert all(device.sums >= 10 for device in on), "each was the sum of a shard"
    assert all((device.groups > 0) == (means == "nccl") for device in on)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("why_no_groups", ["", "there is no NCCL"])
def test_squared_norms_of_what_gpus_have_exchanged_are_put_on_record(
    automatic: bool, why_no_groups: str, tmp_path: Path
) -> None:
    """Those of the contributions and of their mean, over all ranks' shards: the same as through host memory."""

    def body(stream: DeviceStream, on: list[Any]) -> None:
        if why_no_groups:
            for _ in range(10):
                stream.step()
        else:
            until(lambda: all(device.sums >= 30 for device in on), stream.step)

    trace = tmp_path / "trace.jsonl"
    streams, on = train(3, tmp_path, body, why_no_groups, str(trace), automatic=automatic)
    steps = len(equal_histories(streams))
    assert not why_no_groups or not any(device.sums for device in on)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    final = [line for line in lines if line.get("event") == "final"]
    assert len(final) == steps
    numbers = sum(float((each.astype(np.float64) ** 2).sum()) for each in NUMBERS)
    for line, (_, ranks) in zip(final, streams[0].applied, strict=True):
        mean = sum(2.0**r for r in ranks) / len(ranks)
        assert line["contribution_squares"] == pytest.approx(sum(4.0**r for r in ranks) * numbers, rel=1e-5)
        assert line["mean_squares"] == pytest.approx(mean**2 * numbers, rel=1e-5)


def test_norms_are_there_once_the_sum_has_run(tmp_path: Path) -> None:
    (device,) = devices(tmp_path, 1)
    for count in (1, 0, 1000):
        sources = [np.full(count, value) for value in (3.0, 5.0)]
        addresses = [array.ctypes.data for array in sources]
        norms = testing.measured_sum_on(device.address, "float64", addresses[1], addresses, [1.0, 1.0], 0.5, count)
        assert norms == (34.0 * count, 16.0 * count)


def test_without_groups_gradients_go_through_host_memory(tmp_path: Path) -> None:
    def body(stream: DeviceStream, on: list[Any]) -> None:
        until(lambda: all(device.copies > 0 for device in on), stream.paced_step)
        for _ in range(10):
            stream.step()

    streams, on = train(3, tmp_path, body, why_no_groups="there is no NCCL")
    equal_histories(streams)
    assert all(device.groups == device.exchanges == 0 for device in on)


def miss_some() -> Callable[[DeviceStream, list[Any]], None]:
    """Of four ranks the last one is late by many updates, once."""
    gone_by, back = threading.Event(), threading.Event()

    def body(stream: DeviceStream, on: list[Any]) -> None:
        until(lambda: all(device.exchanges >= 6 for device in on), stream.step)
        if stream.rank == 3:
            gone_by.wait(50)
            before = len(stream.applied)
            stream.step()
            assert len(stream.applied) >= before + 10
            back.set()
        elif stream.rank == 0:
            for _ in range(12):
                stream.step()
            gone_by.set()

        until(back.is_set, stream.paced_step)

    return body


@both_means
def test_i1_a_late_rank_fetches_what_gpus_have_exchanged_from_host_memory(means: str, tmp_path: Path) -> None:
    streams, on = train(4, tmp_path, miss_some(), means=means)
    equal_histories(streams)
    assert all(device.host_places and not device.reads for device in on)


@both_means
@pytest.mark.parametrize("elements", [ELEMENTS, pytest.param(800_000, id="megabytes")])  # a shard is read in pieces
def test_i1_a_late_rank_fetches_what_gpus_have_exchanged_from_their_memory(
    elements: int, means: str, tmp_path: Path
) -> None:
    numbers = [np.arange(elements, dtype=np.float32) % 61, *NUMBERS[1:]]
    streams, on = train(4, tmp_path, miss_some(), means=means, journal_on_device=True, numbers=numbers)
    equal_histories(streams)
    assert sum(device.reads for device in on[:3]) > 0
    assert all(device.host_places == 1 for device in on), "what is read goes through it"


def test_what_the_gpu_has_no_memory_for_is_kept_in_host_memory(tmp_path: Path) -> None:
    body, limited = miss_some(), 10

    def with_little_memory(stream: DeviceStream, on: list[Any]) -> None:
        stream.device.most_queue_memory = limited
        body(stream, on)
        assert stream.device.in_queue_memory <= limited

    streams, on = train(4, tmp_path, with_little_memory, journal_on_device=True)
    equal_histories(streams)
    assert any(device.host_places > 1 for device in on)


def test_what_is_kept_in_host_memory_holds_up_no_exchange(tmp_path: Path) -> None:
    """All buckets are exchanged though nothing of it has gone to the host; the update waits for that."""
    seen: set[int] = set()

    def body(stream: DeviceStream, on: list[Any]) -> None:
        device = stream.device

        def step() -> None:
            ended = threading.Event()

            def hold() -> None:
                while not ended.is_set():
                    if device.beside == 6 and device.in_queue == 0:  # two shards of three buckets
                        seen.add(stream.rank)
                        break
                    time.sleep(0.001)
                device.holds_beside = False

            device.holds_beside = True
            holding = threading.Thread(target=hold)
            holding.start()
            stream.step()
            ended.set()
            holding.join()

        until(lambda: len(seen) == 2, step)

    streams, _ = train(2, tmp_path, body, required=1, grace_us=1_000_000)
    equal_histories(streams)


def test_what_everybody_has_is_kept_no_longer(tmp_path: Path) -> None:
    most = [0, 0]

    def body(stream: DeviceStream, on: list[Any]) -> None:
        def step() -> None:
            stream.step()
            most[stream.rank] = max(most[stream.rank], stream.device.in_queue_memory)

        until(lambda: all(device.exchanges >= 60 for device in on), step)

    streams, _ = train(2, tmp_path, body, journal_on_device=True, required=1, grace_us=1_000_000)
    equal_histories(streams)
    assert 0 < max(most) <= 5 * 2 * 3, "of some steps: two shards of three buckets each"


@both_means
def test_a_group_that_fails_is_left_and_its_attempts_are_begun_anew_through_host_memory(
    means: str, tmp_path: Path
) -> None:
    out: set[int] = set()

    def body(stream: DeviceStream, on: list[Any]) -> None:
        if stream.rank == 1:
            stream.device.failing_exchange = 7
        until(lambda: on[1].exchanges >= 7, stream.step)
        until_all_are_out_of_the_group(stream, on, out)
        for _ in range(5):
            stream.step()

    streams, on = train(3, tmp_path, body, means=means)
    equal_histories(streams)
    assert 7 <= on[1].exchanges <= 9, "after three failures no group is formed again"
    assert means == "mpi" or all(device.aborts for device in (on[0], on[2]))


@both_means
def test_a_gpu_that_is_full_leaves_its_group(means: str, tmp_path: Path) -> None:
    """Of what is trained: so there is no memory to sum in, nor page-locked memory. The training goes on."""
    out: set[int] = set()

    def body(stream: DeviceStream, on: list[Any]) -> None:
        until(lambda: all(device.sums >= 10 for device in on), stream.step)
        on[1].is_full = True
        until(lambda: on[1].refused > 0, stream.step)
        until_all_are_out_of_the_group(stream, on, out)
        for _ in range(5):
            stream.step()

    streams, _ = train(3, tmp_path, body, means=means)
    equal_histories(streams)


@both_means
def test_i4_a_contributor_that_stops_amid_its_backward_pass_is_replaced_and_its_group_aborted(
    means: str, tmp_path: Path
) -> None:
    gone_by, back = threading.Event(), threading.Event()
    in_group: set[int] = set()

    def body(stream: DeviceStream, on: list[Any]) -> None:
        def step() -> None:
            stream.step()
            in_group.update({stream.rank} if stream.direct else {})

        until(lambda: len(in_group) == 3, step)
        while stream.rank == 2 and not gone_by.is_set():  # until it is taken as a contributor
            stream.step(pause=lambda: gone_by.wait(1))
        until(lambda: not stream.direct, stream.step)
        for _ in range(5):
            stream.step()
        (back if stream.rank == 2 else gone_by).set()
        until(lambda: back.is_set() and not any(device.in_use for device in on), stream.step)
        for _ in range(5):
            stream.step()

    streams, on = train(3, tmp_path, body, means=means)
    equal_histories(streams)
    if means == "nccl":
        assert all(device.aborts for device in on)


@both_means
@pytest.mark.parametrize("journal_on_device", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_i1_under_random_delays_and_drops(seed: int, journal_on_device: bool, means: str, tmp_path: Path) -> None:
    def body(stream: DeviceStream, on: list[Any]) -> None:
        chance = random.Random(seed * 10 + stream.rank)
        for _ in range(60):
            if chance.random() < 0.2:
                time.sleep(chance.random() * 0.02)
            stream.step()

    streams, _ = train(4, tmp_path, body, means=means, required=2, journal_on_device=journal_on_device)
    equal_histories(streams)


def test_a_channel_on_the_gpu_needs_one() -> None:
    hub = _core.Hub(1)
    engine = _core.Engine.in_process(hub, 0)
    with pytest.raises(UsageError, match="has buckets on a GPU, but none is in use"):
        engine.open("it", "training", "", b"", 1, on_device=True)
    engine.shutdown()


def test_what_does_not_fit_the_layout_is_an_error(tmp_path: Path) -> None:
    hub = _core.Hub(1)
    engine = _core.Engine.in_process(hub, 0)
    (device,) = devices(tmp_path, 1)
    with pytest.raises(UsageError, match="by 'nccl' or 'mpi', given 'gloo'"):
        engine.use_device(device, "gloo")
    assert not engine.takes_device_memory
    with pytest.raises(UsageError, match="MPI: it does not take GPU memory on all ranks"):
        engine.use_device(device, "mpi")
    engine.use_device(device)
    with pytest.raises(UsageError, match="uses a GPU already"):
        engine.use_device(device)
    channel = engine.open("it", "training", "", b"", 1, on_device=True)
    with pytest.raises(UsageError, match="integers on the GPU"):
        channel.set_layout([(1, "int64")], [0], [True])
    engine.shutdown()
