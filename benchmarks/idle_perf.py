"""How much CPU the engine takes while there is nothing for it to do, in percent of one core.

    python benchmarks/idle_perf.py [--ranks 4] [--seconds 5] [--json FILE]

Two situations. "nothing to do": initialised, a channel is open, nobody in a step. "in the middle of a step": rank 0's
training thread sleeps between two steps while all others wait for its contribution inside theirs.

CPU time of each thread is read from /proc/self/task/TID/schedstat (nanoseconds on a core) before and after. The threads
that hvd.init() started are the engine's; the main thread is the training thread; whatever else there is (of MPI, torch,
NumPy) is listed too, so that nothing hides there. The reported number is the worst rank's.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import hvd_backup.mpi as hvd
import measurement

GROUPS = ("engine", "training", "other")


def thread_seconds() -> dict[int, float]:
    """CPU seconds that each thread of this process has had."""
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            seconds[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except FileNotFoundError:
            continue  # it ended while we looked
    return seconds


def percent_by_group(
    before: dict[int, float], after: dict[int, float], engine: set[int], wall_s: float
) -> dict[str, float]:
    """Percent of a core that each group of threads has had in between."""
    used = dict.fromkeys(GROUPS, 0.0)
    for thread, seconds in after.items():
        group = "engine" if thread in engine else "training" if thread == threading.main_thread().native_id else "other"
        used[group] += (seconds - before.get(thread, 0.0)) / wall_s * 100
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each situation lasts (default 5)")
    args = measurement.parse(parser)
    if args.quick:
        args.seconds = 1.0
    comm = MPI.COMM_WORLD
    threads_before = set(thread_seconds())
    hvd.init()
    engine = set(thread_seconds()) - threads_before
    if not engine:
        raise AssertionError("hvd.init() has started no thread: there is no engine to measure")
    array = np.full(1024, 2.0**comm.rank, dtype=np.float32)
    expected = 2.0**comm.size - 1

    def reduce() -> None:
        result, contributors = hvd.first_n_allreduce(array, n=comm.size, name="idle", op=hvd.Sum)
        if len(contributors) != comm.size or not (result == expected).all():
            raise AssertionError(f"sum {result[:3]}... of ranks {contributors}, expected {expected} of all")

    reduce()
    measurement.quiet_barrier(comm)
    time.sleep(0.2)  # what the last collective has left to do is not idleness

    used: dict[str, dict[str, float]] = {}
    for situation in ("nothing to do", "in the middle of a step"):
        before, began = thread_seconds(), time.perf_counter()
        if situation == "nothing to do" or comm.rank == 0:
            time.sleep(args.seconds)
        if situation != "nothing to do":
            reduce()
        used[situation] = percent_by_group(before, thread_seconds(), engine, time.perf_counter() - began)
        measurement.quiet_barrier(comm)

    everyone = comm.gather(used, root=0)
    if everyone is not None:
        results: list[dict[str, Any]] = []
        for situation in used:
            worst = {group: max(rank[situation][group] for rank in everyone) for group in GROUPS}
            results.append({"situation": situation} | {f"{group}_percent": worst[group] for group in GROUPS})
        rows = [(r["situation"], *(f"{r[f'{group}_percent']:.2f}" for group in GROUPS)) for r in results]
        columns = ["situation", "engine [% of a core]", "training thread [%]", "other threads [%]"]
        title = f"CPU of an idle rank, {comm.size} ranks, {args.seconds:g} s each, the worst rank"
        measurement.print_table(title, columns, rows, measurement.machine()["mpi"])
        measurement.write_json(args.json, "idle_perf", {"ranks": comm.size, "seconds": args.seconds}, results)
    hvd.shutdown()


if __name__ == "__main__":
    main()
