"""Against Horovod, in one run: the time of an allreduce, and of a training step with nobody late.

    python benchmarks/horovod_perf.py [--ranks 4] [--json FILE]

Definition. A block is a number of calls, back to back; its time is that of the slowest rank, the time of a call is that
of the block divided by the calls. The first call of a block is not counted: it is the barrier of the second. Horovod's
background thread would take part of the cores while ours is measured, so Horovod runs only for its own blocks: it is
started and shut down in every round, and rounds alternate. Results are verified in every block.

The model has 25 million parameters in 160 tensors (53 layers, of a ResNet-50's kind). Its gradients are written by a
backward pass that costs next to nothing, so a step is communication and the update itself (SGD with momentum); the same
for all. Horovod with its defaults; HOROVOD_CYCLE_TIME and the like are honoured.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import numpy as np
import torch
from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement

KIB, MIB = 1024, 1024**2
SIZES = [1 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB]
PARAMETERS, TENSORS = 25_000_000, 160
Samples = dict[tuple[str, str], list[float]]


def block(comm: MPI.Intracomm, call: Callable[[], Any], calls: int) -> float:
    """Seconds per call, of the slowest rank."""
    measurement.quiet_barrier(comm)
    call()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return float(comm.allreduce(time.perf_counter() - started, MPI.MAX)) / calls


def allreduces(comm: MPI.Intracomm, reduce: Callable[[torch.Tensor], torch.Tensor], sizes: list[int]) -> list[float]:
    """Seconds per call at each size."""
    seconds = []
    for size in sizes:
        tensor = torch.full((size // 4,), float(comm.rank))
        result = [tensor]

        def call(tensor: torch.Tensor = tensor, result: list[torch.Tensor] = result) -> None:
            result[0] = reduce(tensor)

        seconds.append(block(comm, call, int(np.clip(8 * MIB // size, 3, 50))))
        assert bool((result[0] == sum(range(comm.size))).all()), f"wrong sum of {size} bytes"
    return seconds


def make_model() -> torch.nn.ParameterList:
    """160 parameters: 53 times a large one with two small ones, and one more, as convolutions and their norms have."""
    generator = np.random.default_rng(0)
    shares = generator.lognormal(0, 1.2, 53)
    shares = shares / shares.sum() * (PARAMETERS - 107 * 256)
    sizes = [size for share in shares for size in (int(share), 256, 256)] + [256]
    sizes[0] += PARAMETERS - sum(sizes)
    assert len(sizes) == TENSORS and sum(sizes) == PARAMETERS
    return torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size)) for size in sizes])


def steps(comm: MPI.Intracomm, module: Any, calls: int, **options: Any) -> float:
    """Seconds per training step. The gradient of every weight is rank + 1, so the mean is known."""
    model = make_model()
    optimizer = module.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0), named_parameters=model.named_parameters(), **options
    )
    factor = float(comm.rank + 1)

    def call() -> None:
        optimizer.zero_grad()
        torch.stack([parameter.sum() for parameter in model]).sum().mul(factor).backward()
        optimizer.step()

    call()
    seconds = block(comm, call, calls)
    if not options.get("backup_workers"):
        expected = -0.1 * (comm.size + 1) / 2 * (calls + 2)
        for parameter in model:
            assert torch.allclose(parameter, torch.full_like(parameter, expected), rtol=1e-4), "wrong weights"
    comm.Barrier()
    return seconds


def ours(tensor: torch.Tensor) -> torch.Tensor:
    return hvd.first_n_allreduce(tensor, op=hvd.Sum).result


def theirs(tensor: torch.Tensor) -> torch.Tensor:
    summed: torch.Tensor = horovod.allreduce(tensor, op=horovod.Sum, name="perf")
    return summed


def one_round(comm: MPI.Intracomm, samples: Samples, sizes: list[int], calls: int) -> None:
    """Every contestant once."""
    for size, seconds in zip(sizes, allreduces(comm, ours, sizes), strict=True):
        samples[f"allreduce {size}", "hvd_backup"].append(seconds)
    for name, options in (("hvd_backup, b = 0", {}), ("hvd_backup, b = 1", {"backup_workers": 1, "grace": 1.0})):
        samples["step", name].append(steps(comm, hvd, calls, **options))
        hvd.barrier()
    horovod.init()
    for size, seconds in zip(sizes, allreduces(comm, theirs, sizes), strict=True):
        samples[f"allreduce {size}", "Horovod"].append(seconds)
    samples["step", "Horovod"].append(steps(comm, horovod, calls))
    comm.Barrier()
    horovod.shutdown()


def summary(samples: Samples) -> list[dict[str, Any]]:
    """One result for each contestant in each discipline, with its ratio to Horovod."""
    results = []
    for (what, name), seconds in samples.items():
        p50 = measurement.percentile(seconds, 50)
        results.append(
            {
                "what": what,
                "contestant": name,
                "blocks": len(seconds),
                "p50_us": 1e6 * p50,
                "p90_us": 1e6 * measurement.percentile(seconds, 90),
                "time_to_horovod": p50 / measurement.percentile(samples[what, "Horovod"], 50),
            }
        )
    return sorted(
        results,
        key=lambda each: (each["what"] == "step", int(each["what"].split()[-1]) if "all" in each["what"] else 0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each contestant (default 9)")
    parser.add_argument("--steps", type=int, default=6, help="training steps in a block (default 6)")
    args = measurement.parse(parser)
    sizes = SIZES
    if args.quick:
        sizes, args.rounds, args.steps = SIZES[:2], 1, 1
    comm = MPI.COMM_WORLD
    hvd.init()
    samples: Samples = defaultdict(list)
    for number in range(-1, args.rounds):
        one_round(comm, samples if number >= 0 else defaultdict(list), sizes, args.steps)
    if comm.rank == 0:
        results = summary(samples)
        cells = [
            (r["what"], r["contestant"], f"{r['p50_us']:,.0f}", f"{r['p90_us']:,.0f}", f"{r['time_to_horovod']:.2f}")
            for r in results
        ]
        facts = measurement.machine()
        measurement.print_table(
            f"hvd_backup and Horovod on {comm.size} ranks",
            ["what [bytes]", "contestant", "p50 [us]", "p90 [us]", "time / Horovod"],
            cells,
            f"{facts['mpi']}, {facts['cores']} cores, {facts['cpu']}; every block verified",
        )
        settings = {"ranks": comm.size, "rounds": args.rounds, "steps": args.steps, "parameters": PARAMETERS}
        measurement.write_json(args.json, "horovod_perf", settings, results)
    hvd.shutdown()


if __name__ == "__main__":
    main()
