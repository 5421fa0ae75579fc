"""The sum over a given set of ranks: the right contributions, the same bits on every member, at every size."""

import ctypes
import itertools
import mmap
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup import _core_testing as core
from tests.arithmetic import DTYPES, FLOATS, Array, bits, from_numbers, random_elements, reference_sum, storage, widened
from tests.threads import run_threads

GRANULE = core.shard_granule
# Cuts small buffers the way large ones are cut by default: several segments a shard.
SMALL_SEGMENTS = {"small_bytes": 0, "segment_bytes": 4096, "staging_bytes": 1 << 20}
ONE_EXCHANGE = {"small_bytes": 1 << 30}
BOTH_ALGORITHMS = pytest.mark.parametrize("options", [SMALL_SEGMENTS, ONE_EXCHANGE], ids=["direct", "one-exchange"])


def subsets(size: int) -> Iterable[tuple[int, ...]]:
    """Every set of contributors among `size` ranks."""
    return itertools.chain.from_iterable(itertools.combinations(range(size), k) for k in range(1, size + 1))


def endpoints(size: int) -> list[core.Endpoint]:
    hub = core.Hub(size)
    return [core.Endpoint.in_process(hub, rank) for rank in range(size)]


class Member:
    """One rank's part in one allreduce: its buffers, between guards, and the collective once started."""

    def __init__(self, end: core.Endpoint, dtype: str, contribution: Array) -> None:
        self.end, self.dtype, self.contribution = end, dtype, contribution
        self.original = contribution.copy()
        self.frame = np.full(len(contribution) + 8, 77, storage(dtype))
        self.result = self.frame[4:-4]

    def start(self, members: Sequence[int], weights: Sequence[float], **options: Any) -> None:
        self.collective = self.end.start_allreduce(
            members=list(members),
            weights=list(weights),
            dtype=self.dtype,
            count=len(self.contribution),
            contribution=self.contribution.ctypes.data,
            result=self.result.ctypes.data,
            **options,
        )

    def check(self, expected: Array) -> None:
        assert self.collective.done
        np.testing.assert_array_equal(bits(self.result), bits(expected))
        assert (self.frame[:4] == 77).all() and (self.frame[-4:] == 77).all(), "written outside of the result"
        np.testing.assert_array_equal(bits(self.contribution), bits(self.original), "the contribution has changed")


def finish(members: Sequence[Member]) -> None:
    """Lets the ranks run in turn, in this thread, until all are done."""
    ends = {member.end.rank: member.end for member in members}.values()
    while not all(member.collective.done for member in members):
        assert sum(end.progress() for end in ends), "the collective has come to a standstill"


def allreduce(
    ends: Sequence[core.Endpoint],
    members: Sequence[int],
    dtype: str,
    contributions: Sequence[Array],
    weights: Sequence[float] = (),
    **options: Any,
) -> list[Member]:
    """Runs one allreduce among some of the endpoints; contributions by member. Checks nothing."""
    started = [Member(ends[rank], dtype, data) for rank, data in zip(members, contributions, strict=True)]
    for member in started:
        member.start(members, weights or [1.0] * len(members), **options)
    finish(started)
    return started


def signature(rank: int, count: int, dtype: str) -> Array:
    """2^rank times a number that changes along the buffer: a sum names its contributors, a shifted element shows."""
    return from_numbers(dtype, (1 + np.arange(count) % 7) * 2.0**rank)


LENGTHS = (0, 1, 7, 15, 16, 17, 79, 80, 81, 1000, 5 * 1024 + 3)


@BOTH_ALGORITHMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_set_of_contributors(size: int, dtype: str, options: dict[str, Any]) -> None:
    ends = endpoints(size)
    for members in subsets(size):
        for count in LENGTHS:
            expected = from_numbers(dtype, (1 + np.arange(count) % 7) * float(sum(2**rank for rank in members)))
            contributions = [signature(rank, count, dtype) for rank in members]
            for member in allreduce(ends, members, dtype, contributions, **options):
                member.check(expected)
    assert [end.pending for end in ends] == [0] * size


def edge_lengths(members: int, element_bytes: int, options: dict[str, Any]) -> Iterable[int]:
    """Element counts around every edge: one exchange or direct, one segment or two, all slots full, one more."""
    segment = core.segment_elements(members, element_bytes, options["segment_bytes"], options["staging_bytes"])
    small = options["small_bytes"] // max(members - 1, 1) // element_bytes
    edges = {small, *(members * segment * segments for segments in (1, core.staging_slots, 5))}
    return sorted(edge + off for edge in edges for off in (-1, 0, 1, GRANULE) if edge + off >= 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [(0, 1), (0, 2, 3), (0, 1, 2, 3)])
