"""One rank is stopped (SIGSTOP) for 2 s at random moments: how long do the others wait?

    python benchmarks/stopped_rank_perf.py [--ranks 4] [--stops 20] [--stop-s 2] [--model-mib 4] [--json FILE]

Computing is sleeping (simulated_training.py), with one backup worker. A child process of the last rank stops it, all of
its threads with it, at any moment, also in the middle of a reduction, and lets it go on --stop-s seconds later.

Definition. The extra wait of a stop is what the longest step of any other rank that overlaps it took longer than the
median step of that rank while nobody was stopped. The same is computed for as long a time just before each stop: what a
busy machine does by itself. Reported are the longest and the median extra wait over all stops and over the times
without, the median of what each stop has more than the time before it, in how many stops the reduction that was going
on had to be begun anew or ended without the rank, how many updates the stopped rank then caught up, and how long after
SIGCONT it contributed again. All ranks verify that they applied the same updates, each from at least N contributors,
with the right mean.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from hvd_backup import context
from simulated_training import SimulatedTraining, StepRecord

# Of the child process: stops its parent at random moments, and prints when (this machine's monotonic clock).
STOPPER = """
import os, random, signal, sys, time
parent, stops, stop_s, pause_s = os.getppid(), int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
moment = random.Random(int(sys.argv[4]))
for _ in range(stops):
    time.sleep(stop_s + pause_s * (0.5 + moment.random()))
    begin = time.perf_counter()
    os.kill(parent, signal.SIGSTOP)
    time.sleep(stop_s)
    os.kill(parent, signal.SIGCONT)
    print(begin, time.perf_counter(), flush=True)
