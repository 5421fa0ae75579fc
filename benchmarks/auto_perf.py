"""Is backup_workers="auto" as good as the best fixed b, without knowing it?

    python benchmarks/auto_perf.py [--ranks 4] [--updates 300]

Two cases, each trained with every fixed b that leaves half of the ranks, and with "auto":

    stationary   every rank is slowed by an exponential time at each step, one of them by much more at half of them
    changing     one rank is slow all through the first half; in the second half nobody is

Gradients are a constant vector plus noise of a planted scale B (in batches of a rank), so an update with k contributors
is worth 1 / (1 + B / k) (McCandlish et al. 2018, arXiv 1812.06162); "auto" has to find B by itself. Progress per second
is the worth of all updates over the time of all updates, start included. Targets: at least 95 % of the best fixed b
where delays are stationary, more than every fixed b where they change.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement

ELEMENTS = 4096
Extra = Callable[[int, int, int], float]  # step, rank, updates: seconds


def stationary(step: int, rank: int, updates: int) -> float:
    draw = random.Random(f"{step}/{rank}")
    slow = 0.08 if rank == 1 and draw.random() < 0.5 else 0.0
    return slow + draw.expovariate(1.0) * 0.004


def changing(step: int, rank: int, updates: int) -> float:
    draw = random.Random(f"{step}/{rank}")
    return (0.1 if rank == 1 and step < updates // 2 else 0.0) + draw.random() * 0.002


def run_case(args: argparse.Namespace, backup_workers: int | str, extra: Extra) -> tuple[float, float, list[int]]:
    """(progress per second, seconds per update, N of every update) on rank 0."""
    comm = MPI.COMM_WORLD
    weight = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1e-6), [("weight", weight)], backup_workers=backup_workers
    )
    required: list[int] = []
    worth: list[float] = []

    def note(update: Any) -> None:
        required.append(update.required)
        worth.append(1 / (1 + args.noise_scale / len(update.contributors)))

    optimizer.on_update(note)
    noise = torch.Generator().manual_seed(comm.rank)
    measurement.quiet_barrier(comm)
    began = time.perf_counter()
    for step in hvd.follow(range(args.updates), optimizer):
        time.sleep(args.compute_ms / 1e3 + extra(step, comm.rank, args.updates))
        optimizer.zero_grad()
        gradient = 1 + args.noise_scale**0.5 * torch.randn(ELEMENTS, generator=noise)  # |G|^2 = ELEMENTS, S = B |G|^2
        (weight * gradient).sum().backward()
        optimizer.step()
    took = time.perf_counter() - began
    hvd.barrier()
    return sum(worth) / took, took / args.updates, required


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compute-ms", type=float, default=20.0, help="every rank's computing per step (default 20)")
    parser.add_argument("--noise-scale", type=float, default=8.0, help="B, in batches of a rank (default 8)")
    parser.add_argument("--updates", type=int, default=400)
    args = measurement.parse(parser)
    if args.quick:
        args.updates = 30
    comm = MPI.COMM_WORLD
    hvd.init()
    rows, results = [], []
    for name, extra in (("stationary", stationary), ("changing", changing)):
        fixed: list[float] = []
        for backup_workers in (*range(comm.size // 2 + 1), "auto"):
            progress, update_s, required = run_case(args, backup_workers, extra)
            if backup_workers != "auto":
                fixed.append(progress)
            relative = progress / max(fixed)
            chosen = sorted({n: required.count(n) for n in set(required)}.items())
            row = {
                "case": name, "backup_workers": backup_workers, "update_ms": update_s * 1e3, "progress_per_s": progress,
                "against_best_fixed": relative, "updates_by_required": dict(chosen),
            }  # fmt: skip
            results.append(row)
            last = f"{relative:.3f}" if backup_workers == "auto" else ""
            told = ", ".join(f"{n}: {count}" for n, count in chosen)
            rows.append((name, str(backup_workers), f"{update_s * 1e3:.1f}", f"{progress:.3f}", last, told))
    if comm.rank == 0:
        columns = ["case", "b", "update [ms]", "progress per s", "auto / best fixed", "updates by N"]
        title = f"Fixed and automatic b: {comm.size} ranks, computing {args.compute_ms:g} ms, B = {args.noise_scale:g}"
        measurement.print_table(title, columns, rows, f"{args.updates} updates each, start included")
        measurement.write_json(args.json, "auto_perf", {**vars(args), "ranks": comm.size}, results)
    hvd.shutdown()


if __name__ == "__main__":
    main()
