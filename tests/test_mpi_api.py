"""hvd_backup.mpi in real processes: results, contributors, errors on every rank, and every way to end.

Rank r contributes 2^r, so a sum names its contributors.
"""

import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.launch import run_ranks, start_ranks
from tests.rank_main import mark

DTYPES = ("float16", "float32", "float64", "int32", "int64")


def error_of(call: Callable[[], object]) -> BaseException:
    """The exception that `call` raises; it must raise one."""
    try:
        value = call()
    except Exception as error:
        return error
    raise AssertionError(f"nothing was raised, but {value!r} returned")


def until_error(call: Callable[[], object]) -> None:
    """Calls until `call` raises: where not all are needed, a difference shows when the differing rank has called."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        call()
        time.sleep(0.01)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(1, 2, 4)
def test_places(size: int) -> None:
    import hvd_backup.mpi as hvd

    assert not hvd.is_initialized()
    hvd.init()
    hvd.init()
    assert hvd.is_initialized()
    assert hvd.mpi_threads_supported()
    assert hvd.size() == hvd.local_size() == size
    assert hvd.rank() == hvd.local_rank()
    assert sorted(hvd.allgather_object(hvd.rank())) == list(range(size))
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    hvd.shutdown()
    hvd.shutdown()
    assert not hvd.is_initialized()


@pytest.mark.ranks(1, 2, 4)
def test_allreduce_of_every_dtype_and_layout(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    everybody = 2**size - 1
    mine = 2 ** hvd.rank()
    for dtype in DTYPES:
        tensor = np.full((3, 5), mine, dtype)
        total = hvd.allreduce(tensor, op=hvd.Sum)
        assert total.dtype == tensor.dtype
        np.testing.assert_array_equal(total, np.full((3, 5), everybody, dtype))
        mean = everybody // size if "int" in dtype else everybody / size
        np.testing.assert_array_equal(hvd.allreduce(tensor, name="mean." + dtype), np.full((3, 5), mean, dtype))
        np.testing.assert_array_equal(tensor, mine)
        for op, expected in ((hvd.Min, 1), (hvd.Max, 2 ** (size - 1)), (hvd.Product, 2 ** (size * (size - 1) // 2))):
            np.testing.assert_array_equal(hvd.allreduce(tensor, op=op), np.full((3, 5), expected, dtype))
    assert hvd.allreduce(np.float64(mine), op=hvd.Sum).shape == ()
    assert hvd.allreduce(mine, op=hvd.Sum).item() == everybody
    assert hvd.allreduce(-mine).item() == -everybody // size, "the floor, not the truncation"
    assert hvd.allreduce(np.empty((0, 3))).shape == (0, 3)
    strided = np.arange(24.0).reshape(4, 6)[::2, ::3] + mine
    np.testing.assert_array_equal(hvd.allreduce(strided.T, op=hvd.Max), strided.T - mine + 2 ** (size - 1))
    swapped = np.full(3, mine, ">f4")
    np.testing.assert_array_equal(hvd.allreduce(swapped, op=hvd.Sum), np.full(3, everybody, "f4"))
    large = np.full(1_000_003, mine, np.float32)
    np.testing.assert_array_equal(hvd.allreduce(large, op=hvd.Sum), np.full(1_000_003, everybody, np.float32))


@pytest.mark.ranks(1, 2, 4)
def test_collectives_that_move_data(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    rank = hvd.rank()
    for root in range(size):
        tensor = np.arange(6, dtype=np.int16).reshape(2, 3) * (rank + 1)
        np.testing.assert_array_equal(hvd.broadcast(tensor, root), np.arange(6).reshape(2, 3) * (root + 1))
        np.testing.assert_array_equal(tensor, np.arange(6).reshape(2, 3) * (rank + 1))
        assert hvd.broadcast_object({"from": rank, "data": bytes(100_000)}, root, name="state")["from"] == root
    assert hvd.broadcast(np.bool_(rank == 0), 0).item() is True
    gathered = hvd.allgather(np.full((rank, 2), rank, np.float16))
    np.testing.assert_array_equal(gathered, np.repeat(np.arange(size), np.arange(size))[:, None] * np.ones((1, 2)))
    np.testing.assert_array_equal(hvd.allgather(rank), np.arange(size))
    assert hvd.allgather(np.empty((0, 4))).shape == (0, 4)
    assert hvd.allgather(np.empty((2, 0))).shape == (2 * size, 0)
    assert hvd.allgather_object("x" * rank) == ["x" * r for r in range(size)]
    hvd.barrier()


@pytest.mark.ranks(2)
def test_long_messages_go_in_pieces(size: int) -> None:
    import hvd_backup.mpi as hvd
    from hvd_backup import byte_collectives

    byte_collectives.PIECE_BYTES = 1000
    hvd.init()
    tensor = np.arange(1001, dtype=np.float64) * (1 - 2 * hvd.rank())
    np.testing.assert_array_equal(hvd.broadcast(tensor, 0), np.arange(1001))
    np.testing.assert_array_equal(hvd.allreduce(tensor, op=hvd.Max), np.arange(1001))
    assert hvd.broadcast_object(list(range(1000 + hvd.rank())), 1) == list(range(1001))


@pytest.mark.ranks(1, 2, 4)
def test_first_n_waits_for_n_and_says_who_contributed(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    for n in range(1, size + 1):
        for dtype in DTYPES:
            tensor = np.full(7, 2 ** hvd.rank(), dtype)
            total, contributors = hvd.first_n_allreduce(tensor, n, op=hvd.Sum)
            assert len(contributors) >= n
            assert list(contributors) == sorted(set(contributors))
            expected = sum(2**rank for rank in contributors)
            np.testing.assert_array_equal(total, np.full(7, expected, dtype))
            assert len(set(hvd.allgather_object((contributors, total.tobytes())))) == 1
            mean, contributors = hvd.first_n_allreduce(tensor, n=n, name=f"{dtype}.{n}")
            exact = sum(2**rank for rank in contributors) / len(contributors)
            np.testing.assert_allclose(mean, np.floor(exact) if "int" in dtype else exact, rtol=1e-3)


@pytest.mark.ranks(4)
def test_nobody_waits_for_the_late_who_gets_what_the_others_computed(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    outcomes, arrived, had = [], [], []
    for step in range(6):
        if hvd.rank() == 3 and step == 0:
            time.sleep(2.0)
        arrived.append(time.monotonic())
        outcomes.append(hvd.first_n_allreduce(np.full(1000, 2.0 ** hvd.rank() + step), backup_workers=1, op=hvd.Sum))
        had.append(time.monotonic())
        if step == 2:
            hvd.barrier()  # the late one is back
    told = [(contributors, result[0].item()) for result, contributors in outcomes]
    assert told[:3] == [((0, 1, 2), 7.0 + 3 * step) for step in range(3)]
    assert all(len(contributors) >= 3 for contributors, _ in told[3:])
    assert len(set(map(tuple, hvd.allgather_object(tuple(told))))) == 1
    late_at = hvd.allgather_object(arrived[0])[3]
    assert hvd.rank() == 3 or had[2] < late_at, "the late one was waited for"


@pytest.mark.ranks(2)
def test_the_environment_says_how_many_are_waited_for(size: int) -> None:
    import hvd_backup.mpi as hvd

    os.environ["HVD_BACKUP_BACKUP_WORKERS"] = "0.5"
    hvd.init()
    if hvd.rank() == 0:
        assert hvd.first_n_allreduce([1.0], name="x").contributors == (0,)
    hvd.barrier()
    if hvd.rank() == 1:
        assert hvd.first_n_allreduce([1.0], name="x").contributors == (0,), "it came late"


@pytest.mark.ranks(1, 2, 4)
def test_many_at_a_time(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    mine = 2.0 ** hvd.rank()
    for _ in range(3):
        named = [hvd.allreduce_async(np.full(i + 1, mine), f"layer.{i}", hvd.Sum) for i in range(20)]
        unnamed = [hvd.allreduce_async(np.full(3, mine * i), op=hvd.Sum) for i in range(20)]
        for i, handle in reversed(list(enumerate(unnamed))):
            np.testing.assert_array_equal(hvd.synchronize(handle), (2.0**size - 1) * i)
        for i, handle in enumerate(named):
            result = hvd.synchronize(handle)
            np.testing.assert_array_equal(result, np.full(i + 1, 2.0**size - 1))
            assert hvd.poll(handle)
            assert hvd.synchronize(handle) is result
    handle = hvd.first_n_allreduce_async(np.ones(4), n=size, name="polled")
    while not hvd.poll(handle):
        time.sleep(0.001)
    assert hvd.synchronize(handle).contributors == tuple(range(size))


@pytest.mark.ranks(1, 2, 4)
def test_one_name_with_several_shapes(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    for length in (4, 3, 4, 3, 5):
        np.testing.assert_array_equal(hvd.allreduce(np.ones(length), name="loss", op=hvd.Sum), np.full(length, size))


@pytest.mark.ranks(4)
def test_join_is_for_uneven_data(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    rank = hvd.rank()
    for epoch in range(2):
        for step in range(3 + rank):
            total, mean = hvd.allreduce([2.0**rank], op=hvd.Sum)[0], hvd.allreduce([float(rank)], name="mean")[0]
            contributors = [r for r in range(size) if step < 3 + r]
            assert total == sum(2.0**r for r in contributors), (epoch, step)
            assert mean == sum(contributors) / len(contributors)
        assert hvd.join() == 3
        assert hvd.allreduce([2.0**rank], op=hvd.Sum)[0] == 15, "all are back"


@pytest.mark.ranks(2, timeout_s=60)
def test_a_joined_rank_holds_nobody_up(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    if hvd.rank() == 0:
        for _ in range(1100):  # more than a journal ever holds
            hvd.allreduce([1.0], name="x")
    assert hvd.join() == 0


@pytest.mark.ranks(4)
def test_collectives_that_need_a_joined_rank_say_so(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    if hvd.rank() < 2:
        error = error_of(lambda: hvd.broadcast(np.ones(1), 0))
        assert "ranks 2, 3 called join()" in str(error)
    hvd.join()
    hvd.barrier()


@pytest.mark.ranks(4, timeout_s=60)
def test_a_rank_in_a_full_collective_is_not_waited_for(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    hvd.first_n_allreduce([1.0], n=3, name="x")
    if hvd.rank() < 2:
        for _ in range(5):
            assert set(hvd.first_n_allreduce([1.0], n=3, name="x").contributors) <= {0, 1, 2, 3}
    hvd.barrier()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(2, 4)
def test_ranks_that_differ_are_told_on_every_rank(size: int) -> None:
    import hvd_backup.mpi as hvd
    from hvd_backup.errors import HvdBackupError

    hvd.init()
    odd = hvd.rank() == size - 1
    cases: list[tuple[str, Callable[[str | None], object], tuple[str, str]]] = [
        ("shape", lambda name: hvd.allreduce(np.ones((3, 2) if odd else (2, 3)), name), ("(3, 2)", "(2, 3)")),
        ("dtype", lambda name: hvd.allreduce(np.ones(2, "i4" if odd else "f4"), name), ("int32", "float32")),
        ("op", lambda name: hvd.allreduce(np.ones(2), name, hvd.Sum if odd else hvd.Average), ("op sum", "op average")),
        ("n", lambda name: until_error(lambda: hvd.first_n_allreduce([1.0], 1 + odd, name)), ("n 2", "n 1")),
    ]
    for what, call, texts in cases:
        for name in (what, None):
            error = error_of(lambda call=call, name=name: call(name))  # type: ignore[misc]
            assert isinstance(error, HvdBackupError)
            assert all(text in str(error) for text in texts), str(error)
            assert f"rank {size - 1}" in str(error), str(error)
            if name is not None:
                again = error_of(lambda call=call, name=name: call(name))  # type: ignore[misc]
                assert str(again) == str(error), f"it stays failed, and says why: {again}"
            hvd.barrier()
    np.testing.assert_array_equal(hvd.allreduce(np.ones(5), op=hvd.Sum), size)


@pytest.mark.ranks(2, 4)
def test_different_collectives_are_told_on_every_rank(size: int) -> None:
    import hvd_backup.mpi as hvd
    from hvd_backup.errors import UsageError

    hvd.init()
    odd = hvd.rank() == size - 1
    pairs: list[tuple[Callable[[], object], Callable[[], object], tuple[str, str]]] = [
        (lambda: hvd.broadcast([1.0], 0), lambda: hvd.broadcast([1.0], 1), ("root_rank=0", "root_rank=1")),
        (lambda: hvd.broadcast([1.0], 0), lambda: hvd.broadcast([1.0, 2.0], 0), ("float64[1]", "float64[2]")),
        (hvd.barrier, lambda: hvd.allgather([1]), ("barrier()", "allgather(int64[any]")),
        (lambda: hvd.allgather([[1]]), lambda: hvd.allgather([[1, 2]]), ("int64[any, 1]", "int64[any, 2]")),
        (lambda: hvd.allreduce([1], op=hvd.Min), lambda: hvd.allreduce([1], op=hvd.Max), ("op=MIN", "op=MAX")),
        (lambda: hvd.broadcast_object(1), lambda: hvd.allgather_object(1), ("broadcast_object", "allgather_object")),
    ]
    for usual, other, texts in pairs:
        error = error_of(other if odd else usual)
        assert isinstance(error, UsageError)
        assert all(text in str(error) for text in (*texts, f"rank {size - 1}: ")), str(error)
    hvd.barrier()


@pytest.mark.ranks(1, 2)
def test_wrong_use_is_refused_at_once(size: int) -> None:
    import hvd_backup.mpi as hvd
    from hvd_backup.errors import NotInitializedError, UsageError

    calls: dict[str, Callable[[], object]] = {
        "rank": hvd.rank,
        "first_n": lambda: hvd.first_n_allreduce([1.0]),
        "allreduce": lambda: hvd.allreduce([1.0]),
        "min": lambda: hvd.allreduce([1.0], op=hvd.Min),
        "broadcast": lambda: hvd.broadcast([1.0], 0),
        "allgather": lambda: hvd.allgather([1.0]),
        "barrier": hvd.barrier,
        "join": hvd.join,
    }
    for call in calls.values():
        error = error_of(call)
        assert isinstance(error, NotInitializedError)
        assert "call hvd.init() first" in str(error)
    hvd.init()
    ones = np.ones(3)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: hvd.first_n_allreduce(ones, 0), "n=0: expected n from 1"),
        (lambda: hvd.first_n_allreduce(ones, size + 1), f"n={size + 1}: expected n from 1 to {size}"),
        (lambda: hvd.first_n_allreduce(ones, True), "n=True"),
        (lambda: hvd.first_n_allreduce(ones, backup_workers=size), f"backup_workers={size}: expected"),
        (lambda: hvd.first_n_allreduce(ones, backup_workers=-1), "backup_workers=-1"),
        (lambda: hvd.first_n_allreduce(ones, 1, backup_workers=0), "not both"),
        (lambda: hvd.first_n_allreduce(ones, op=hvd.Max), "only"),
        (lambda: hvd.first_n_allreduce(np.ones(3, np.int8)), "int8 is not supported, only float16"),
        (lambda: hvd.allreduce(np.ones(3, complex)), "complex128 is not supported"),
        (lambda: hvd.allreduce(np.ones(3, complex), op=hvd.Max), "complex128"),
        (lambda: hvd.allreduce(ones, op="sum"), "op='sum'"),  # type: ignore[arg-type]
        (lambda: hvd.allreduce(ones, False), "op=Sum"),  # type: ignore[arg-type]
        (lambda: hvd.allgather(np.array([None])), "allgather_object"),
        (lambda: hvd.broadcast(np.array([None]), 0), "broadcast_object"),
        (lambda: hvd.broadcast(ones, size), f"root_rank={size}"),
        (lambda: hvd.broadcast_object(1, -1), "root_rank=-1"),
        (lambda: hvd.init([9]), "different ranks of MPI.COMM_WORLD"),  # type: ignore[arg-type]
    ]
    for call, text in wrong:
        error = error_of(call)
        assert isinstance(error, UsageError), repr(error)
        assert text in str(error), str(error)
    handle = hvd.allreduce_async(ones, "busy")
    assert "'busy' is under way" in str(error_of(lambda: hvd.allreduce_async(ones, "busy")))
    hvd.synchronize(handle)
    hvd.allreduce(ones, "busy")
    hvd.shutdown()
    for call in calls.values():
        error = error_of(call)
        assert isinstance(error, NotInitializedError)
        assert "after shutdown()" in str(error)
    hvd.init()
    np.testing.assert_array_equal(hvd.allreduce(ones, "busy", hvd.Sum), size)


@pytest.mark.ranks(4)
def test_a_communicator_of_some_ranks(size: int) -> None:
    from mpi4py import MPI

    import hvd_backup.mpi as hvd
    from hvd_backup.errors import UsageError

    world = MPI.COMM_WORLD
    half = world.Split(world.rank % 2, key=-world.rank)
    hvd.init(half)
    assert (hvd.rank(), hvd.size()) == (half.rank, 2)
    assert hvd.allreduce([2.0**world.rank], op=hvd.Sum)[0] == (5 if world.rank % 2 == 0 else 10)
    hvd.init(half)
    error = error_of(lambda: hvd.init(world))
    assert isinstance(error, UsageError)
    assert "another communicator" in str(error)
    half.Free()
    hvd.barrier()
    hvd.shutdown()
    hvd.init(world)
    assert hvd.size() == 4


@pytest.mark.ranks(1)
def test_a_followed_loop_with_backup_workers_refuses_full_collectives(size: int) -> None:
    import hvd_backup.mpi as hvd
    from hvd_backup import context
    from hvd_backup.errors import UsageError

    class Optimizer:
        backup_workers = 1
        followed = True
        at_meeting = False

        def __init__(self) -> None:
            self.left: list[str] = []

        def in_followed_round(self) -> bool:
            return self.followed

        def aligned(self) -> bool:
            return self.at_meeting

        def leave_round(self, what: str) -> None:
            self.left.append(what)

    hvd.init()
    optimizer = Optimizer()
    context.current().register(optimizer)
    for call in (lambda: hvd.allreduce([1.0]), hvd.barrier, hvd.join, lambda: hvd.allreduce_async([1.0])):
        error = error_of(call)
        assert isinstance(error, UsageError)
        assert all(text in str(error) for text in ("optimizer.metrics(", "align_every=k"))
    hvd.first_n_allreduce([1.0])
    optimizer.at_meeting = True
    hvd.barrier()
    optimizer.at_meeting, optimizer.backup_workers = False, 0
    hvd.barrier()
    assert optimizer.left == [], "follow ends its rounds itself"
    optimizer.followed = False
    hvd.barrier()
    assert optimizer.left == ["barrier()"]
    del optimizer
    hvd.barrier()


@pytest.mark.ranks(2)
def test_delays_come_from_the_environment(size: int) -> None:
    import hvd_backup.mpi as hvd
    from hvd_backup import faults

    os.environ["HVD_BACKUP_DELAY"] = "rank=1,ms=50,steps=2"
    hvd.init()
    start = time.perf_counter()
    faults.sleep(1)
    faults.sleep(2)
    waited = time.perf_counter() - start
    assert (waited >= 0.05) == (hvd.rank() == 1)


# --- beginnings and ends ---------------------------------------------------------------------------------------------


def init_with(thread_level: str | None, environ: dict[int, dict[str, str]]) -> str:
    """Whatever init() raises on this rank, as text."""
    import mpi4py

    if thread_level is not None:
        mpi4py.rc.thread_level = thread_level
    from mpi4py import MPI

    os.environ.update(environ.get(MPI.COMM_WORLD.rank, {}))
    import hvd_backup.mpi as hvd

    error = error_of(hvd.init)
    assert not hvd.is_initialized()
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("level", ["single", "funneled", "serialized"])
def test_a_thread_level_that_is_too_low_is_told_on_every_rank(level: str) -> None:
    for text in run_ranks(2, init_with, (level, {})):
        assert "MPI_THREAD_MULTIPLE" in text
        assert 'mpi4py.rc.thread_level = "multiple"' in text


def test_a_bad_environment_of_one_rank_is_told_on_every_rank() -> None:
    texts = run_ranks(4, init_with, (None, {2: {"HVD_BACKUP_GARCE": "1"}}))
    assert all(text.startswith("ConfigError") and "did you mean HVD_BACKUP_GRACE?" in text for text in texts)
    assert ["on rank 2" in text for text in texts] == [True, True, False, True]


def test_processes_that_mpi_knows_nothing_of_are_refused() -> None:
    (text,) = run_ranks(1, init_with, (None, {0: {"HOROVOD_SIZE": "4", "HOROVOD_CONTROLLER": "gloo"}}))
    assert "mpirun -np 4 python" in text
    assert "horovodrun --mpi -np 4 python" in text


def test_two_mpi_libraries_in_one_process_are_told() -> None:
    from hvd_backup import launch_check
    from hvd_backup.errors import UsageError

    launch_check.check_library("Open MPI v5.0.11, package: one\0", "Open MPI v5.0.11, package: one")
    error = error_of(
        lambda: launch_check.check_library("MPICH Version: 4.3.0\nDate: ...", "Open MPI v5.0.11, package: one")
    )
    assert isinstance(error, UsageError)
    assert all(text in str(error) for text in ("'MPICH Version: 4.3.0'", "'Open MPI v5.0.11'", "rebuild hvd_backup"))


def finalize_early(at: str) -> tuple[bool, str]:
    from mpi4py import MPI

    import hvd_backup.mpi as hvd

    if at == "before init":
        MPI.Finalize()
        return hvd.is_initialized(), str(error_of(hvd.init))
    hvd.init()
    hvd.allreduce([1.0])
    MPI.Finalize()
    return hvd.is_initialized(), str(error_of(lambda: hvd.allreduce([1.0])))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mpi_finalised_early(size: int) -> None:
    for initialized, text in run_ranks(size, finalize_early, ("after init",)):
        assert not initialized
        assert "after MPI.Finalize()" in text
    for _, text in run_ranks(size, finalize_early, ("before init",)):
        assert "call hvd.init() before MPI.Finalize()" in text


def test_mpi_that_nobody_has_initialised() -> None:
    source = """
        import mpi4py
        mpi4py.rc.initialize = False
        import hvd_backup.mpi as hvd
        hvd.init()
        result = hvd.allreduce([1.0], op=hvd.Sum).tolist()
    """
    assert run_ranks(2, source) == [[2.0], [2.0]]


def leave(how: str, n: int) -> tuple[list[tuple[int, ...]], str]:
    """The last rank leaves in step 3; the contributors of each step, and what was raised in the end."""
    import hvd_backup.mpi as hvd

    hvd.init()
    seen: list[tuple[int, ...]] = []
    for step in range(6):
        if step == 3 and hvd.rank() == hvd.size() - 1:
            if how == "exception":
                raise ValueError("broken data")
            sys.exit(0)
        try:
            seen.append(hvd.first_n_allreduce([1.0], n, name="x").contributors)
        except RuntimeError as error:
            return seen, str(error)
    return seen, ""


@pytest.mark.parametrize("how", ["exception", "exit"])
def test_a_rank_that_leaves_is_told_where_all_are_needed(how: str) -> None:
    with start_ranks(4, leave, (how, 4), timeout_s=60) as job:
        outcome = job.wait()
    assert [rank.state for rank in outcome.ranks] == ["returned"] * 3 + [
        "raised" if how == "exception" else "returned"
    ], outcome.describe()
    for rank in outcome.ranks[:3]:
        seen, text = rank.value
        assert len(seen) == 3
        assert "rank 3 has left" in text
        assert "broken data" in text or how == "exit"
    assert "ValueError: broken data" in outcome.ranks[3].error or how == "exit"


@pytest.mark.parametrize("how", ["exception", "exit"])
def test_a_rank_that_leaves_costs_nothing_where_not_all_are_needed(how: str) -> None:
    with start_ranks(4, leave, (how, 3), timeout_s=60) as job:
        outcome = job.wait()
    for rank in outcome.ranks[:3]:
        assert rank.state == "returned", outcome.describe()
        seen, text = rank.value
        assert text == ""
        assert seen[3:] == [(0, 1, 2)] * 3


def fail_or_call(what: str) -> str:
    import hvd_backup.mpi as hvd

    hvd.init()
    hvd.barrier()
    if hvd.rank() == 1:
        time.sleep(0.2)  # rank 0 is through the barrier, and waits in its next collective
        raise ValueError("broken data")
    calls: dict[str, Callable[[], object]] = {
        "barrier": hvd.barrier,
        "broadcast": lambda: hvd.broadcast([1.0], 1),
        "allreduce": lambda: hvd.allreduce([1.0]),
        "min": lambda: hvd.allreduce([1.0], op=hvd.Min),
        "allgather_object": lambda: hvd.allgather_object(1),
    }
    return str(error_of(calls[what]))


@pytest.mark.parametrize("what", ["barrier", "broadcast", "allreduce", "min", "allgather_object"])
def test_no_collective_waits_for_a_rank_that_has_failed(what: str) -> None:
    with start_ranks(2, fail_or_call, (what,), timeout_s=60) as job:
        outcome = job.wait()
    assert [rank.state for rank in outcome.ranks] == ["returned", "raised"], outcome.describe()
    assert "rank 1 has left" in outcome.ranks[0].value


def wait_for_ever() -> str:
    import hvd_backup.mpi as hvd

    hvd.init()
    hvd.barrier()
    mark("waiting")
    if hvd.rank() == 0:
        hvd.allreduce(np.ones(10), "x")
    time.sleep(3600)
    return "not interrupted"


def test_ctrl_c_ends_a_rank_that_waits() -> None:
    with start_ranks(2, wait_for_ever, timeout_s=60) as job:
        for rank in range(2):
            job.wait_for_mark(rank, "waiting")
        time.sleep(0.2)
        for rank in range(2):
            os.kill(job.pid(rank), signal.SIGINT)
        outcome = job.wait()
    assert [rank.state for rank in outcome.ranks] == ["raised", "raised"], outcome.describe()
    assert all("KeyboardInterrupt" in rank.error for rank in outcome.ranks)
    assert "channel.wait()" in outcome.ranks[0].error


@pytest.mark.ranks(2)
def test_a_forked_child_leaves_the_engine_alone(size: int) -> None:
    import hvd_backup.mpi as hvd

    hvd.init()
    child = os.fork()
    if child == 0:
        hvd.shutdown()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert hvd.allreduce([1.0], op=hvd.Sum)[0] == size