"""
PAUSE_S = 1.0  # on average, besides the time without a stop that is compared


class Stopper:
    """Stops this process, again and again, from now on."""

    def __init__(self, stops: int, stop_s: float, seed: int) -> None:
        numbers = [str(number) for number in (stops, stop_s, PAUSE_S, seed)]
        self._child = subprocess.Popen(
            [sys.executable, "-c", STOPPER, *numbers], stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self) -> list[tuple[float, float]]:
        """When this process was stopped and when it was let go on, in seconds."""
        printed, _ = self._child.communicate()
        return [(float(begin), float(end)) for begin, end in (line.split() for line in printed.splitlines())]


Span = tuple[float, float]  # from, to: seconds


def extra_waits(records: Sequence[StepRecord], stops: Sequence[Span], spans: Sequence[Span]) -> list[float]:
    """For each span, seconds by which the longest step that overlaps it was longer than the median step of no stop."""

    def overlaps(record: StepRecord) -> bool:
        return any(record.began < end and begin < record.ended for begin, end in stops)

    usual = measurement.percentile([r.ended - r.began for r in records[2:] if not overlaps(r)], 50)
    return [
        max(r.ended - r.began - usual for r in records[2:] if r.began < end and begin < r.ended) for begin, end in spans
    ]


def times_before(stops: Sequence[Span]) -> list[Span]:
    """For each stop, as long a time before it, in which nobody is stopped and whoever was is back."""
    return [(begin - PAUSE_S / 4 - (end - begin), begin - PAUSE_S / 4) for begin, end in stops]


def back_after(records: Sequence[StepRecord], stops: Sequence[tuple[float, float]]) -> list[float]:
    """For each stop, seconds from SIGCONT until the stopped rank's next contribution was in an update."""
    return [min(r.ended for r in records if r.contributed and r.ended > end) - end for _, end in stops]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-mib", type=float, default=4.0, help="size of the gradients in MiB (default 4)")
    parser.add_argument("--compute-ms", type=float, default=20.0, help="every rank's computing per step (default 20)")
    parser.add_argument("--stops", type=int, default=20, help="how often the last rank is stopped (default 20)")
    parser.add_argument("--stop-s", type=float, default=2.0, help="how long, in seconds (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = measurement.parse(parser)
    if args.quick:
        args.stops, args.stop_s = 2, 0.5
    comm = MPI.COMM_WORLD
    if comm.size < 2:
        parser.error("stopping one rank of a job takes at least 2")
    if comm.Split_type(MPI.COMM_TYPE_SHARED).size != comm.size:
        parser.error("the ranks must be on one machine: the times of a stop are compared with those of the others")
    hvd.init()
    total = round((args.stops + 1) * (1.5 * PAUSE_S + 2 * args.stop_s) / (args.compute_ms / 1e3))
    training = SimulatedTraining(
        args.model_mib,
        args.compute_ms / 1e3,
        backup_workers=1,
        max_lag=max(64, round(2 * args.stop_s / (args.compute_ms / 1e3))),  # wider than the stop
    )
    is_last = comm.rank == comm.size - 1
    stopper = Stopper(args.stops, args.stop_s, args.seed) if is_last else None
    mine = training.run(total, lambda step: 0.0)
    training.verify(total, comm.size - 1)
    records = comm.gather(mine, root=0)
    stops = comm.bcast(stopper.finish() if stopper else None, root=comm.size - 1)
    recorded = context.current().engine.recorded(total) if comm.rank == 0 else ""
    if records is not None:
        waits, without = (
            [max(all_) for all_ in zip(*(extra_waits(rank, stops, times) for rank in records[:-1]), strict=True)]
            for times in (stops, times_before(stops))
        )
        added = [during - before for during, before in zip(waits, without, strict=True)]
        back = back_after(records[-1], stops)
        spans = [(begin, end + seconds) for (begin, end), seconds in zip(stops, back, strict=True)]
        results: dict[str, Any] = {
            "stops": len(stops),
            "stopped_s": [end - begin for begin, end in stops],
            "longest_extra_wait_ms": max(waits) * 1e3,
            "p90_extra_wait_ms": measurement.percentile(waits, 90) * 1e3,
            "median_extra_wait_ms": measurement.percentile(waits, 50) * 1e3,
            "longest_without_stop_ms": max(without) * 1e3,
            "median_without_stop_ms": measurement.percentile(without, 50) * 1e3,
            "median_added_ms": measurement.percentile(added, 50) * 1e3,
            "begun_anew": recorded.count('"event": "replaced"'),
            "ended_without": recorded.count('"event": "stopped"'),
            "caught_up": [sum(r.caught_up for r in records[-1] if begin < r.ended <= after) for begin, after in spans],
            "contributed_again_after_ms": [second * 1e3 for second in back],
            "verified": True,  # a wrong history or mean has ended the run
        }
        print_results(args, comm.size, results)
        measurement.write_json(args.json, "stopped_rank_perf", {**vars(args), "ranks": comm.size}, results)
    hvd.shutdown()


def print_results(args: argparse.Namespace, ranks: int, results: dict[str, Any]) -> None:
    rows = [
        ("longest extra wait of the others [ms]", f"{results['longest_extra_wait_ms']:.1f}"),
        ("90 % of the stops [ms]", f"{results['p90_extra_wait_ms']:.1f}"),
        ("median [ms]", f"{results['median_extra_wait_ms']:.2f}"),
        ("without a stop: longest [ms]", f"{results['longest_without_stop_ms']:.1f}"),
        ("without a stop: median [ms]", f"{results['median_without_stop_ms']:.2f}"),
        ("a stop has more than the time before it: median [ms]", f"{results['median_added_ms']:.2f}"),
        ("reductions begun anew", str(results["begun_anew"])),
        ("reductions ended without the rank", str(results["ended_without"])),
        ("updates caught up after each stop", ", ".join(map(str, results["caught_up"]))),
        ("contributed again after [ms]", ", ".join(f"{ms:.0f}" for ms in results["contributed_again_after_ms"])),
    ]
    title = (
        f"{ranks} ranks, {args.model_mib:g} MiB, computing {args.compute_ms:g} ms; "
        f"one stopped {results['stops']} times for {args.stop_s:g} s"
    )
    measurement.print_table(title, ["", "value"], rows, "Verified: same updates, >= N contributors, right mean.")


if __name__ == "__main__":
    main()
