"""Time per update of DistributedOptimizer against the ideal: the N-th arrival plus one reduction.

    python benchmarks/step_perf.py [--ranks 4] [--model-mib 4] [--compute-ms 50] [--straggler-ms 200] [--json FILE]

Computing is sleeping (simulated_training.py). Four cases: nobody slow, and the last rank slower by --straggler-ms in
every step, each plain synchronous (b = 0) and with one backup worker (b = 1). In the last case the straggler is on time
from half of the updates on, and must then contribute again.

Definitions. An update is done when optimizer.step() has returned on the last of its contributors; it takes the time
since the update before was done. Its ideal takes until the N-th rank has finished computing, as recorded in that very
step, plus what N ranks need after that in a loop without any of our code: MPI_Allreduce of the gradients and torch's
own optimizer step, after the same computing, median of its steps. The ratio compares the sums over all updates, so
that no disturbance is left out; p50 and p99 are of single updates. The first --warmup updates do not count.

All ranks verify that they applied the same updates, each from at least N contributors, with the right mean.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from simulated_training import LAYERS, Contributors, SimulatedTraining, StepRecord

# Updates from the one at which the straggler is on time: it still has to end its last slow step and to catch up.
BACK_WITHIN = 10


def plain_loop_s(comm: MPI.Intracomm, args: argparse.Namespace) -> float:
    """Median seconds from the last rank's gradients to the last rank's update in a plain MPI loop over `comm`."""
    elements = max(1, int(args.model_mib * 2**20 / 4 / LAYERS))
    contribution, result = torch.empty(LAYERS, elements), torch.empty(LAYERS, elements)
    weights = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(LAYERS)]
    for weight, mean in zip(weights, result, strict=True):
        weight.grad = mean
    optimizer = torch.optim.SGD(weights, lr=0.1)
    clock = measurement.clock_of_rank_zero(comm)
    times = []
    for _ in range(args.warmup + 20):
        time.sleep(args.compute_ms / 1e3)
        contribution.fill_(2.0**comm.rank)
        ready = clock()
        comm.Allreduce(contribution.numpy(), result.numpy())
        optimizer.step()
        times.append((ready, clock()))
    gathered = np.array(comm.allgather(times))[:, args.warmup :]  # rank, step, (ready, ended)
    return float(np.median(gathered[:, :, 1].max(axis=0) - gathered[:, :, 0].max(axis=0)))


def ideal_tail_s(args: argparse.Namespace) -> dict[int, float]:
    """plain_loop_s for each number of backup workers: among all ranks, and among all but the last."""
    comm = MPI.COMM_WORLD
    everybody = plain_loop_s(comm, args)
    without_last = comm.Split(int(comm.rank == comm.size - 1))
    fewer = plain_loop_s(without_last, args) if comm.rank < comm.size - 1 else 0.0
    measurement.quiet_barrier(comm)
    without_last.Free()
    return {0: everybody, 1: fewer}


def against_ideal(
    records: Sequence[Sequence[StepRecord]], required: int, last_s: float, steps: range
) -> list[tuple[float, float]]:
    """(measured, ideal) seconds of each update in `steps`.

    Args:
        records: of every rank.
        required: N.
        last_s: what the ideal needs after the N-th arrival.
        steps: which updates count.
    """
    everything = [record for rank in records for record in rank]
    done = {step: max(r.ended for r in everything if r.step == step and r.contributed) for step in steps}
    pairs = []
    for step in steps[1:]:
        nth_arrival = sorted(r.ready for r in everything if r.step == step)[required - 1]
        pairs.append((done[step] - done[step - 1], nth_arrival - done[step - 1] + last_s))
    return pairs


def run_case(
    args: argparse.Namespace, backup_workers: int, slow: Callable[[int], bool], steps: int
) -> tuple[list[list[StepRecord]], list[Contributors]]:
    """Trains `steps` updates; every rank's records on rank 0, and the contributors of each update."""
    comm = MPI.COMM_WORLD
    training = SimulatedTraining(
        args.model_mib,
        args.compute_ms / 1e3,
        backup_workers=backup_workers,
        scope=args.scope,
        arrive=args.arrive,
    )
    is_straggler = comm.rank == comm.size - 1
    mine = training.run(steps, lambda step: args.straggler_ms / 1e3 if is_straggler and slow(step) else 0.0)
    training.verify(steps, comm.size - backup_workers)
    return comm.gather(mine, root=0) or [], training.updates