def test_lengths_around_the_edges(members: tuple[int, ...], dtype: str) -> None:
    options = {"small_bytes": 20_000, "segment_bytes": 4096, "staging_bytes": 1 << 20}
    ends = endpoints(4)
    rng = np.random.default_rng(1)
    for count in edge_lengths(len(members), storage(dtype).itemsize, options):
        contributions = [random_elements(dtype, count, rng) for _ in members]
        expected = reference_sum(dtype, contributions, [1.0] * len(members))
        for member in allreduce(ends, members, dtype, contributions, **options):
            member.check(expected)


@BOTH_ALGORITHMS
@given(
    dtype=st.sampled_from(FLOATS),
    members=st.sets(st.integers(0, 5), min_size=1),
    count=st.integers(0, 20_000),
    special=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_rank_order_weights_and_scale_bit_for_bit(
    options: dict[str, Any], dtype: str, members: set[int], count: int, special: bool, seed: int
) -> None:
    ranks = sorted(members)
    rng = np.random.default_rng(seed)
    contributions = [random_elements(dtype, count, rng, special=special) for _ in ranks]
    weights = [float(weight) for weight in rng.choice([1.0, 0.25, 3.7], len(ranks))]
    scale = 1 / sum(weights)
    expected = reference_sum(dtype, contributions, weights, scale)
    for member in allreduce(endpoints(6), ranks, dtype, contributions, weights, scale=scale, **options):
        member.check(expected)


@BOTH_ALGORITHMS
def test_one_member_alone_is_scaled(options: dict[str, Any]) -> None:
    data = np.arange(5000, dtype=np.float32)
    (alone,) = allreduce(endpoints(3), [1], "float32", [data], [2.0], scale=0.25, **options)
    alone.check(data / 2)


@pytest.mark.parametrize("size", [33, 200])
@pytest.mark.parametrize("count", [5, 4000, 100_000])
def test_hundreds_of_members(size: int, count: int) -> None:
    rng = np.random.default_rng(2)
    contributions = [random_elements("float32", count, rng) for _ in range(size)]
    expected = reference_sum("float32", contributions, [1.0] * size)
    members = allreduce(
        endpoints(size), range(size), "float32", contributions, small_bytes=1 << 14, staging_bytes=1 << 18
    )
    for member in members:
        member.check(expected)


@BOTH_ALGORITHMS
@pytest.mark.parametrize("seed", range(10))
def test_many_at_once_over_different_sets(options: dict[str, Any], seed: int) -> None:
    """Collectives that overlap in time and in members, each rank starting its own in another order, at any moment."""
    order = random.Random(seed)
    ends = endpoints(5)
    groups = [list(members) for members in subsets(5)]
    order.shuffle(groups)
    calls = []
    for number, group in enumerate(groups):
        count = order.choice([1, 100, 3000, 9000])
        contributions = [signature(rank, count, "int64") + number for rank in group]
        expected = sum(contributions[1:], contributions[0])
        for rank, data in zip(group, contributions, strict=True):
            calls.append((Member(ends[rank], "int64", data), group, 2 * number, expected))
    order.shuffle(calls)
    for member, group, tag, _ in calls:
        member.start(group, [1.0] * len(group), tag=tag, **options)
        for _ in range(order.randrange(3)):
            order.choice(ends).progress()
    finish([member for member, *_ in calls])
    for member, _, _, expected in calls:
        member.check(expected)
    assert [end.pending for end in ends] == [0] * 5


@BOTH_ALGORITHMS
def test_a_rank_that_has_stopped_holds_up_only_its_own(options: dict[str, Any]) -> None:
    """Rank 3 has started its part and stops: the sets without it go on, and its own goes on when it does."""
    ends = endpoints(4)
    data = [signature(rank, 5000, "int32") for rank in range(4)]
    held = [Member(ends[rank], "int32", data[rank]) for rank in range(4)]
    for member in held:
        member.start(range(4), [1.0] * 4, tag=100, **options)
    for tag in range(0, 40, 2):
        members = allreduce(ends, [0, 1, 2], "int32", data[:3], tag=tag, **options)
        for member in members:
            member.check(data[0] + data[1] + data[2])
    assert not any(member.collective.done for member in held)
    finish(held)
    for member in held:
        member.check(sum(data[1:], data[0]))


@pytest.mark.parametrize("size", [2, 5])
def test_on_threads(size: int) -> None:
    """Ranks that really run at the same time, over and over, in sets that change from step to step."""
    hub = core.Hub(size)
    steps = [random.Random(step).sample(range(size), 1 + step % size) for step in range(60)]

    def body(rank: int) -> None:
        end = core.Endpoint.in_process(hub, rank)
        for step, group in enumerate(sorted(group) for group in steps):
            if rank not in group:
                continue
            count = (7, 1000, 70_000)[step % 3]
            contributions = [signature(other, count, "float32") for other in group]
            member = Member(end, "float32", contributions[group.index(rank)])
            member.start(group, [1.0] * len(group), tag=2 * step, segment_bytes=8192)
            end.finish([member.collective], timeout_s=30)
            member.check(reference_sum("float32", contributions, [1.0] * len(group)))

    run_threads(size, body)


def allreduce_over_mpi(end: core.Endpoint) -> None:
    """Every set of contributors at many sizes, then several at once, with the default cuts and with small ones."""
    cases = itertools.product(subsets(end.size), (0, 1, 1000, 30_000, 400_000), ({}, SMALL_SEGMENTS))
    for number, (group, count, options) in enumerate(cases):
        if end.rank not in group:
            continue
        contributions = [signature(rank, count, "float32") for rank in group]
        member = Member(end, "float32", contributions[group.index(end.rank)])
        member.start(group, [1.0] * len(group), scale=0.5, tag=2 * number, **options)
        end.finish([member.collective])
        member.check(reference_sum("float32", contributions, [1.0] * len(group), 0.5))
    everybody = range(end.size)
    several = [Member(end, "int64", signature(end.rank, 50_000 + n, "int64")) for n in range(10)]
    for n in range(10) if end.rank % 2 else reversed(range(10)):
        several[n].start(everybody, [1.0] * end.size, tag=1000 + 2 * n)
    end.finish([member.collective for member in several])
    for n, member in enumerate(several):
        member.check(sum(signature(rank, 50_000 + n, "int64") for rank in everybody))


@pytest.mark.parametrize("share_memory", [True, False], ids=["shared-memory", "mpi-alone"])
@pytest.mark.ranks(1, 2, 4)
def test_over_mpi(size: int, share_memory: bool) -> None:
    from mpi4py import MPI

    end = core.Endpoint.over_mpi(MPI._addressof(MPI.COMM_WORLD), share_memory=share_memory)
    assert end.size == size
    allreduce_over_mpi(end)


@pytest.mark.ranks(3)
def test_over_mpi_in_pieces() -> None:
    from mpi4py import MPI

    end = core.Endpoint.over_mpi(MPI._addressof(MPI.COMM_WORLD), piece_bytes=10_000, share_memory=False)
    allreduce_over_mpi(end)


CHUNK = 1 << 25  # bytes


@contextmanager
def sparse_float16(count: int, places: Sequence[int]) -> Iterator[Array]:
    """A buffer of zeros with memory of its own around `places` only: the rest is one chunk, mapped again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    access = mmap.PROT_READ | mmap.PROT_WRITE
    size = -(-2 * count // CHUNK) * CHUNK
    base = libc.mmap(None, size, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert base != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    own = {2 * place // CHUNK * CHUNK for place in places}
    file = os.memfd_create("chunk")
    os.ftruncate(file, CHUNK)
    for offset in set(range(0, size, CHUNK)) - own:
        at = libc.mmap(base + offset, CHUNK, access, mmap.MAP_SHARED | 0x10, file, 0)  # 0x10: MAP_FIXED
        assert at == base + offset, os.strerror(ctypes.get_errno())
    os.close(file)
    try:
        yield np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(base)).view(np.float16)
    finally:
        libc.munmap(base, size)


def test_more_than_2_to_the_31_elements() -> None:
    """2^31 + 37 elements of float16, all zero but for planted values, within 2 GiB of memory."""
    count = 2**31 + 37
    places = [0, count // 2 - 1, count // 2, count // 2 + 16, 2**31 - 1, 2**31, 2**31 + 1, count - 1]
    with ExitStack() as stack:
        ends = endpoints(2)
        contributions, results = (
            [stack.enter_context(sparse_float16(count, places)) for _ in ends] for _ in ("contributions", "results")
        )
        for rank, contribution in enumerate(contributions):
            contribution[places] = 2.0**rank * (1 + np.arange(len(places)))
        started = [
            end.start_allreduce(
                members=[0, 1],
                weights=[1.0, 1.0],
                dtype="float16",
                count=count,
                contribution=contribution.ctypes.data,
                result=result.ctypes.data,
            )
            for end, contribution, result in zip(ends, contributions, results, strict=True)
        ]
        while not all(collective.done for collective in started):
            assert sum(end.progress() for end in ends)
        for result in results:
            assert result[places].tolist() == [3.0 * (1 + number) for number in range(len(places))]
            step = CHUNK // 2
            nonzero = [np.count_nonzero(result[at : at + step].view(np.uint16)) for at in range(0, count, step)]
            assert sum(nonzero) == len(places)


@given(
    count=st.one_of(st.integers(0, 1000), st.integers(0, 2**62)),
    parts=st.one_of(st.integers(1, 20), st.integers(1, 5000)),
)
def test_shards_cover_everything_once_and_evenly(count: int, parts: int) -> None:
    shards = [core.shard_of(count, parts, part) for part in range(parts)]
    assert shards[0][0] == 0 and shards[-1][1] == count
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(shards))
    assert all(begin <= end for begin, end in shards)
    assert all(begin % GRANULE == 0 or begin == count for begin, _ in shards)
    granules = [-(-(end - begin) // GRANULE) for begin, end in shards]
    assert max(granules) - min(granules) <= 1


@given(
    members=st.integers(1, 5000),
    element_bytes=st.sampled_from([2, 4, 8]),
    segment_bytes=st.integers(0, 2**40),
    staging_bytes=st.integers(0, 2**40),
)
def test_staging_memory_is_bounded(members: int, element_bytes: int, segment_bytes: int, staging_bytes: int) -> None:
    segment = core.segment_elements(members, element_bytes, segment_bytes, staging_bytes)
    assert segment > 0 and segment % GRANULE == 0
    assert segment * element_bytes <= max(segment_bytes, core.min_segment_bytes)
    arriving = core.staging_slots * (members - 1) * segment * element_bytes
    assert arriving <= max(staging_bytes, core.staging_slots * core.min_segment_bytes * (members - 1))


@BOTH_ALGORITHMS
@given(progress=st.lists(st.integers(0, 2), max_size=60), asleep=st.integers(0, 2))
def test_an_abandoned_collective_touches_nothing_and_disturbs_no_other(
    options: dict[str, int], progress: list[int], asleep: int
) -> None:
    """One member stops in the middle; the others say whom they miss, give up, and sum without it; then it goes on."""
    ends = endpoints(3)
    count = 20_000
    first = [Member(end, "float32", np.full(count, 2.0**end.rank, np.float32)) for end in ends]
    for member in first:
        member.start([0, 1, 2], [1.0] * 3, tag=0, cancellable=True, **options)
    for rank in progress:
        ends[rank].progress()
    awake = [rank for rank in range(3) if rank != asleep]
    while sum(ends[rank].progress() for rank in awake):
        pass
    for rank in awake:
        contributions, results = first[rank].collective.missing()
        assert not first[rank].collective.done or not contributions + results
        assert set(contributions) <= {asleep}
    for rank in awake:
        first[rank].collective.abandon()
        first[rank].frame[:] = 77  # nothing of it is written any more
        first[rank].contribution[:] = 100  # or read
    second = [Member(ends[rank], "float32", np.full(count, 2.0**rank, np.float32)) for rank in awake]
    for member in second:
        member.start(awake, [1.0, 1.0], tag=2, cancellable=True, **options)
    finish(second)
    ends[asleep].progress()
    first[asleep].collective.abandon()
    while sum(end.progress() for end in ends):
        pass
    for member in second:
        member.check(np.full(count, sum(2.0**rank for rank in awake), np.float32))
    for rank in awake:
        assert (first[rank].frame == 77).all()
    assert [end.pending for end in ends] == [0, 0, 0]


def test_wrong_arguments_are_refused() -> None:
    end = endpoints(3)[1]
    data = np.zeros(4, np.float32)

    def start(members: list[int], weights: list[float], tag: int = 0) -> None:
        end.start_allreduce(
            members=members,
            weights=weights,
            dtype="float32",
            count=4,
            contribution=data.ctypes.data,
            result=data.ctypes.data,
            tag=tag,
        )

    for members, complaint in (
        ([1, 0], "ascending"),
        ([1, 1], "ascending"),
        ([0, 2], "rank 1 has called, but is not a member"),
        ([], "rank 1 has called, but is not a member"),
        ([1, 3], "members 1 to 3 among 3 ranks"),
        ([-1, 1], "members -1 to 1"),
    ):
        with pytest.raises(core.UsageError, match=complaint):
            start(members, [1.0] * len(members))
    with pytest.raises(core.UsageError, match="1 weights for 2 members"):
        start([0, 1], [1.0])
    with pytest.raises(core.UsageError, match="tags -1 and 0"):
        start([0, 1], [1.0, 1.0], tag=-1)


def test_widened_signatures_are_exact() -> None:
    """What the tests above rest on: the largest sum of signatures is exact in every dtype."""
    for dtype in DTYPES:
        total = from_numbers(dtype, np.array([7.0 * 31]))
        assert widened(dtype, total)[0] == 217
