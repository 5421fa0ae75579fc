"""Ranks as threads of this process: many of them, fast, on the in-process transport, without mpirun.

    values = spawn(4, body)             # body(engine), each engine on one Hub; what each returned, by rank
    values = run_threads(4, body)       # body(rank), no engine

A rank that raises or hangs is named, with its stack. A hung thread cannot be ended: it is left behind as a daemon.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.launch import AFTER_FAILURE_S

POLL_S = 0.005


def run_threads(size: int, body: Callable[[int], Any], *, timeout_s: float = 60.0) -> list[Any]:
    """Runs body(rank) in `size` threads; returns their values by rank.

    Raises:
        AssertionError: a rank raised, or still ran after `timeout_s` (or a while after another had raised).
    """
    values: dict[int, Any] = {}
    errors: dict[int, str] = {}

    def run(rank: int) -> None:
        try:
            values[rank] = body(rank)
        except BaseException:
            errors[rank] = traceback.format_exc()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    limit = f"{timeout_s:g} s"
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        if errors and deadline > time.monotonic() + AFTER_FAILURE_S:
            deadline = time.monotonic() + AFTER_FAILURE_S
            limit = f"{AFTER_FAILURE_S:g} s after another had raised"
        time.sleep(POLL_S)
    stacks = sys._current_frames()
    blocks = [f"=== rank {rank} raised\n{errors[rank]}" for rank in sorted(errors)]
    for rank, thread in enumerate(threads):
        if thread.is_alive() and thread.ident in stacks:
            where = "".join(traceback.format_stack(stacks[thread.ident]))
            blocks.append(f"=== rank {rank} hung: still running after {limit}, innermost call last\n{where}")
    if blocks:
        raise AssertionError("\n".join(blocks))
    return [values[rank] for rank in range(size)]


def spawn(
    size: int,
    body: Callable[[Any], Any],
    *,
    timeout_s: float = 60.0,
    trace: str = "",
    takes_device_memory: bool = False,
) -> list[Any]:
    """Runs body(engine) on `size` engines that one Hub connects, and shuts each down when its body ends.

    Args:
        body: gets a `_core.Engine`; an exception in it becomes the failure with which its engine shuts down.
        trace: file for the coordinator's decisions, as JSON lines; empty: none.
        takes_device_memory: host memory stands for a GPU's.
    """
    from hvd_backup import _core

    hub = _core.Hub(size, takes_device_memory)

    def run(rank: int) -> Any:
        engine = _core.Engine.in_process(hub, rank, trace if rank == 0 else "")
        try:
            value = body(engine)
        except BaseException as error:
            engine.shutdown(f"{type(error).__name__}: {error}")
            raise
        engine.shutdown()
        return value

    return run_threads(size, run, timeout_s=timeout_s)
