"""How long one allreduce takes: first-N with nobody late, first-N with one late rank, MPI_Allreduce, torch's gloo.

    python benchmarks/allreduce_perf.py [--ranks 4] [--json FILE]      or      mpirun -n 4 python benchmarks/...

Definition. A block is a number of calls of one contestant, back to back, on the same buffers (float32, the result
written to a buffer that is reused). The time of a call runs from the moment when the last measured rank had the
result of the call before, to the moment when the last one has its own: the slowest rank counts, and the calls of a
block add up to its duration. The first call of a block is discarded: it contains the skew with which ranks left the
barrier, which may be larger than a whole small call when ranks share cores. It serves as the barrier of the second,
for all contestants alike. Bytes/s is algorithm bandwidth: bytes of one rank's buffer over the median time.

Blocks of all contestants are interleaved, in an order that rotates from round to round, so that a disturbance of the
machine hits all of them. Before each there is a pause of 30 ms, so that no contestant's threads still look out for work
while the next one is measured. The late rank (the last one) sleeps until the others have finished their block; it is
not measured, but its results are verified too. gloo reduces in place; the others from one buffer into another.

Every block is verified: rank r contributes 2^r times a pattern, so the sum proves who contributed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI

import hvd_backup.mpi as hvd
import measurement
from hvd_backup import context
from hvd_backup.first_n import ReduceOp, Signature

KIB, MIB = 1024, 1024**2
SETTLE_S = 0.03
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Contestant:
    """One way to sum. `call` leaves the sum in the result buffer and returns the contributors, None when it is all."""

    name: str
    call: Callable[[], tuple[int, ...] | None]
    late: int | None = None  # rank that comes too late
    in_place: bool = False  # each call sums the results of the call before
    samples: list[float] = field(default_factory=list)  # seconds per call, on rank 0


def block_length(size: int) -> int:
    """Measured calls per block: about 50 ms of work, and few enough for a float32 to hold gloo's repeated sums."""
    return int(np.clip(16 * MIB // size, 2, 40))


def first_n(comm: MPI.Intracomm, contribution: Array, result: Array, late: int | None, label: str) -> Contestant:
    """First-N allreduce among all ranks, or among all but the rank `late`.

    On the addresses of given buffers, as hvd_backup.torch calls it: first_n_allreduce of hvd_backup.mpi would allocate
    a new result each time, and fresh pages are slow.
    """
    n = comm.size if late is None else comm.size - 1
    collectives = context.current().collectives
    signature = Signature("first_n_allreduce", "float32", contribution.shape, n, ReduceOp.SUM)
    name = f"{label}-{contribution.nbytes}-{n}"
    buffers = contribution.ctypes.data, result.ctypes.data

    def reduce() -> tuple[int, ...]:
        contributors: tuple[int, ...] = collectives.start(signature, name, *buffers, keep=(contribution, result)).wait()
        return contributors

    return Contestant("first-N, nobody late" if late is None else "first-N, one late", reduce, late)


def contestants(comm: MPI.Intracomm, contribution: Array, result: Array, gloo: bool) -> list[Contestant]:
    """Everything that is compared, on these buffers."""
    made = [first_n(comm, contribution, result, None, "perf")]
    if comm.size > 1:
        made.append(first_n(comm, contribution, result, comm.size - 1, "perf"))
    made.append(Contestant("MPI_Allreduce", lambda: comm.Allreduce(contribution, result)))
    if gloo:
        import torch

        tensor = torch.from_numpy(result)

        def all_reduce() -> None:
            torch.distributed.all_reduce(tensor)

        made.append(Contestant("gloo", all_reduce, in_place=True))
    return made


def start_gloo(comm: MPI.Intracomm) -> bool:
    """Connects torch.distributed's gloo over the same ranks; False when there is no torch."""
    try:
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]
    except ImportError:
        return False
    import os
    import socket

    here = comm.Split_type(MPI.COMM_TYPE_SHARED).size == comm.size
    if here:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host = "127.0.0.1" if here else comm.bcast(socket.gethostname(), root=0)
    store = TCPStore(host, 0, comm.size, True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None, root=0)
    store = store or TCPStore(host, port, comm.size, False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    return True


def run_block(comm: MPI.Intracomm, one: Contestant, calls: int, clock: Callable[[], float]) -> list[float]:
    """Calls `one` once and then `calls` times; returns when each call ended, on rank 0's clock."""
    ends = [0.0] * (calls + 1)
    everyone = None if one.late is None else tuple(r for r in range(comm.size) if r != one.late)
    measurement.quiet_barrier(comm)
    time.sleep(SETTLE_S)
    if comm.rank == one.late:
        measurement.quiet_barrier(comm)  # the others come here when they have finished
    for index in range(calls + 1):
        contributors = one.call()
        ends[index] = clock()
        if contributors is not None and everyone is not None and contributors != everyone:
            raise AssertionError(f"{one.name}: contributors {contributors}, expected {everyone}")
    if one.late is not None and comm.rank != one.late:
        measurement.quiet_barrier(comm)
    return ends


def verify(comm: MPI.Intracomm, one: Contestant, contribution: Array, result: Array, calls: int) -> None:
    """Raises unless `result` is the sum over exactly the contributors."""
    ranks = [r for r in range(comm.size) if r != one.late]
    expected = contribution.astype(np.float64) / 2.0**comm.rank * sum(2.0**r for r in ranks)
    if one.in_place:
        expected *= float(comm.size) ** calls
    exact = comm.size <= 16 and not one.in_place  # all partial sums are integers below 2^24
    if not np.allclose(result, expected, rtol=0.0 if exact else 1e-6 * calls, atol=0.0):
        wrong = int(np.argmin(np.isclose(result, expected)))
        raise AssertionError(
            f"{one.name}, {contribution.nbytes} bytes, rank {comm.rank}: element {wrong} is {result[wrong]}, "
            f"expected {expected[wrong]}"
        )


def call_times(comm: MPI.Intracomm, one: Contestant, calls: int, clock: Callable[[], float]) -> list[float]:
    """Runs a block; the seconds that each measured call took, on rank 0 (elsewhere nothing)."""
    ends = run_block(comm, one, calls, clock)
    table = comm.gather(None if comm.rank == one.late else ends, root=0)
    if table is None:
        return []
    last = np.max([row for row in table if row is not None], axis=0)
    return [float(seconds) for seconds in np.diff(last)]


def measure(comm: MPI.Intracomm, size: int, rounds: int, gloo: bool, clock: Callable[[], float]) -> list[Contestant]:
    """All contestants at one size in bytes; their samples are complete on rank 0."""
    contribution: Array = np.empty(size // 4, dtype=np.float32)
    result: Array = np.empty_like(contribution)
    pattern: Array = (1 + np.arange(contribution.size) % 13).astype(np.float32)
    competitors = contestants(comm, contribution, result, gloo)
    calls = block_length(size)
    for turn in range(-1, rounds):  # turn -1 warms up: connections, registered memory, buffers
        for offset in range(len(competitors)):
            one = competitors[(turn + offset) % len(competitors)]
            contribution[:] = pattern * (2.0**comm.rank * (1 + turn % 5))  # another sum each time: no old result passes
            result[:] = contribution if one.in_place else np.nan
            seconds = call_times(comm, one, calls, clock)
            verify(comm, one, contribution, result, calls)
            if turn >= 0:
                one.samples += seconds
    return competitors


def rows(size: int, competitors: list[Contestant]) -> list[dict[str, Any]]:
    """One result for each contestant, with its ratio to MPI_Allreduce."""
    reference = next(measurement.percentile(c.samples, 50) for c in competitors if c.name == "MPI_Allreduce")
    made = []
    for one in competitors:
        p50 = measurement.percentile(one.samples, 50)
        made.append(
            {
                "bytes": size,
                "contestant": one.name,
                "calls": len(one.samples),
                "p50_us": p50 * 1e6,
                "p99_us": measurement.percentile(one.samples, 99) * 1e6,
                "bytes_per_s": size / p50,
                "time_to_mpi_allreduce": p50 / reference,
                "verified": True,  # a wrong sum has ended the run
            }
        )
    return made


def human(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def print_results(results: list[dict[str, Any]], ranks: int) -> None:
    cells = [
        (
            human(r["bytes"]),
            r["contestant"],
            f"{r['p50_us']:,.0f}",
            f"{r['p99_us']:,.0f}",
            f"{r['bytes_per_s'] / 1e9:.3f}",
            f"{r['time_to_mpi_allreduce']:.2f}",
            str(r["calls"]),
        )
        for r in results
    ]
    columns = ["size", "contestant", "p50 [us]", "p99 [us]", "GB/s", "time / MPI_Allreduce", "calls"]
    facts = measurement.machine()
    caption = f"{facts['mpi']}, {facts['cores']} cores, {facts['cpu']}; every block verified"
    measurement.print_table(f"Allreduce of float32 on {ranks} ranks", columns, cells, caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--min-kib", type=int, default=1, help="smallest size in KiB (default 1)")
    parser.add_argument("--max-kib", type=int, default=64 * KIB, help="largest size in KiB (default 65536)")
    parser.add_argument("--rounds", type=int, default=11, help="blocks of each contestant at each size (default 11)")
    args = measurement.parse(parser)
    if args.quick:
        args.max_kib, args.rounds = min(args.max_kib, KIB), 2
    comm = MPI.COMM_WORLD
    hvd.init()
    gloo = start_gloo(comm)
    clock = measurement.clock_of_rank_zero(comm)
    results = []
    size, began = args.min_kib * KIB, time.monotonic()
    while size <= args.max_kib * KIB:
        competitors = measure(comm, size, args.rounds, gloo, clock)
        if comm.rank == 0:
            results += rows(size, competitors)
        size *= 4
    if comm.rank == 0:
        print_results(results, comm.size)
        if not gloo:
            print("gloo was left out: torch is not installed")
        settings = {"ranks": comm.size, "rounds": args.rounds, "seconds": round(time.monotonic() - began, 1)}
        measurement.write_json(args.json, "allreduce_perf", settings, results)
    hvd.shutdown()


if __name__ == "__main__":
    main()
