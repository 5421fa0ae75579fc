"""What recording costs: time per update and processor time, with and without HVD_BACKUP_TRACE.

    python benchmarks/recording_perf.py [--ranks 4] [--compute-ms 50] [--model-mib 4]

The same training (benchmarks/simulated_training.py: computing is sleeping, all ranks on time) runs in turns without and
with a trace, several times each, so that what disturbs the machine disturbs both. An update takes the time from one
return of optimizer.step() to the next on rank 0, which writes. A trace also means that the reduction computes squared
norms, on every rank. Both are compared with the step: the target is below 1 %.

The difference of two medians is uncertain by about as much as the medians themselves; the processor time of rank 0, all
threads, is the steadier number: what recording costs at most when it cannot hide behind computing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from simulated_training import SimulatedTraining


def run_once(args: argparse.Namespace, trace: str) -> tuple[list[float], float]:
    """Seconds of each update on this rank, and processor seconds of this process per update."""
    os.environ["HVD_BACKUP_TRACE"] = trace
    hvd.init()
    training = SimulatedTraining(args.model_mib, args.compute_ms / 1e3, backup_workers=args.backup_workers)
    before = time.process_time()
    records = training.run(args.updates, lambda step: 0.0)
    spent = (time.process_time() - before) / args.updates
    training.verify(args.updates, MPI.COMM_WORLD.size - args.backup_workers)
    hvd.shutdown()
    ended = [record.ended for record in records][args.warmup :]
    return list(np.diff(ended)), spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-mib", type=float, default=4.0, help="size of the gradients in MiB (default 4)")
    parser.add_argument("--compute-ms", type=float, default=50.0, help="every rank's computing per step (default 50)")
    parser.add_argument("--backup-workers", type=int, default=0)
    parser.add_argument("--updates", type=int, default=100, help="in each run")
    parser.add_argument("--runs", type=int, default=6, help="of each kind, in turns (default 6)")
    parser.add_argument("--warmup", type=int, default=5)
    args = measurement.parse(parser)
    if args.quick:
        args.updates, args.runs = 20, 2
    comm = MPI.COMM_WORLD
    os.environ["HVD_BACKUP_LOG_LEVEL"] = "error"  # no summary at the end of each
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "trace.jsonl")
        times: dict[bool, list[float]] = {False: [], True: []}
        spent: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.runs):
            for traced in (False, True):
                took, processor = run_once(args, trace if traced else "")
                times[traced] += took
                spent[traced].append(processor)
        size = Path(trace).stat().st_size if comm.rank == 0 else 0
    if comm.rank > 0:
        return
    step_s = measurement.percentile(times[False], 50)
    wall_s = measurement.percentile(times[True], 50) - step_s
    processor_s = float(np.median(spent[True]) - np.median(spent[False]))
    results: dict[str, Any] = {
        "step_p50_ms": step_s * 1e3,
        "traced_p50_ms": (step_s + wall_s) * 1e3,
        "wall_percent": 100 * wall_s / step_s,
        "processor_us_per_update": processor_s * 1e6,
        "processor_percent": 100 * processor_s / step_s,
        "trace_bytes_per_update": size / args.updates,
    }
    rows = [
        ("update, p50, without [ms]", f"{results['step_p50_ms']:.3f}"),
        ("update, p50, with a trace [ms]", f"{results['traced_p50_ms']:.3f}"),
        ("difference [% of the step]", f"{results['wall_percent']:.2f}"),
        ("more processor time on rank 0 [us per update]", f"{results['processor_us_per_update']:.0f}"),
        ("the same [% of the step]", f"{results['processor_percent']:.2f}"),
        ("trace [bytes per update]", f"{results['trace_bytes_per_update']:.0f}"),
    ]
    title = f"What recording costs: {comm.size} ranks, {args.model_mib:g} MiB, computing {args.compute_ms:g} ms"
    measurement.print_table(title, ["", "value"], rows, f"{args.runs} runs of {args.updates} updates of each kind")
    measurement.write_json(args.json, "recording_perf", {**vars(args), "ranks": comm.size}, results)


if __name__ == "__main__":
    main()
