"""The promises of transport.h, kept by both transports: in one process, step by step or on threads, and over MPI."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup import _core_testing as core
from tests.compiled import shared_library
from tests.launch import run_ranks, start_ranks
from tests.rank_main import mark
from tests.threads import run_threads

# ---- One process, one thread: the test decides who runs when.


def endpoints(size: int) -> list[core.Endpoint]:
    hub = core.Hub(size)
    return [core.Endpoint.in_process(hub, rank) for rank in range(size)]


def let_run(ends: Sequence[core.Endpoint]) -> None:
    """Calls progress() on these endpoints until none of them has anything to do."""
    while sum(end.progress() for end in ends):  # every one of them, each time
        pass


def send(
    end: core.Endpoint, peer: int, tag: int, data: np.ndarray, log: list[str], name: str, cancellable: bool = False
) -> None:
    end.start_send(peer, tag, data.ctypes.data, data.nbytes, lambda: log.append(name), cancellable)


def receive(
    end: core.Endpoint, peer: int, tag: int, data: np.ndarray, log: list[str], name: str, cancellable: bool = False
) -> None:
    end.start_receive(peer, tag, data.ctypes.data, data.nbytes, lambda: log.append(name), cancellable)


def test_messages_keep_their_order_and_their_size() -> None:
    ends = endpoints(3)
    messages = [b"", b"x", bytes(1 << 20), b"last"]
    for message in messages:
        ends[0].send_message(2, message)
        ends[2].send_message(2, message)  # to itself
    got = defaultdict(list)
    while (item := ends[2].receive_message()) is not None:
        got[item[0]].append(item[1])
    assert got == {0: messages, 2: messages}
    assert ends[1].receive_message() is None


def test_transfers_match_by_peer_and_tag_in_order() -> None:
    ends = endpoints(3)
    log: list[str] = []
    source = [np.full(5, value, np.int64) for value in range(4)]
    target = [np.full(5, -1, np.int64) for _ in range(4)]
    send(ends[0], 2, 7, source[0], log, "s0")
    send(ends[0], 2, 7, source[1], log, "s1")
    send(ends[0], 2, 8, source[2], log, "s2")
    send(ends[1], 2, 7, source[3], log, "s3")
    receive(ends[2], 0, 8, target[2], log, "r2")
    receive(ends[2], 1, 7, target[3], log, "r3")
    receive(ends[2], 0, 7, target[0], log, "r0")
    receive(ends[2], 0, 7, target[1], log, "r1")
    assert log == [], "callbacks run inside progress() only"
    let_run(ends)
    np.testing.assert_array_equal(target, source)
    assert sorted(log) == ["r0", "r1", "r2", "r3", "s0", "s1", "s2", "s3"]
    assert [end.pending for end in ends] == [0, 0, 0]


def test_a_send_completes_only_when_it_has_been_received() -> None:
    ends = endpoints(2)
    log: list[str] = []
    data = np.arange(3.0)
    into = np.zeros(3)
    receive(ends[1], 0, 0, into, log, "received")
    send(ends[0], 1, 0, data, log, "sent")
    let_run(ends[:1])
    assert log == [] and ends[0].pending == 1, "nothing moves while the receiver does not call progress()"
    let_run(ends)
    assert log == ["received", "sent"] and into.tolist() == data.tolist()


def test_nothing_waits_for_a_rank_that_has_stopped() -> None:
    ends = endpoints(3)
    log: list[str] = []
    data = np.ones(4)
    into = np.zeros(4)
    send(ends[0], 2, 0, data, log, "to the stopped one")
    receive(ends[0], 2, 0, into, log, "from the stopped one")
    for _ in range(1000):
        ends[0].send_message(2, b"are you there?")
    send(ends[0], 1, 0, data, log, "sent")
    receive(ends[1], 0, 0, into, log, "received")
    let_run(ends[:2])
    assert sorted(log) == ["received", "sent"]
    assert ends[0].pending == 2


def test_callbacks_may_start_transfers() -> None:
    ends = endpoints(2)
    ball = np.zeros(1, np.int64)
    hits: list[int] = []

    def hit(me: int) -> None:
        hits.append(int(ball[0]))
        ball[0] += 1
        if ball[0] < 20:
            ends[me].start_send(1 - me, 3, ball.ctypes.data, 8, lambda: catch(me))

    def catch(me: int) -> None:
        ends[me].start_receive(1 - me, 3, ball.ctypes.data, 8, lambda: hit(me))

    catch(1)
    hit(0)
    let_run(ends)
    assert hits == list(range(20))
    for end in ends:
        end.close()  # the last receive holds a callback, which holds the endpoints


def test_empty_transfers_complete() -> None:
    ends = endpoints(2)
    log: list[str] = []
    ends[0].start_send(1, 0, 0, 0, lambda: log.append("sent"))
    ends[1].start_receive(0, 0, 0, 0, lambda: log.append("received"))
    let_run(ends)
    assert sorted(log) == ["received", "sent"]


def test_unequal_sizes_are_named() -> None:
    ends = endpoints(2)
    log: list[str] = []
    send(ends[0], 1, 4, np.zeros(2), log, "")
    receive(ends[1], 0, 4, np.zeros(3), log, "")
    with pytest.raises(core.RuntimeFailure, match="from rank 0 with tag 4 has 16 bytes, 24 were expected"):
        let_run(ends)


def test_an_endpoint_that_is_closed_leaves_nothing_behind() -> None:
    ends = endpoints(2)
    log: list[str] = []
    data = np.ones(3)
    into = np.zeros(3)
    send(ends[0], 1, 0, data, log, "sent")
    ends[0].close()
    ends[0].close()
    data[:] = 7
    receive(ends[1], 0, 0, into, log, "received")
    let_run(ends[1:])
    assert log == [] and into.tolist() == [0, 0, 0] and ends[1].pending == 1
    with pytest.raises(core.UsageError, match="closed"):
        ends[0].progress()


def test_wrong_use_of_a_hub_is_refused() -> None:
    with pytest.raises(core.UsageError, match="hub of 0 ranks"):
        core.Hub(0)
    hub = core.Hub(2)
    with pytest.raises(core.UsageError, match="rank 2 of a hub of 2 ranks"):
        core.Endpoint.in_process(hub, 2)
    end = core.Endpoint.in_process(hub, 1)
    with pytest.raises(core.UsageError, match="rank 1 of this hub has an endpoint already"):
        core.Endpoint.in_process(hub, 1)
    assert (end.rank, end.size) == (1, 2)


Action = tuple[str, int, int, int]  # what, from, to, tag


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["message", "send", "receive", "run"]), *[st.integers(0, 2)] * 3), max_size=120
    )
)
def test_any_interleaving_keeps_order_and_contents(actions: list[Action]) -> None:
    """Random programs of three ranks, run in any order, against a model: one queue for each kind, pair and tag."""
    ends = endpoints(3)
    sent: dict[tuple[int, int, int], list[np.ndarray]] = defaultdict(list)
    into: dict[tuple[int, int, int], list[np.ndarray]] = defaultdict(list)
    said: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    done: list[str] = []
    for number, (what, source, target, tag) in enumerate(actions):
        lane = (source, target, tag)
        if what == "run":
            ends[source].progress()
        elif what == "message":
            said[source, target].append(number.to_bytes(4, "little"))
            ends[source].send_message(target, said[source, target][-1])
        elif source != target and what == "send":
            sent[lane].append(np.full(6, number, np.int32))
            send(ends[source], target, tag, sent[lane][-1], done, "")
        elif source != target:
            into[lane].append(np.full(6, -1, np.int32))
            receive(ends[target], source, tag, into[lane][-1], done, "")
    let_run(ends)
    lanes = set(sent) | set(into)
    for lane in lanes:
        matched = min(len(sent[lane]), len(into[lane]))
        np.testing.assert_array_equal(into[lane][:matched], sent[lane][:matched])
        assert all((data == -1).all() for data in into[lane][matched:])
    assert len(done) == sum(2 * min(len(sent[lane]), len(into[lane])) for lane in lanes)
    for target in range(3):
        heard = defaultdict(list)
        while (item := ends[target].receive_message()) is not None:
            heard[item[0]].append(item[1])
        assert all(heard[source] == said[source, target] for source in range(3))


# ---- Device transfers, of which host memory stands for a GPU's.


def device_send(end: core.Endpoint, peer: int, tag: int, data: np.ndarray, log: list[str], name: str) -> None:
    end.start_device_send(peer, tag, data.ctypes.data, data.nbytes, Owner(data, log, name))


def device_receive(end: core.Endpoint, peer: int, tag: int, data: np.ndarray, log: list[str], name: str) -> None:
    end.start_device_receive(peer, tag, data.ctypes.data, data.nbytes, Owner(data, log, name))


class Owner:
    """A callback that owns the memory of its transfer."""

    def __init__(self, data: np.ndarray, log: list[str], name: str) -> None:
        self.data, self.log, self.name = data, log, name

    def __call__(self) -> None:
        self.log.append(self.name)


def device_endpoints(size: int) -> list[core.Endpoint]:
    hub = core.Hub(size, takes_device_memory=True)
    return [core.Endpoint.in_process(hub, rank) for rank in range(size)]


def test_device_memory_is_not_taken_unless_said() -> None:
    assert [end.takes_device_memory for end in (*endpoints(1), *device_endpoints(1))] == [False, True]


def test_device_transfers_match_each_other_alone() -> None:
    ends = device_endpoints(2)
    log: list[str] = []
    source = [np.full(5, value, np.int64) for value in range(4)]
    target = [np.full(5, -1, np.int64) for _ in range(4)]
    send(ends[0], 1, 7, source[0], log, "s0")
    device_send(ends[0], 1, 7, source[1], log, "s1")
    device_send(ends[0], 1, 7, source[2], log, "s2")
    device_send(ends[0], 1, 8, source[3], log, "s3")
    device_receive(ends[1], 0, 8, target[3], log, "r3")
    device_receive(ends[1], 0, 7, target[1], log, "r1")
    device_receive(ends[1], 0, 7, target[2], log, "r2")
    let_run(ends)
    assert sorted(log) == ["r1", "r2", "r3", "s1", "s2", "s3"]
    receive(ends[1], 0, 7, target[0], log, "r0")
    let_run(ends)
    np.testing.assert_array_equal(target, source)
    assert [end.pending for end in ends] == [0, 0]


def test_what_is_given_up_stays_until_its_peer_takes_it_and_is_thrown_away_then() -> None:
    ends = device_endpoints(2)
    log: list[str] = []
    data, into = np.ones(3), np.zeros(3)
    device_send(ends[0], 1, 5, data, log, "sent")
    device_receive(ends[0], 1, 5, into, log, "received")
    device_send(ends[0], 1, 6, data, log, "sent 6")
    held = sys.getrefcount(data)
    ends[0].give_up_device(5)
    assert ends[0].pending == 1 and sys.getrefcount(data) == held, "of tag 6; what is sent may still be read"
    device_send(ends[1], 0, 5, data, log, "late")
    let_run(ends)
    assert log == ["late"] and not into.any(), "thrown away by rank 0, so that it ends"
    ends[1].give_up_device(5)
    let_run(ends)
    assert sys.getrefcount(data) == held - 1, "of tag 6"
    device_receive(ends[1], 0, 6, into, log, "received 6")
    let_run(ends)
    assert sorted(log) == ["late", "received 6", "sent 6"] and into.tolist() == [1, 1, 1]


# ---- The same exchange on threads and over MPI.


def wait_until(end: core.Endpoint, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if not end.progress():
            time.sleep(0)
        assert time.monotonic() < deadline, f"rank {end.rank}: {end.pending} transfers pending after {timeout_s} s"


def take_messages(end: core.Endpoint, count: int) -> dict[int, list[bytes]]:
    got: dict[int, list[bytes]] = defaultdict(list)
    total = 0
    while total < count:
        if (item := end.receive_message()) is None:
            end.progress()
            time.sleep(0)
        else:
            got[item[0]].append(item[1])
            total += 1
    return got


MESSAGE_SIZES = (0, 1, 255, 5000, 70_000, 3_000_000, 10)
TRANSFER_BYTES = (1, 999, 1000, 1001, 5000, 300_000, 0)


def pattern(rank: int, tag: int, size: int) -> np.ndarray:
    """Bytes that tell where they come from and where in the transfer they belong."""
    return (np.arange(size) % 251 + rank * 16 + tag % 16).astype(np.uint8)


def exchange(end: core.Endpoint) -> None:
    """All to all: messages of all sizes, transfers of all sizes under two tags, each in order."""
    peers = [peer for peer in range(end.size) if peer != end.rank]
    log: list[str] = []
    kept = []
    for tag in (0, 32767):
        for size in TRANSFER_BYTES:
            outgoing = pattern(end.rank, tag, size)
            for peer in peers:
                incoming = np.zeros(size, np.uint8)
                kept.append((peer, tag, outgoing, incoming))
                if tag == 0:
                    receive(end, peer, tag, incoming, log, "")
                    send(end, peer, tag, outgoing, log, "")
                else:
                    send(end, peer, tag, outgoing, log, "")
                    receive(end, peer, tag, incoming, log, "")
    for size in MESSAGE_SIZES:
        for peer in range(end.size):
            end.send_message(peer, bytes([end.rank]) * size)
    got = take_messages(end, len(MESSAGE_SIZES) * end.size)
    wait_until(end, lambda: end.pending == 0)
    assert len(log) == 2 * len(kept)
    for peer, tag, _, incoming in kept:
        np.testing.assert_array_equal(incoming, pattern(peer, tag, len(incoming)))
    assert got == {peer: [bytes([peer]) * size for size in MESSAGE_SIZES] for peer in range(end.size)}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_exchange_between_threads(size: int) -> None:
    hub = core.Hub(size)
    run_threads(size, lambda rank: exchange(core.Endpoint.in_process(hub, rank)))


def over_mpi(**options: int) -> core.Endpoint:
    from mpi4py import MPI

    return core.Endpoint.over_mpi(MPI._addressof(MPI.COMM_WORLD), **options)


@pytest.mark.parametrize("share_memory", [True, False], ids=["shared-memory", "mpi-alone"])
@pytest.mark.ranks(1, 2, 4)
def test_exchange_over_mpi(size: int, share_memory: bool) -> None:
    end = over_mpi(share_memory=share_memory)
    assert end.size == size
    exchange(end)


@pytest.mark.ranks(3)
def test_transfers_over_mpi_are_cut_into_pieces() -> None:
    exchange(over_mpi(piece_bytes=1000, share_memory=False))


def shared_segments() -> tuple[int, int]:
    """How many of our shared segments this process has mapped, and how many it holds open."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:hvd_backup")
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return mapped, sum("memfd:hvd_backup" in str(link) for link in links)


