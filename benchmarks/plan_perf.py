"""Does `hvd-backup plan` predict the time per update?

    python benchmarks/plan_perf.py [--ranks 4] [--updates 300]

For each kind of delays: a training with b = 0 writes a trace, from which the plan predicts the time per update for
b = 1 and 2; then the same training runs with that b. The prediction divided by what was measured (the mean over the
updates from the coordinator's decisions, in that run's own trace) should be within 10 % of 1. Delays are those of
hvd_backup.faults: pure functions of rank and step, the same in every run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from hvd_backup import arrivals, faults, planning, trace
from hvd_backup.trace import Recording
from simulated_training import SimulatedTraining

DELAYS = {
    "exponential": "rank=*,ms=30,distribution=exponential",
    "lognormal": "rank=*,ms=30,distribution=lognormal",
    "one slow at times": "rank=3,ms=120,p=0.3;rank=*,ms=5,distribution=exponential",
    "slow in turns": "rank=rotate:5,ms=120,p=0.5;rank=*,ms=5,distribution=exponential",
}


def record(args: argparse.Namespace, backup_workers: int, path: Path) -> Recording | None:
    """Trains, and reads on rank 0 what was recorded."""
    os.environ["HVD_BACKUP_TRACE"] = str(path)
    hvd.init()
    place = MPI.COMM_WORLD
    training = SimulatedTraining(args.model_mib, args.compute_ms / 1e3, backup_workers=backup_workers)
    delays = faults.injected()
    faults.clear()  # the optimizer would sleep by itself, but after the gradient of the first layer
    training.run(args.updates, lambda step: delays.delay_ms(place.rank, step, place.size) / 1e3)
    training.verify(args.updates, place.size - backup_workers)
    hvd.shutdown()
    return trace.read(path) if place.rank == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-mib", type=float, default=1.0, help="size of the gradients in MiB (default 1)")
    parser.add_argument("--compute-ms", type=float, default=40.0, help="every rank's computing per step (default 40)")
    parser.add_argument("--updates", type=int, default=300)
    args = measurement.parse(parser)
    delays = dict(DELAYS)
    if args.quick:
        args.updates, delays = 40, {"exponential": DELAYS["exponential"]}
    comm = MPI.COMM_WORLD
    os.environ["HVD_BACKUP_LOG_LEVEL"] = "error"  # no summary at the end of each
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in delays.items():
            made: planning.Plan | None = None
            for backup_workers in range(min(3, comm.size)):
                faults.inject(*faults.parse(spec))
                recording = record(args, backup_workers, Path(folder) / f"{backup_workers}.jsonl")
                if recording is None:
                    continue
                if backup_workers == 0:
                    made = planning.plan_recording(recording)
                assert made is not None
                predicted = made.choices[backup_workers].update_s
                measured = float(arrivals.of(recording.channel(), recording.size).step_seconds().mean())
                result: dict[str, Any] = {
                    "delays": name, "backup_workers": backup_workers, "predicted_ms": predicted * 1e3,
                    "measured_ms": measured * 1e3, "predicted_to_measured": predicted / measured,
                }  # fmt: skip
                results.append(result)
                numbers = (f"{predicted * 1e3:.1f}", f"{measured * 1e3:.1f}", f"{predicted / measured:.3f}")
                rows.append((name, str(backup_workers), *numbers))
    if comm.rank == 0:
        columns = ["delays", "b", "predicted [ms]", "measured [ms]", "predicted / measured"]
        title = f"Time per update, predicted from a run with b = 0: {comm.size} ranks, computing {args.compute_ms:g} ms"
        measurement.print_table(title, columns, rows, f"{args.updates} updates each")
        measurement.write_json(args.json, "plan_perf", {**vars(args), "ranks": comm.size}, results)


if __name__ == "__main__":
    main()
