"""How NCCL is used (csrc/gpu/nccl.h), with a library in its place that checks the calls: tests/nccl_double.cpp.

Ranks are threads, and what NCCL would move between GPUs is host memory.
"""

import ctypes
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_backup import _core_testing as core
from tests.compiled import shared_library
from tests.threads import run_threads

VERSION = 22907


class Double:
    """The library in NCCL's place."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.nccl_double_wrong_use.restype = ctypes.c_char_p

    def begin(self, *, version: int = VERSION, fault: str = "") -> None:
        """Forgets what was; see nccl_double_begin for faults."""
        self._library.nccl_double_begin(version, fault.encode())

    def open(self) -> Any:
        nccl = core.Nccl([self.path])
        assert nccl.why_not == ""
        return nccl

    def wrong_use(self) -> str:
        return str(self._library.nccl_double_wrong_use().decode())

    def alive(self) -> int:
        """Communicators that have not been aborted."""
        return int(self._library.nccl_double_alive())

    def wait_for_exchanges(self, member: int) -> None:
        wait_until(lambda: self._library.nccl_double_pending(ctypes.c_void_p(stream(member))) == 0)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_library(Path(__file__).with_name("nccl_double.cpp"), tmp_path_factory.mktemp("nccl"))


@pytest.fixture
def double(compiled: Path) -> Iterator[Double]:
    double = Double(compiled)
    double.begin()
    yield double
    assert double.wrong_use() == ""
    gc.collect()
    assert double.alive() == 0, "a group that nobody has any more was not ended"


def stream(member: int) -> int:
    return 0x1000 + member


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def settled(group: Any) -> str:
    """Its state, when it is not busy any more."""
    wait_until(lambda: group.state() != "busy")
    return str(group.state())


def join(nccl: Any, name: bytes, member: int, members: int) -> Any:
    group = nccl.join(name, member, members, stream(member))
    assert settled(group) == "ready"
    return group


def part(peer: int, array: Any) -> tuple[int, int, int]:
    return peer, array.ctypes.data, array.nbytes


@pytest.mark.parametrize("members", [2, 3, 4])
def test_everyone_gets_what_each_has_for_it(double: Double, members: int) -> None:
    name = double.open().new_group()
    assert len(name) == 128

    def body(member: int) -> None:
        group = join(double.open(), name, member, members)
        others = [peer for peer in range(members) if peer != member]
        sent = {peer: np.full(10 * member + peer + 1, 16 * member + peer, np.uint8) for peer in others}
        received = {peer: np.zeros(10 * peer + member + 1, np.uint8) for peer in others}
        group.exchange([part(p, sent[p]) for p in others], [part(p, received[p]) for p in others])
        double.wait_for_exchanges(member)
        for peer in others:
            assert (received[peer] == 16 * peer + member).all()
        assert settled(group) == "ready"

    run_threads(members, body)


def test_exchanges_happen_in_the_order_in_which_they_are_asked_for(double: Double) -> None:
    """What one brings, the next one hands on: after a round of the ring everyone has its own bytes again."""
    members = 4
    name = double.open().new_group()

    def body(member: int) -> None:
        group = join(double.open(), name, member, members)
        after, before = (member + 1) % members, (member - 1) % members
        held = [np.full(1000, member + 1, np.uint8), *(np.zeros(1000, np.uint8) for _ in range(members))]
        for given, taken in itertools.pairwise(held):
            group.exchange([part(after, given)], [part(before, taken)])
            assert settled(group) == "ready"  # so far it is in the stream; it need not have happened
        double.wait_for_exchanges(member)
        assert [int(array[0]) for array in held] == [(member - k) % members + 1 for k in range(members + 1)]

    run_threads(members, body)


def test_some_of_the_members_exchange(double: Double) -> None:
    """First two pairs, then one rank that only gives, and one that has no part in that."""
    name = double.open().new_group()

    def body(member: int) -> None:
        group = join(double.open(), name, member, 4)
        mine, pair, last = np.full(3, member + 1, np.uint8), np.zeros(3, np.uint8), np.zeros(3, np.uint8)
        group.exchange([part(member ^ 2, mine)], [part(member ^ 2, pair)])
        assert settled(group) == "ready"
        if member == 0:
            group.exchange([part(1, mine), part(3, mine)], [])
        elif member != 2:
            group.exchange([], [part(0, last)])
        double.wait_for_exchanges(member)
        assert pair[0] == (member ^ 2) + 1
        assert last[0] == (member in (1, 3))

    run_threads(4, body)


def test_a_group_is_busy_until_all_have_joined_and_while_an_exchange_is_begun(double: Double) -> None:
    nccl = double.open()
    name = nccl.new_group()
    data = np.zeros(3, np.uint8)
    first = nccl.join(name, 0, 2, stream(0))
    for _ in range(10):
        assert first.state() == "busy"
    with pytest.raises(RuntimeError, match="is busy: wait"):
        first.exchange([part(1, data)], [])
    second = nccl.join(name, 1, 2, stream(1))
    assert settled(first) == settled(second) == "ready"
    first.exchange([part(1, data)], [])
    with pytest.raises(RuntimeError, match="is busy: wait"):
        first.exchange([part(1, data)], [])
    assert first.state() == "busy"
    assert settled(first) == "ready"  # though it has not happened: the other has not asked for it yet
    second.exchange([], [part(0, data)])
    double.wait_for_exchanges(0)


def test_aborting_ends_an_exchange_that_would_not_end(double: Double) -> None:
    nccl = double.open()
    name = nccl.new_group()
    group, stopped = nccl.join(name, 0, 2, stream(0)), nccl.join(name, 1, 2, stream(1))
    assert settled(group) == settled(stopped) == "ready"
    data, more = np.zeros(3, np.uint8), np.ones(3, np.uint8)
    group.exchange([], [part(1, data)])
    group.abort()
    double.wait_for_exchanges(0)
    assert group.state() == "failed" and "ended on this rank" in group.reason()
    group.abort()
    with pytest.raises(RuntimeError, match="has failed: the group was ended on this rank"):
        group.exchange([], [part(1, data)])
    stopped.exchange([part(0, more)], [])
    assert not data.any()


def test_a_group_that_never_forms_can_be_aborted(double: Double) -> None:
    nccl = double.open()
    group = nccl.join(nccl.new_group(), 0, 2, stream(0))
    assert group.state() == "busy"
    group.abort()
    assert group.state() == "failed"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("join", "forming a group: invalid argument"),
        ("forming", "forming a group: unhandled system error"),
        ("send", "exchanging data: unhandled system error"),
        ("exchange", "exchanging data: unhandled system error"),
        ("exchanging", "exchanging data: remote process exited or there was a network error"),
    ],
)
def test_what_fails_in_nccl_is_the_groups_state_with_nccls_words(double: Double, fault: str, reason: str) -> None:
    double.begin(fault=fault)
    name = double.open().new_group()

    def body(member: int) -> None:
        group = double.open().join(name, member, 2, stream(member))
        data = np.zeros(3, np.uint8)
        if "forming" not in reason:
            assert settled(group) == "ready"
            assert group.reason() == ""
            group.exchange([part(1 - member, data)], [])
        assert settled(group) == "failed"
        expected = f"NCCL: {reason}: noted by the double"
        assert group.reason() == expected
        with pytest.raises(RuntimeError, match=f"has failed: {expected}"):
            group.exchange([part(1 - member, data)], [])
        group.abort()
        assert group.reason() == expected

    run_threads(2, body)


def test_a_group_needs_its_whole_name(double: Double) -> None:
    with pytest.raises(RuntimeError, match=r"128 bytes from new_group\(\), not by 5"):
        double.open().join(b"group", 0, 2, stream(0))


def test_a_version_that_is_too_old_is_not_used(double: Double) -> None:
    double.begin(version=21705)
    nccl = core.Nccl([double.path])
    assert nccl.why_not == f"{double.path} is NCCL 2.17.5: NCCL 2.18.0 or later is needed"
    assert nccl.version == "2.17.5"
    double.begin(version=2804)
    assert core.Nccl([double.path]).version == "2.8.4"
    double.begin(version=21800)
    assert double.open().version == "2.18.0"


def test_a_library_that_cannot_be_used_is_named(double: Double, tmp_path: Path) -> None:
    nothing = core.Nccl(["not_there.so", "nor_there.so"])
    assert nothing.why_not.startswith("NCCL cannot be loaded: not_there.so: cannot open shared object file")
    assert "; nor_there.so: cannot open" in nothing.why_not and nothing.version == ""

    source = tmp_path / "half.cpp"
    source.write_text('extern "C" int ncclGetVersion(int* version) { return *version = 22907, 0; }')
    half = shared_library(source, tmp_path)
    assert core.Nccl([str(half)]).why_not == f"{half} has no function ncclGetUniqueId: NCCL 2.18.0 or later is needed"
    assert "has no function ncclGetVersion" in core.Nccl([core.__file__]).why_not

    assert core.Nccl(["not_there.so", double.path]).why_not == ""


def test_the_double_sees_wrong_use(double: Double) -> None:
    nccl = double.open()
    name = nccl.new_group()
    groups = [nccl.join(name, member, 2, stream(member)) for member in range(2)]
    data = np.zeros(8, np.uint8)
    assert [settled(group) for group in groups] == ["ready", "ready"]
    groups[0].exchange([part(1, data)], [])
    groups[1].exchange([], [part(0, data[:5])])
    assert double.wrong_use() == "a send of 8 bytes and its receive of 5"
    double.begin()
    assert nccl.join(bytes(128), 0, 2, stream(0)).state() == "failed"
    assert "ncclGetUniqueId has not given" in double.wrong_use()
    double.begin()