@pytest.mark.ranks(3)
def test_shared_memory_is_mapped_and_leaves_nothing_open() -> None:
    end = over_mpi()
    assert shared_segments() == (3, 0)
    end.close()
    assert shared_segments() == (0, 0)
    assert over_mpi(share_memory=False).size == 3 and shared_segments() == (0, 0)


@pytest.mark.ranks(3)
def test_mpi_takes_over_where_one_rank_has_no_room_for_shared_memory() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    end = over_mpi()
    assert shared_segments() == (0, 0)
    exchange(end)


@pytest.mark.ranks(3)
def test_more_than_the_shared_memory_holds() -> None:
    """Hundreds of sends before the first receive: those that find no room go over MPI, in the same order."""
    end = over_mpi()
    peers = [peer for peer in range(end.size) if peer != end.rank]
    log: list[str] = []
    outgoing = [np.full(100_000, number, np.uint16) for number in range(150)]
    incoming = {peer: np.zeros((150, 100_000), np.uint16) for peer in peers}
    for data in outgoing:
        for peer in peers:
            send(end, peer, 5, data, log, "sent")
        end.start_send_to_all(peers, 6, data.ctypes.data, 2000, lambda: log.append("sent to all"))
    for peer in peers:
        end.send_message(peer, b"all started")
    take_messages(end, len(peers))
    for number in range(150):
        for peer in peers:
            receive(end, peer, 5, incoming[peer][number], log, "received")
    heads = {peer: np.zeros((150, 1000), np.uint16) for peer in peers}
    for peer in peers:
        for row in heads[peer]:
            receive(end, peer, 6, row, log, "received")
    wait_until(end, lambda: end.pending == 0)
    assert (log.count("sent"), log.count("sent to all"), log.count("received")) == (300, 150, 600)
    for peer in peers:
        assert (incoming[peer] == np.arange(150)[:, np.newaxis]).all()
        assert (heads[peer] == np.arange(150)[:, np.newaxis]).all()