def summary(case: str, backup_workers: int, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    measured, ideal = zip(*pairs, strict=True)
    return {
        "case": case,
        "backup_workers": backup_workers,
        "updates": len(pairs),
        "p50_ms": measurement.percentile(measured, 50) * 1e3,
        "p99_ms": measurement.percentile(measured, 99) * 1e3,
        "ideal_p50_ms": measurement.percentile(ideal, 50) * 1e3,
        "time_to_ideal": sum(measured) / sum(ideal),
        "verified": True,  # a wrong history or mean has ended the run
    }


def straggler_is_back(updates: list[Contributors], straggler: int, on_time_from: int) -> dict[str, Any]:
    """Counts the straggler's contributions while it is slow and after; raises unless it came back."""
    since = [update for update in updates[on_time_from + BACK_WITHIN :] if straggler in update[0]]
    slow = [update for update in updates[:on_time_from] if straggler in update[0]]
    possible = len(updates) - on_time_from - BACK_WITHIN
    # On time it races its equals, N of n win: its fair share is N/n of the updates. Half of that says that it is back.
    if len(since) < possible / 4:
        raise AssertionError(
            f"the straggler contributed to {len(since)} of {possible} updates after it was on time again"
        )
    return {"while_slow": len(slow), "slow_updates": on_time_from, "since": len(since), "since_updates": possible}


def print_results(args: argparse.Namespace, results: list[dict[str, Any]], pieces: str) -> None:
    rows = [
        (
            r["case"],
            str(r["backup_workers"]),
            f"{r['p50_ms']:.1f}",
            f"{r['p99_ms']:.1f}",
            f"{r['ideal_p50_ms']:.1f}",
            f"{r['time_to_ideal']:.3f}",
            str(r["updates"]),
        )
        for r in results
    ]
    columns = ["case", "b", "update p50 [ms]", "p99 [ms]", "ideal p50 [ms]", "time / ideal", "updates"]
    sizes = f"{args.model_mib:g} MiB, computing {args.compute_ms:g} ms, straggler +{args.straggler_ms:g} ms"
    title = f"Time per update: {sizes}"
    measurement.print_table(title, columns, rows, pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-mib", type=float, default=4.0, help="size of the gradients in MiB (default 4)")
    parser.add_argument("--compute-ms", type=float, default=50.0, help="every rank's computing per step (default 50)")
    parser.add_argument("--straggler-ms", type=float, default=200.0, help="what the last rank adds to it (default 200)")
    parser.add_argument("--scope", choices=["step", "bucket"], default="step")
    parser.add_argument("--arrive", choices=["first", "last"], default="first")
    parser.add_argument(
        "--updates", type=int, default=100, help="per case; about a quarter where all wait for the straggler"
    )
    parser.add_argument("--warmup", type=int, default=5, help="updates at the start that do not count (default 5)")
    args = measurement.parse(parser)
    if args.quick:
        args.updates, args.warmup, args.compute_ms, args.straggler_ms = 40, 8, 20.0, 150.0
    comm = MPI.COMM_WORLD
    if comm.size < 2:
        parser.error("a straggler needs at least 2 ranks")
    hvd.init()
    tail_s = ideal_tail_s(args)
    half = args.updates // 2
    cases: list[tuple[str, int, Callable[[int], bool], int, int]] = [
        ("nobody slow", 0, lambda step: False, args.updates, args.updates),
        ("nobody slow", 1, lambda step: False, args.updates, args.updates),
        ("straggler", 0, lambda step: True, args.warmup + args.updates // 4, args.warmup + args.updates // 4),
        ("straggler", 1, lambda step: step < args.updates, args.updates + half, args.updates),
    ]
    results, back = [], {}
    for case, backup_workers, slow, steps, counted in cases:
        records, updates = run_case(args, backup_workers, slow, steps)
        if comm.rank == 0:
            required, last_s = comm.size - backup_workers, tail_s[backup_workers]
            pairs = against_ideal(records, required, last_s, range(args.warmup, counted))
            results.append(summary(case, backup_workers, pairs))
            if steps > counted:
                back = straggler_is_back(updates, comm.size - 1, counted)
    if comm.rank == 0:
        pieces = (
            f"Ideal: N-th arrival as recorded + {tail_s[0] * 1e3:.2f} ms (b=0) or {tail_s[1] * 1e3:.2f} ms (b=1), what "
            "MPI_Allreduce and the plain optimizer step take in a plain loop.\n"
            f"The straggler contributed to {back['while_slow']} of {back['slow_updates']} updates while it was slow, "
            f"and to {back['since']} of {back['since_updates']} after it was on time again.\n"
            "Verified: same updates on all ranks, at least N contributors, the right mean."
        )
        print_results(args, results, pieces)
        document = {"cases": results, "straggler_back": back, "ideal_tail_s": tail_s}
        measurement.write_json(args.json, "step_perf", {**vars(args), "ranks": comm.size}, document)
    hvd.shutdown()


if __name__ == "__main__":
    main()
