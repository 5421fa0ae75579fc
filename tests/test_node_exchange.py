"""Transfers through shared memory: the ranks of a node, here in one thread, so that the test decides who runs when."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup import _core_testing as core
from tests.arithmetic import Array

BLOCK_BYTES = core.NodeExchange.block_bytes
BLOCK_COUNT = core.NodeExchange.block_count


class Rank:
    """One rank of the node, with what it has heard: names of finished transfers, and what takes the long way."""

    def __init__(self, exchange: core.NodeExchange, long_way: list[tuple[int, int]]) -> None:
        self.exchange = exchange
        self.finished: list[Any] = []
        self.long_way = long_way  # peer, tag

    def send(self, peers: Sequence[int], tag: int, data: Array, name: Any = "sent") -> bool:
        done = self.told(name)
        return bool(self.exchange.send(list(peers), tag, data.ctypes.data, data.nbytes, done))

    def receive(self, peer: int, tag: int, into: Array, name: Any = "received") -> None:
        self.exchange.receive(peer, tag, into.ctypes.data, into.nbytes, self.told(name))

    def told(self, name: Any) -> Callable[[], None]:
        finished = self.finished
        return lambda: finished.append(name)


def node(size: int) -> list[Rank]:
    long_way: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    exchanges = core.node_exchanges(size, lambda rank, peer, tag: long_way[rank].append((peer, tag)))
    return [Rank(exchange, taken) for exchange, taken in zip(exchanges, long_way, strict=True)]


def let_run(ranks: Sequence[Rank]) -> None:
    while sum(rank.exchange.progress() for rank in ranks):  # every one of them, each time
        pass


def numbers(first: int, count: int = 8) -> Array:
    return np.arange(first, first + count, dtype=np.int32)


@pytest.mark.parametrize("count", [1, BLOCK_BYTES // 4])
def test_the_same_data_to_several(count: int) -> None:
    ranks = node(3)
    data, into = numbers(5, count), [np.zeros(count, np.int32) for _ in range(2)]
    assert ranks[0].send([1, 2], 7, data)
    let_run(ranks[:1])
    assert ranks[0].finished == ["sent"] and ranks[0].exchange.pending == 0, "the data are copied: done at once"
    data[:] = -1
    for peer in (1, 2):
        ranks[peer].receive(0, 7, into[peer - 1])
    let_run(ranks)
    np.testing.assert_array_equal(into, [numbers(5, count)] * 2)
    assert [rank.finished for rank in ranks] == [["sent"], ["received"], ["received"]]


def fill(ranks: Sequence[Rank], sender: int = 0, receiver: int = 1, tag: int = 0) -> list[Array]:
    """Sends until no block is free; returns what was sent."""
    sent = []
    while ranks[sender].send([receiver], tag, data := numbers(100 * len(sent)), f"sent {len(sent)}"):
        sent.append(data)
    return sent


def test_a_full_memory_refuses_and_recovers() -> None:
    ranks = node(2)
    sent = fill(ranks)
    assert len(sent) == BLOCK_COUNT
    ranks[0].exchange.progress()
    early = len(ranks[0].finished)
    assert 0 < early < BLOCK_COUNT, "some are done at once, the rest when they have been read"
    assert ranks[0].exchange.pending == BLOCK_COUNT - early
    into = [np.zeros(8, np.int32) for _ in sent]
    for number, data in enumerate(into):
        ranks[1].receive(0, 0, data, number)
    let_run(ranks)
    np.testing.assert_array_equal(into, sent)
    assert ranks[1].finished == list(range(BLOCK_COUNT))
    assert len(ranks[0].finished) == BLOCK_COUNT and ranks[0].exchange.pending == 0
    assert len(fill(ranks)) == BLOCK_COUNT


def test_a_stopped_rank_keeps_only_blocks() -> None:
    ranks = node(3)
    for _ in range(BLOCK_COUNT - 1):
        assert ranks[0].send([2], 0, numbers(0))
    for number in range(500):
        into = np.zeros(8, np.int32)
        assert ranks[0].send([1], 5, numbers(number))
        ranks[1].receive(0, 5, into)
        let_run(ranks[:2])
        np.testing.assert_array_equal(into, numbers(number))


def test_the_long_way_is_announced_in_its_place() -> None:
    ranks = node(2)
    before, after = np.zeros(8, np.int32), np.zeros(8, np.int32)
    assert ranks[0].send([1], 3, numbers(1))
    ranks[0].exchange.announce(1, 3)
    assert ranks[0].send([1], 3, numbers(2))
    for name, into in (("before", before), ("long way", np.zeros(8, np.int32)), ("after", after)):
        ranks[1].receive(0, 3, into, name)
    let_run(ranks)
    assert ranks[1].finished == ["before", "after"] and ranks[1].long_way == [(0, 3)]
    np.testing.assert_array_equal([before, after], [numbers(1), numbers(2)])


@pytest.mark.parametrize("arrived_first", [False, True])
def test_who_cancels_a_send_gets_the_block_back(arrived_first: bool) -> None:
    ranks = node(2)
    fill(ranks, tag=1)
    if arrived_first:
        ranks[1].exchange.progress()
    ranks[0].exchange.cancel(1)
    assert ranks[0].exchange.pending <= BLOCK_COUNT
    sent = fill(ranks, tag=2)
    assert len(sent) == BLOCK_COUNT
    void, into = np.zeros(8, np.int32), [np.zeros(8, np.int32) for _ in sent]
    ranks[1].receive(0, 1, void, "void")
    for data in into:
        ranks[1].receive(0, 2, data)
    let_run(ranks)
    np.testing.assert_array_equal(into, sent)
    assert "void" not in ranks[1].finished and ranks[1].exchange.pending == 0


def test_what_is_taken_back_does_not_move_what_takes_the_long_way() -> None:
    """Of three with one tag, the second goes the long way, and the first is taken back before it is read."""
    ranks = node(2)
    ranks[0].send([1], 1, numbers(0))
    ranks[0].exchange.announce(1, 1)
    ranks[0].exchange.cancel(1)
    ranks[1].receive(0, 1, np.zeros(8, np.int32), "first")
    let_run(ranks)
    assert ranks[1].long_way == [], "it belongs to the second receive"
    ranks[1].receive(0, 1, np.zeros(2, np.int32), "second")
    assert ranks[1].long_way == [(0, 1)]


def test_who_cancels_a_receive_frees_the_senders_block() -> None:
    ranks = node(2)
    into = np.zeros(8, np.int32)
    ranks[1].receive(0, 4, into)
    ranks[1].exchange.cancel(4)
    assert ranks[1].exchange.pending == 0
    fill(ranks, tag=4)
    ranks[1].exchange.progress()
    assert into.tolist() == [0] * 8
    ranks[1].exchange.cancel(4)
    assert len(fill(ranks, tag=5)) == BLOCK_COUNT


def test_what_comes_with_a_cancelled_tag_is_thrown_away() -> None:
    """A rank that had stopped sends it long after the others have given it up."""
    ranks = node(2)
    ranks[1].exchange.cancel(4)
    for _ in range(3 * BLOCK_COUNT):
        assert ranks[0].send([1], 4, numbers(0))
        let_run(ranks)
    assert ranks[0].exchange.pending == 0 and ranks[1].exchange.pending == 0
    ranks[0].exchange.announce(1, 4)
    into = np.zeros(8, np.int32)
    ranks[0].send([1], 5, numbers(1))
    ranks[1].receive(0, 5, into)
    let_run(ranks)
    assert into.tolist() == numbers(1).tolist() and ranks[1].long_way == []


def test_more_announcements_than_the_ring_holds() -> None:
    """They wait at the sender, in order, until the receiver has read those before."""
    ranks = node(2)
    for _ in range(1000):
        ranks[0].exchange.announce(1, 0)
    assert ranks[0].send([1], 0, numbers(5))
    assert ranks[0].exchange.pending > 0
    into = np.zeros(8, np.int32)
    for _ in range(1000):
        ranks[1].receive(0, 0, np.zeros(8, np.int32))
    ranks[1].receive(0, 0, into, "last")
    while "last" not in ranks[1].finished:
        read = len(ranks[1].long_way)
        let_run(ranks)
        assert len(ranks[1].long_way) > read or "last" in ranks[1].finished
    assert ranks[1].long_way == [(0, 0)] * 1000
    np.testing.assert_array_equal(into, numbers(5))
    assert ranks[0].exchange.pending == 0


def test_unequal_sizes_are_named() -> None:
    ranks = node(2)
    ranks[0].send([1], 6, numbers(0, 2))
    ranks[1].receive(0, 6, np.zeros(3, np.int32))
    with pytest.raises(core.RuntimeFailure, match="with tag 6 has 8 bytes, 12 were expected"):
        let_run(ranks)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["send", "send all", "receive", "run", "run"]), *[st.integers(0, 2)] * 3), max_size=150
)


@given(actions=ACTIONS)
def test_any_interleaving_keeps_order_and_contents(actions: list[tuple[str, int, int, int]]) -> None:
    """Random programs of three ranks, run in any order, against a model: one queue for each pair and tag."""
    ranks = node(3)
    sent: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    into: dict[tuple[int, int, int], list[Array]] = defaultdict(list)
    accepted = 0
    for number, (what, source, target, tag) in enumerate(actions):
        others = [target] if what == "send" else [peer for peer in range(3) if peer != source]
        if what == "run":
            ranks[source].exchange.progress()
        elif what == "send all" or (what == "send" and source != target):
            if ranks[source].send(others, tag, numbers(number)):
                accepted += 1
                for peer in others:
                    sent[source, peer, tag].append(number)
        elif what == "receive" and source != target:
            into[source, target, tag].append(np.full(8, -1, np.int32))
            ranks[target].receive(source, tag, into[source, target, tag][-1])
    let_run(ranks)
    received = 0
    for lane in set(sent) | set(into):
        expected = [numbers(number) for number in sent[lane]][: len(into[lane])]
        received += len(expected)
        for data, wanted in zip(into[lane], expected, strict=False):
            np.testing.assert_array_equal(data, wanted)
        assert all((data == -1).all() for data in into[lane][len(expected) :])
    finished = [name for rank in ranks for name in rank.finished]
    assert finished.count("received") == received
    assert finished.count("sent") + sum(rank.exchange.pending for rank in ranks) >= accepted
    assert finished.count("sent") <= accepted