@pytest.mark.parametrize("share_memory", [True, False], ids=["shared-memory", "mpi-alone"])
@pytest.mark.ranks(2)
def test_cancelled_transfers_over_mpi(share_memory: bool) -> None:
    """Nothing of theirs is touched any more, what the peer sends later is thrown away, other tags are not concerned."""
    from mpi4py import MPI

    end, barrier = over_mpi(share_memory=share_memory), MPI.COMM_WORLD.Barrier
    for case, nbytes in enumerate((100, 10_000, 1_000_000)):
        late, early, wanted = 3 * case, 3 * case + 1, 3 * case + 2
        log: list[str] = []
        into = {tag: np.zeros(nbytes, np.uint8) for tag in (late, early, wanted)}
        data = np.full(nbytes, 9, np.uint8)
        for tag in (late, early) if end.rank == 0 else ():
            receive(end, 1, tag, into[tag], log, "unwanted", cancellable=True)
        if end.rank == 0:
            end.cancel(late)  # before anything is sent
        barrier()
        if end.rank == 1:
            send(end, 0, late, data, log, "late", cancellable=True)
            send(end, 0, early, data, log, "early", cancellable=True)
            for _ in range(3):
                end.progress()
            end.cancel(early)
            data[:] = 7  # its memory is the sender's again
        barrier()
        if end.rank == 0:
            end.cancel(early)  # when it may have arrived
        receive(end, 1 - end.rank, wanted, into[wanted], log, "wanted", cancellable=True)
        own = np.full(nbytes, 5 + end.rank, np.uint8)
        send(end, 1 - end.rank, wanted, own, log, "sent", cancellable=True)
        wait_until(end, lambda: end.pending == 0)
        assert (into[wanted] == 6 - end.rank).all()
        assert not into[late].any() and not into[early].any() and "unwanted" not in log
        barrier()


