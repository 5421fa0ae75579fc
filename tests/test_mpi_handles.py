"""What the core takes from MPI it gives back: communicators, requests and matched messages, counted at MPI itself.

tests/mpi_handles.cpp, put in front of MPI, counts them. So a communicator that nobody frees fails here, whoever has it.
"""

import atexit
import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.compiled import shared_library
from tests.launch import run_ranks, start_ranks
from tests.rank_main import mark

KINDS = ("communicators", "requests", "messages")
NOTHING = dict.fromkeys(KINDS, 0)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which handles are counted."""
    source = Path(__file__).with_name("mpi_handles.cpp")
    return {"LD_PRELOAD": str(shared_library(source, tmp_path_factory.mktemp("mpi")))}


def held() -> dict[str, int]:
    return dict(zip(KINDS, _numbers()[:3], strict=True))


def ever() -> dict[str, int]:
    return dict(zip(KINDS, _numbers()[3:], strict=True))


def _numbers() -> list[int]:
    numbers = (ctypes.c_long * 6)()
    ctypes.CDLL(None).mpi_handles(numbers)
    return list(numbers)


def use_everything(large: int) -> None:
    """Small and large sums, over all ranks and over the first ones, with a rank that has to fetch what it missed."""
    import hvd_backup.mpi as hvd

    hvd.allreduce(np.ones(large))
    for k in range(4):
        if k == 1 and hvd.rank() == hvd.size() - 1:
            time.sleep(0.1)
        hvd.first_n_allreduce(np.ones(large), n=hvd.size() - 1, name="large")
        hvd.first_n_allreduce(np.ones(3), n=hvd.size() - 1, name="small")
    hvd.barrier()


def shut_down_twice(large: int) -> list[dict[str, int]]:
    import hvd_backup.mpi as hvd

    seen = []
    for _ in range(2):
        hvd.init()
        use_everything(large)
        seen.append(held())
        hvd.shutdown()
        seen.append(held())
    return [*seen, ever()]


def test_shutdown_gives_back_every_handle(counting: dict[str, str]) -> None:
    for busy, free, busy_again, free_again, total in run_ranks(3, shut_down_twice, [300_000], env=counting):
        assert busy["communicators"] > 0
        assert busy_again["communicators"] == busy["communicators"]
        assert free == free_again == NOTHING
        assert total["requests"] > 10 and total["messages"] > 10


def exit_after(large: int, failing_rank: int) -> None:
    import hvd_backup.mpi as hvd

    atexit.register(lambda: mark("at exit", held()))  # before init(): so it runs after hvd_backup has left
    hvd.init()
    use_everything(large)
    if hvd.rank() == failing_rank:
        raise ValueError("enough")


@pytest.mark.parametrize("failing_rank", [-1, 1])
def test_so_does_the_end_of_the_program(counting: dict[str, str], failing_rank: int) -> None:
    with start_ranks(3, exit_after, [1000, failing_rank], env=counting) as job:
        left: list[Any] = [job.wait_for_mark(rank, "at exit") for rank in range(3)]
        outcome = job.wait()
    assert left == [NOTHING] * 3
    assert [each.state for each in outcome.ranks] == [
        "raised" if rank == failing_rank else "returned" for rank in range(3)
    ], outcome.describe()
