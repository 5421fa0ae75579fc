"""One rank is stopped (SIGSTOP) for 2 s while it computes: how long do the others wait?

    python benchmarks/stopped_rank_perf.py [--ranks 4] [--stops 5] [--stop-s 2] [--json FILE]

Computing is sleeping (simulated_training.py), with one backup worker. The last rank stops itself in the middle of its
computing, all of its threads with it; a child process of it sends SIGCONT --stop-s seconds later. The moment within
the computing is drawn anew for each stop.

Definition. The extra wait of a step is what it took longer than the median step of the same rank while nobody was
stopped. Reported are the longest and the median extra wait of the others among the steps that a stop overlaps, how many
updates the stopped rank then caught up, and how long after SIGCONT it contributed again. All ranks verify that they
applied the same updates, each from at least N contributors, with the right mean.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from simulated_training import SimulatedTraining, StepRecord


class Stopper:
    """Stops its own process for `stop_s` seconds at chosen steps, in the middle of computing."""

    def __init__(self, steps: Sequence[int], stop_s: float, compute_s: float) -> None:
        self.waiting = sorted(steps)
        self.stop_s = stop_s
        self.compute_s = compute_s
        self.stops: list[tuple[float, float]] = []  # (stopped, continued), seconds on this machine's monotonic clock
        self.moment = random.Random(0)

    def extra_s(self, step: int) -> float:
        """Called where computing ends; returns how much longer to compute, after having been stopped if it is time."""
        if not self.waiting or step < self.waiting[0]:
            return 0.0
        del self.waiting[0]
        into = self.moment.random() * self.compute_s
        time.sleep(into)  # away from the end of the update before, in which this rank may still have been sending
        subprocess.Popen(["sh", "-c", f"sleep {self.stop_s}; kill -CONT {os.getpid()}"])
        stopped = time.perf_counter()
        os.kill(os.getpid(), signal.SIGSTOP)
        while time.perf_counter() - stopped < self.stop_s / 2:
            time.sleep(0.001)  # the signal reaches some thread of the process: it need not have stopped this one yet
        self.stops.append((stopped, time.perf_counter()))
        return 0.0


def extra_waits(records: Sequence[StepRecord], stops: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds by which each step that overlaps a stop was longer than the median of those that do not."""

    def overlaps(record: StepRecord) -> bool:
        return any(record.began < end and begin < record.ended for begin, end in stops)

    usual = measurement.percentile([r.ended - r.began for r in records[2:] if not overlaps(r)], 50)
    return [r.ended - r.began - usual for r in records if overlaps(r)]


def back_after(records: Sequence[StepRecord], stops: Sequence[tuple[float, float]]) -> list[float]:
    """For each stop, seconds from SIGCONT until the stopped rank's next contribution was in an update."""
    return [min(r.ended for r in records if r.contributed and r.ended > end) - end for _, end in stops]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-mib", type=float, default=1.0, help="size of the gradients in MiB (default 1)")
    parser.add_argument("--compute-ms", type=float, default=20.0, help="every rank's computing per step (default 20)")
    parser.add_argument("--stops", type=int, default=5, help="how often the last rank is stopped (default 5)")
    parser.add_argument("--stop-s", type=float, default=2.0, help="how long, in seconds (default 2)")
    args = measurement.parse(parser)
    if args.quick:
        args.stops, args.stop_s = 1, 0.5
    comm = MPI.COMM_WORLD
    if comm.size < 2:
        parser.error("stopping one rank of a job takes at least 2")
    if comm.Split_type(MPI.COMM_TYPE_SHARED).size != comm.size:
        parser.error("the ranks must be on one machine: the times of a stop are compared with those of the others")
    hvd.init()
    # Between two stops: 1 s on time. The steps in which it is stopped are counted by the others, who go on.
    pause = round(1.0 / (args.compute_ms / 1e3))
    during = round(args.stop_s / (args.compute_ms / 1e3))
    steps = [pause + index * (pause + during) for index in range(args.stops)]
    total = pause + args.stops * (pause + during)
    training = SimulatedTraining(
        args.model_mib,
        args.compute_ms / 1e3,
        backup_workers=1,
        max_lag=max(64, 2 * during),  # wider than the stop
    )
    stopper = Stopper(steps if comm.rank == comm.size - 1 else [], args.stop_s, args.compute_ms / 1e3)
    mine = training.run(total, stopper.extra_s)
    training.verify(total, comm.size - 1)
    records = comm.gather(mine, root=0)
    stops = comm.bcast(stopper.stops, root=comm.size - 1)
    if records is not None:
        waits = [wait for rank in records[:-1] for wait in extra_waits(rank, stops)]
        back = back_after(records[-1], stops)
        results: dict[str, Any] = {
            "stops": len(stops),
            "stopped_s": [end - begin for begin, end in stops],
            "steps_of_the_others": len(waits),
            "longest_extra_wait_ms": max(waits) * 1e3,
            "p99_extra_wait_ms": measurement.percentile(waits, 99) * 1e3,
            "median_extra_wait_ms": measurement.percentile(waits, 50) * 1e3,
            "caught_up": [
                max(r.caught_up for r in records[-1] if begin < r.ended <= end + 1.0) for begin, end in stops
            ],
            "contributed_again_after_ms": [second * 1e3 for second in back],
            "verified": True,  # a wrong history or mean has ended the run
        }
        print_results(args, comm.size, results)
        measurement.write_json(args.json, "stopped_rank_perf", {"ranks": comm.size, **vars(args)}, results)
    hvd.shutdown()


def print_results(args: argparse.Namespace, ranks: int, results: dict[str, Any]) -> None:
    rows = [
        ("longest extra wait of the others [ms]", f"{results['longest_extra_wait_ms']:.1f}"),
        ("p99 [ms]", f"{results['p99_extra_wait_ms']:.1f}"),
        ("median [ms]", f"{results['median_extra_wait_ms']:.2f}"),
        ("steps of the others during the stops", str(results["steps_of_the_others"])),
        ("updates caught up after each stop", ", ".join(map(str, results["caught_up"]))),
        ("contributed again after [ms]", ", ".join(f"{ms:.0f}" for ms in results["contributed_again_after_ms"])),
    ]
    title = (
        f"{ranks} ranks, computing {args.compute_ms:g} ms; one stopped {results['stops']} times for {args.stop_s:g} s"
    )
    measurement.print_table(title, ["", "value"], rows, "Verified: same updates, >= N contributors, right mean.")


if __name__ == "__main__":
    main()