@pytest.mark.ranks(2)
def test_all_ranks_agree_whether_mpi_takes_device_memory() -> None:
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    assert over_mpi(takes_device_memory=True).takes_device_memory
    assert not over_mpi(takes_device_memory=rank == 0).takes_device_memory
    end = over_mpi(takes_device_memory=False)
    with pytest.raises(core.UsageError, match="MPI does not take GPU memory on all ranks"):
        device_send(end, 1 - rank, 0, np.ones(1), [], "")
    assert over_mpi().takes_device_memory == core.mpi_says_it_takes_device_memory()


SAYS_YES = 'extern "C" int MPIX_Query_cuda_support() { return 1; }'
ASK = """
from hvd_backup import _core_testing as core
from mpi4py import MPI
result = core.Endpoint.over_mpi(MPI._addressof(MPI.COMM_WORLD)).takes_device_memory
"""


def test_mpi_is_asked_whether_it_takes_device_memory(tmp_path: Path) -> None:
    (source := tmp_path / "says_yes.cpp").write_text(SAYS_YES)
    library = shared_library(source, tmp_path)
    assert run_ranks(2, ASK, env={"LD_PRELOAD": str(library)}) == [True, True]


@pytest.mark.parametrize("piece_bytes", [1 << 20, 1000])
@pytest.mark.ranks(3)
def test_device_transfers_over_mpi(piece_bytes: int) -> None:
    """Among others with the same tags, in whatever order they are started."""
    end = over_mpi(takes_device_memory=True, piece_bytes=piece_bytes)
    log: list[str] = []
    kept = []
    for tag in (0, 1, 40_000):
        for size in TRANSFER_BYTES[:-1]:
            for peer in set(range(end.size)) - {end.rank}:
                incoming, on_device = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
                kept.append((peer, tag, incoming, on_device))
                device_send(end, peer, tag, pattern(end.rank, tag + 1, size), log, "")
                send(end, peer, tag, data := pattern(end.rank, tag, size), log, "")
                receive(end, peer, tag, incoming, log, "")
                device_receive(end, peer, tag, on_device, log, "")
                kept.append((end.rank, tag, data, pattern(end.rank, tag + 1, size)))
    wait_until(end, lambda: end.pending == 0)
    assert len(log) == 2 * len(kept)
    for peer, tag, incoming, on_device in kept:
        np.testing.assert_array_equal(incoming, pattern(peer, tag, len(incoming)))
        np.testing.assert_array_equal(on_device, pattern(peer, tag + 1, len(incoming)))


