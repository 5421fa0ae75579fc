"""Groups of GPUs by CUDA-aware MPI (csrc/collective/transport_group.h), step by step in one thread, without an engine.

GPUs are stand-ins whose memory is the host's and whose queue runs late (csrc/bindings/testing_device.cpp).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_backup import _core_testing as core

TAG = 3
COUNT = 1000


class Member:
    """One rank; the group is of ranks 0, 2 and 3 of four."""

    def __init__(self, hub: Any, rank: int, folder: Path) -> None:
        self.number = (0, 2, 3).index(rank)
        self.device = core.HostDevice(str(folder), rank + 1)
        self.group = core.GroupThroughTransport(self.device, hub, rank, TAG, [0, 2, 3])
        self.peers = [number for number in range(3) if number != self.number]
        self.sent = np.full(COUNT, -1)
        self.received = {peer: np.full(COUNT, -1) for peer in self.peers}  # late: copies are in the queue still

    def exchange(self, value: int) -> None:
        """Sends as many numbers to each peer, and receives them."""
        self.sent[:] = value * 10 + self.number
        self.group.exchange(
            [(peer, self.sent.ctypes.data | core.disguise, self.sent.nbytes) for peer in self.peers],
            [(peer, data.ctypes.data | core.disguise, data.nbytes) for peer, data in self.received.items()],
        )

    def run(self) -> str:
        self.group.progress()
        return str(self.group.state)


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    hub = core.Hub(4, takes_device_memory=True)
    return [Member(hub, rank, tmp_path) for rank in (0, 2, 3)]


def until(condition: Callable[[], bool]) -> None:
    assert any(condition() for _ in range(1000)), "it has not become true"


def test_exchanges_follow_each_other(members: list[Member]) -> None:
    assert [member.group.state for member in members] == ["ready"] * 3
    for value in range(20):
        for member in members:
            member.exchange(value)
        with pytest.raises(core.RuntimeFailure, match="busy: wait for state"):
            members[0].exchange(value)
        until(lambda: [member.run() for member in members] == ["ready"] * 3)
    for member in members:
        member.group.abort()  # which waits for the last copies
        assert all((data == 190 + peer).all() for peer, data in member.received.items())
        assert member.device.in_use == 0


def test_what_a_stopped_peer_has_not_taken_stays_until_it_does(members: list[Member]) -> None:
    first, second, stopped = members
    for member in (first, second):
        member.exchange(1)
    for _ in range(50):
        assert [first.run(), second.run()] == ["busy", "busy"]
    before = {peer: data.copy() for peer, data in first.received.items()}
    for member in (first, second):
        member.group.abort()
        assert (member.group.state, member.group.reason) == ("failed", "the group was ended on this rank")
        assert member.group.pending == 0 and member.device.in_use == 1
    stopped.exchange(2)
    until(lambda: stopped.run() == "busy" and stopped.group.pending > 0)
    for _ in range(50):
        for member in members:
            member.run()
    assert first.device.in_use == second.device.in_use == 0, "the peer has received it"
    stopped.group.abort()
    assert stopped.device.in_use == 0 and stopped.group.pending == 0, "the others have thrown it away"
    assert all((first.received[peer] == data).all() for peer, data in before.items())


def test_without_memory_the_group_fails(members: list[Member]) -> None:
    members[0].device.failing_exchange = 1
    members[0].exchange(0)
    assert (members[0].group.state, members[0].group.reason) == ("failed", "told to fail")
    with pytest.raises(core.RuntimeFailure, match="has failed: told to fail"):
        members[0].exchange(0)
