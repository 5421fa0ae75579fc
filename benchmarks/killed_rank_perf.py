"""Ranks are killed (SIGKILL) at random moments: how long do the others wait?

    python benchmarks/killed_rank_perf.py [--ranks 8] [--kills 1] [--model-mib 4] [--json FILE]

Needs an MPI that survives it (Open MPI 5; started here with --with-ft ulfm). Computing is sleeping
(simulated_training.py), with as many backup workers as ranks are killed: the last ones, one after the other, each by a
child process of its own, so at any moment, also in the middle of a reduction.

Definition. The extra wait of a death is what the longest step of any rank that is left took longer than the median step
of that rank, of the steps within a second after it; and the same for each of the seconds before the first death, which
is what a busy machine does by itself. Those that are left verify that they applied the same updates, each from at least
N contributors, with the right mean.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from hvd_backup import context
from simulated_training import SimulatedTraining, StepRecord

# Of the child process: kills its parent, and writes when (this machine's monotonic clock).
KILLER = """
import os, signal, sys, time
time.sleep(float(sys.argv[1]))
moment = time.perf_counter()
os.kill(os.getppid(), signal.SIGKILL)
open(sys.argv[2], "w").write(repr(moment))
"""
PAUSE_S = 1.5  # on average between two deaths
AFTER_S = 1.0  # a death is over by then
QUIET = 5  # seconds before the first death


def extra_wait(records: Sequence[StepRecord], death: float) -> float:
    """Seconds by which the longest step that overlaps the time after a death was longer than the median step."""
    usual = measurement.percentile([r.ended - r.began for r in records[2:]], 50)
    return max(r.ended - r.began - usual for r in records[2:] if r.ended > death and r.began < death + AFTER_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-mib", type=float, default=4.0, help="size of the gradients in MiB (default 4)")
    parser.add_argument("--compute-ms", type=float, default=20.0, help="every rank's computing per step (default 20)")
    parser.add_argument("--kills", type=int, default=1, help="how many ranks are killed (default 1)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: always others)")
    args = measurement.parse(parser, ranks=8, survive_losses=True)
    comm = MPI.COMM_WORLD
    if args.quick:
        args.model_mib = 1.0
    if not 0 < args.kills < comm.size - 1:
        parser.error(f"--kills {args.kills}: of {comm.size} ranks two must be left")
    hvd.init()
    if not context.current().engine.survives_losses:
        parser.error("this MPI ends all ranks when one dies: start it with Open MPI 5 and --with-ft ulfm")
    seed = comm.bcast(random.randrange(1 << 30) if args.seed is None else args.seed, root=0)
    folder = Path(comm.bcast(tempfile.mkdtemp(prefix="deaths-") if comm.rank == 0 else None, root=0))
    training = SimulatedTraining(args.model_mib, args.compute_ms / 1e3, backup_workers=args.kills)
    number = comm.size - 1 - comm.rank  # of the death
    if number < args.kills:
        after_s = QUIET + PAUSE_S * (number + 0.5 + random.Random(seed + number).random())
        subprocess.Popen([sys.executable, "-c", KILLER, str(after_s), str(folder / str(number))])
    total = round((QUIET + PAUSE_S * (args.kills + 0.5) + 2 * AFTER_S) / (args.compute_ms / 1e3))
    mine = training.run(total, lambda step: 0.0)
    training.verify(total, comm.size - args.kills)
    deaths = sorted(float(file.read_text()) for file in folder.iterdir())
    quiet = [mine[2].began + i * AFTER_S for i in range(int((deaths[0] - mine[2].began) / AFTER_S))]
    everybodys = hvd.allgather_object([extra_wait(mine, death) for death in deaths])
    everybodys_noise = hvd.allgather_object(max(extra_wait(mine, second) for second in quiet))
    recorded = context.current().engine.recorded(total)
    if comm.rank == 0:
        if len(deaths) != args.kills or len(everybodys) != comm.size - args.kills:
            raise AssertionError(f"{len(deaths)} ranks were killed, {len(everybodys)} are left")
        waits = [max(of_death) for of_death in zip(*everybodys, strict=True)]
        results: dict[str, Any] = {
            "kills": len(deaths),
            "extra_waits_ms": [wait * 1e3 for wait in waits],
            "longest_extra_wait_ms": max(waits) * 1e3,
            "median_extra_wait_ms": measurement.percentile(waits, 50) * 1e3,
            "longest_without_death_ms": max(everybodys_noise) * 1e3,
            "begun_anew": recorded.count('"event": "replaced"'),
            "ended_without": recorded.count('"event": "stopped"'),
            "verified": True,  # a wrong history or mean has ended the run
        }
        rows = [
            ("longest of a second without a death [ms]", f"{results['longest_without_death_ms']:.1f}"),
            ("longest extra wait of the others [ms]", f"{results['longest_extra_wait_ms']:.1f}"),
            ("median [ms]", f"{results['median_extra_wait_ms']:.2f}"),
            ("reductions begun anew", str(results["begun_anew"])),
            ("reductions ended without the rank", str(results["ended_without"])),
        ]
        title = f"{comm.size} ranks, {args.model_mib:g} MiB, computing {args.compute_ms:g} ms; {args.kills} killed"
        measurement.print_table(title, ["", "value"], rows, "Verified: same updates, >= N contributors, right mean.")
        measurement.write_json(args.json, "killed_rank_perf", {**vars(args), "ranks": comm.size}, results)
        for file in folder.iterdir():
            file.unlink()
        os.rmdir(folder)
    hvd.shutdown()


if __name__ == "__main__":
    main()