@pytest.mark.parametrize("nbytes", [100, 10_000, 1_000_000])
@pytest.mark.ranks(2)
def test_device_transfers_that_are_given_up_over_mpi(nbytes: int) -> None:
    """Rank 0 gives up; what rank 1 sends much later is thrown away, so that rank 1 is done with it."""
    from mpi4py import MPI

    end, barrier = over_mpi(takes_device_memory=True, piece_bytes=300_000), MPI.COMM_WORLD.Barrier
    peer = 1 - end.rank
    log: list[str] = []
    early, late, other, newer = range(4)
    into, data = np.zeros(nbytes, np.uint8), np.full(nbytes, 7, np.uint8)
    others = np.zeros(nbytes, np.uint8)
    unowned = sys.getrefcount(data), sys.getrefcount(into)
    device_receive(end, peer, other, others, log, "other received")
    if end.rank == 0:
        device_receive(end, 1, late, into, log, "unwanted")
        device_send(end, 1, late, data, log, "unwanted")
        end.give_up_device(late)
        assert end.pending == 1, "of the other tag"
        assert sys.getrefcount(data) > unowned[0], "what is sent may still be read"
        wait_until(end, lambda: sys.getrefcount(into) == unowned[1])
    barrier()
    if end.rank == 1:
        device_send(end, 0, late, data, log, "late")
        device_send(end, 0, early, data, log, "early")
        for _ in range(3):
            end.progress()
    barrier()
    if end.rank == 0:
        device_receive(end, 1, early, np.zeros(nbytes, np.uint8), log, "received, or not")
        end.give_up_device(early)  # when it has begun to arrive, or has arrived
    barrier()
    deadline = time.monotonic() + 30
    while not {"late", "early"} <= set(log) and end.rank == 1:
        end.progress()
        assert time.monotonic() < deadline, f"what rank 0 has given up is still pending here: {log}"
    if end.rank == 1:
        MPI.COMM_WORLD.send(b"done", dest=0)
    else:
        wait_until(end, lambda: MPI.COMM_WORLD.iprobe(source=1))
        MPI.COMM_WORLD.recv(source=1)
    assert "unwanted" not in log
    if end.rank == 1:  # takes what rank 0 had sent before it gave up
        device_receive(end, 0, late, into, log, "taken")
    device_send(end, peer, other, np.full(nbytes, 8 + end.rank, np.uint8), log, "other sent")
    device_send(end, peer, newer, data, log, "newer sent")
    device_receive(end, peer, newer, newest := np.zeros(nbytes, np.uint8), log, "newer received")
    wait_until(end, lambda: end.pending == 0)
    assert (others == 8 + peer).all() and (newest == 7).all()
    assert (into == (7 if end.rank == 1 else 0)).all()
    barrier()
    wait_until(end, lambda: (sys.getrefcount(data), sys.getrefcount(into)) == unowned)


