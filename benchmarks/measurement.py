"""What the benchmarks share: a barrier that does not disturb, one clock for all ranks, percentiles, machine facts,
output.

Times are seconds inside the programs, and carry their unit in every name that is printed or written to JSON.

On a machine with fewer cores than ranks, a rank that spins in MPI_Barrier takes the core from a rank that still works.
`quiet_barrier` therefore polls with naps. Its ranks leave within a nap of each other, not at once: each benchmark says
how it makes its starting points comparable in spite of that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hvd_backup import launch

NAP_S = 0.0005


def parse(parser: argparse.ArgumentParser, ranks: int = 4, survive_losses: bool = False) -> argparse.Namespace:
    """Parses the arguments that all benchmarks have, and starts the ranks unless this process is one of them."""
    told = f"ranks to start when not started by mpirun (default {ranks})"
    parser.add_argument("--ranks", type=int, default=ranks, help=told)
    parser.add_argument("--json", metavar="FILE", help="write settings, machine and results there")
    parser.add_argument("--quick", action="store_true", help="a few seconds: to see that it works, not to quote")
    args = parser.parse_args()
    if not launch.inside_mpi():
        launch.run_self_on(args.ranks, survive_losses=survive_losses)
    return args


def quiet_barrier(comm: MPI.Intracomm, nap_s: float = NAP_S) -> None:
    """Returns when all ranks of `comm` have come; waits asleep."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(nap_s)


def clock_of_rank_zero(comm: MPI.Intracomm) -> Callable[[], float]:
    """A clock, in seconds, whose readings can be compared between ranks.

    The monotonic clock is one per machine. When the ranks are on several, each learns its offset to rank 0 from the
    fastest of 100 exchanges; the error is at most half of that round trip.
    """
    if comm.Split_type(MPI.COMM_TYPE_SHARED).size == comm.size:
        return time.perf_counter
    offset = 0.0
    for peer in range(1, comm.size):
        best = float("inf")
        for _ in range(100):
            if comm.rank == 0:
                comm.recv(source=peer)
                comm.send(time.perf_counter(), dest=peer)
            elif comm.rank == peer:
                sent = time.perf_counter()
                comm.send(None, dest=0)
                theirs = comm.recv(source=0)
                back = time.perf_counter()
                if back - sent < best:
                    best, offset = back - sent, theirs - (sent + back) / 2
    return lambda: time.perf_counter() + offset


def percentile(samples: Sequence[float] | np.ndarray[Any, Any], q: float) -> float:
    """The q-th percentile (0..100), linear between neighbours."""
    return float(np.percentile(np.asarray(samples, dtype=float), q))


def machine() -> dict[str, Any]:
    """What a reader must know of the machine to judge the numbers."""
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "mpi": MPI.Get_library_version().strip().split("\n")[0].split(",")[0],
        "python": platform.python_version(),
    }


def console() -> Console:
    """Where tables go. Plain text of 110 columns: mpirun hides from its ranks what lies behind their output."""
    return Console(width=110, force_terminal=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Prints a table; columns of words to the left, columns of numbers to the right."""
    # Escaped, because rich would take the units in brackets for markup.
    made = Table(title=escape(title), caption=escape(caption), box=box.SIMPLE_HEAD)
    made.title_justify = made.caption_justify = "left"
    for index, column in enumerate(columns):
        is_number = all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        made.add_column(escape(column), justify="right" if is_number else "left")
    for row in rows:
        made.add_row(*map(escape, row))
    console().print(made)


def write_json(path: str | None, benchmark: str, settings: Mapping[str, Any], results: Any) -> None:
    """Writes {benchmark, settings, machine, results} to `path`; nothing when it is None."""
    if path is None:
        return
    document = {"benchmark": benchmark, "settings": dict(settings), "machine": machine(), "results": results}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