@pytest.mark.ranks(2)
def test_two_transports_do_not_hear_each_other() -> None:
    from mpi4py import MPI

    first, second = over_mpi(), over_mpi()
    peer = 1 - first.rank
    MPI.COMM_WORLD.isend(b"mine", dest=peer, tag=0).Free()
    first.send_message(peer, b"first")
    second.send_message(peer, b"second")
    assert take_messages(second, 1) == {peer: [b"second"]}
    assert take_messages(first, 1) == {peer: [b"first"]}
    assert MPI.COMM_WORLD.recv(source=peer, tag=0) == b"mine"


@pytest.mark.ranks(2)
def test_unequal_sizes_over_mpi_are_errors() -> None:
    for sent, expected, complaint in ((16, 24, "rank 0 has 16 bytes, 24 were expected"), (24, 16, "(?i)truncat")):
        end = over_mpi(share_memory=False)
        log: list[str] = []
        if end.rank == 0:
            data = np.zeros(sent, np.uint8)
            send(end, 1, 0, data, log, "")
            wait_until(end, lambda end=end: end.pending == 0)  # type: ignore[misc]
        else:
            data = np.zeros(expected, np.uint8)
            receive(end, 0, 0, data, log, "")
            with pytest.raises(core.RuntimeFailure, match=complaint):
                wait_until(end, lambda end=end: end.pending == 0)  # type: ignore[misc]


@pytest.mark.ranks(2)
def test_many_pending_transfers_cost_little() -> None:
    """Thousands of receives towards a silent peer: polling stays cheap, closing cancels them."""
    end = over_mpi()
    idle = np.zeros((5000, 8))
    if end.rank == 0:
        for tag, row in enumerate(idle):
            end.start_receive(1, tag + 1, row.ctypes.data, row.nbytes, lambda: None)
    pending = end.pending
    log: list[str] = []
    data, into = np.zeros(100), np.empty(100)
    began = time.monotonic()
    for _ in range(200):
        send(end, 1 - end.rank, 0, data, log, "")
        receive(end, 1 - end.rank, 0, into, log, "")
        wait_until(end, lambda: end.pending == pending)
    assert len(log) == 400
    assert time.monotonic() - began < 20
    end.close()
    end.close()


STEPS = 2000


def talk_past_a_stopped_rank(stopped: Path) -> None:
    """Rank 2 is stopped until the others have finished; `stopped` exists once it is."""
    end = over_mpi()
    big = np.full(1 << 20, end.rank, np.uint8)
    from_others = {peer: np.zeros_like(big) for peer in (0, 1)}
    log: list[str] = []
    if end.rank == 2:
        mark("ready")
        while not stopped.exists():
            time.sleep(0.01)
        messages = take_messages(end, 2 * STEPS)
        assert [len(messages[peer]) for peer in (0, 1)] == [STEPS, STEPS]
        for peer, into in from_others.items():
            receive(end, peer, 1, into, log, "")
        wait_until(end, lambda: end.pending == 0)
        assert all((into == peer).all() for peer, into in from_others.items())
        return
    while not stopped.exists():
        time.sleep(0.01)
    peer = 1 - end.rank
    send(end, 2, 1, big, log, "")
    receive(end, 2, 1, np.zeros_like(big), log, "")  # never sent
    slowest = 0.0
    for step in range(STEPS):
        began = time.monotonic()
        end.send_message(2, b"x" * 64)
        end.send_message(peer, b"tick")
        assert take_messages(end, 1)[peer] == [b"tick"]
        if step % 20 == 0:
            send(end, peer, 0, big, log, "")
            receive(end, peer, 0, from_others[peer], log, "")
            wait_until(end, lambda expected=2 * (step // 20 + 1): len(log) == expected)  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - began)
    mark("finished", slowest)
    wait_until(end, lambda: end.pending == 1)


def test_a_stopped_rank_costs_the_others_nothing(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with start_ranks(3, talk_past_a_stopped_rank, args=(stopped,)) as job:
        job.wait_for_mark(2, "ready")
        job.stop(2)
        stopped.touch()
        slowest = [job.wait_for_mark(rank, "finished") for rank in (0, 1)]
        job.resume(2)
        job.wait().values()
    assert max(slowest) < 2.0


BEFORE_INIT = """
import mpi4py
mpi4py.rc.initialize = False
from hvd_backup import _core_testing as core
from mpi4py import MPI
def refusal():
    try:
        core.Endpoint.over_mpi(MPI._addressof(MPI.COMM_WORLD))
    except core.UsageError as error:
        return str(error)
result = [refusal()]
MPI.Init_thread(MPI.THREAD_SERIALIZED)
result.append(refusal())
MPI.Finalize()
result.append(refusal())
"""


def test_mpi_in_the_wrong_state_is_refused_with_the_remedy() -> None:
    (texts,) = run_ranks(1, BEFORE_INIT)
    for text, part in zip(texts, ("not initialised", "MPI_THREAD_MULTIPLE", "finalised already"), strict=True):
        assert part in text


LEFT_OPEN = """
import numpy as np
from hvd_backup import _core_testing as core
from mpi4py import MPI
end = core.Endpoint.over_mpi(MPI._addressof(MPI.COMM_WORLD))
data = np.zeros(1 << 20, np.uint8)
end.start_receive(1 - end.rank, 0, data.ctypes.data, data.nbytes, lambda: None)
MPI.COMM_WORLD.Barrier()
if end.rank == 0:
    end.close()
MPI.Finalize()
end.close()
result = "ended"
"""


def test_closing_with_transfers_pending_before_and_after_finalize() -> None:
    assert run_ranks(2, LEFT_OPEN, timeout_s=60) == ["ended", "ended"]


def test_the_mpi_library_names_itself() -> None:
    assert any(name in core.mpi_library_version() for name in ("Open MPI", "MPICH", "Intel"))
