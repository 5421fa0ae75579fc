"""`hvd-backup check`: what is here, and whether the launched ranks can work together.

    hvd-backup check                  # this machine: MPI, Horovod, frameworks, GPU
    mpirun -np 4 hvd-backup check     # and a ring and a first-N test over the ranks

Rank 0 prints. The status is 0 when all that training with backup workers needs is there and works.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["add_arguments", "run"]

RING_ELEMENTS = 1 << 17  # 1 MiB of float64
LATE_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it takes what it finds."""


def run(args: argparse.Namespace) -> int:
    """Reports, tests; returns the status."""
    import hvd_backup.mpi as hvd
    from hvd_backup.errors import HvdBackupError

    try:
        hvd.init()
    except (ImportError, HvdBackupError) as error:
        for name, value in software():
            print(f"{name:<14}{value}")
        print(f"{'ranks':<14}FAILED: {error}")
        return 1
    try:
        mpi = mpi_facts(hvd.allgather_object(platform.node()))
        if hvd.rank() == 0:
            for name, value in [*software(), *mpi]:
                print(f"{name:<14}{value}")
            sys.stdout.flush()
        failed = False
        for name, test in (("ring", ring), ("first N", first_n)) if hvd.size() > 1 else ():
            told, passed = test(hvd)
            failed = failed or not passed
            if hvd.rank() == 0:
                print(f"{name:<14}{'ok: ' if passed else 'FAILED: '}{told}", flush=True)
        if hvd.size() == 1:
            print(f"{'tests':<14}not run with one rank: mpirun -np 4 hvd-backup check")
        return int(failed)
    except HvdBackupError as error:
        print(f"{'ranks':<14}FAILED on rank {hvd.rank()}: {error}")
        return 1


def software() -> list[tuple[str, str]]:
    """Versions, Horovod, GPUs."""
    facts = [
        ("hvd_backup", importlib.metadata.version("hvd_backup")),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
    ]
    for name, distributions in (
        ("PyTorch", ("torch",)),
        ("TensorFlow", ("tensorflow", "tensorflow-cpu")),
        ("mpi4py", ("mpi4py",)),
    ):
        facts.append((name, next((version for each in distributions if (version := installed(each))), "not installed")))
    return [*facts, ("TF ops", tensorflow_ops()), ("Horovod", horovod()), *gpu_facts()]


def tensorflow_ops() -> str:
    """For which TensorFlow hvd_backup's ops were built."""
    try:
        from hvd_backup import _core
    except ImportError:
        return "unknown"
    built = sorted(path.stem.removeprefix("ops-") for path in Path(str(_core.__file__)).parent.glob("tensorflow/ops-*"))
    if not built:
        return "not built: TensorFlow was not there when hvd_backup was built"
    present = installed("tensorflow") or installed("tensorflow-cpu")
    told = f"built with TensorFlow {', '.join(built)}"
    return told if not present or present in built else f"{told}, but {present} is installed: build hvd_backup again"


def installed(distribution: str) -> str:
    """Its version, empty when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def horovod() -> str:
    """Its version, controllers, and for which frameworks it can be used."""
    if not (version := installed("horovod")):
        return "not installed (not needed: names that are Horovod's own are then missing)"
    from hvd_backup.beside_horovod import Horovod

    told = []
    for framework in ("torch", "tensorflow"):
        if installed(framework):
            beside = Horovod(framework)
            why_not = beside.why_not()
            controllers = (
                [] if why_not else [name for name in ("mpi", "gloo") if getattr(beside.module(), name + "_built")()]
            )
            told.append(f"{framework}: {why_not or 'controllers ' + ', '.join(controllers)}")
    return "; ".join([version, *told])


def gpu_facts() -> list[tuple[str, str]]:
    """What PyTorch sees, and TensorFlow where it can use GPUs."""
    try:
        from hvd_backup.torch import gpus
    except ImportError:
        facts = [("GPU", "unknown without PyTorch")]
    else:
        facts = gpus.facts()
    if installed("tensorflow"):  # not tensorflow-cpu
        try:
            from hvd_backup.tensorflow import gpus as gpus_of_tensorflow
        except ImportError:  # the ops are not there: see above
            return facts
        facts += gpus_of_tensorflow.facts()
    return facts


def mpi_facts(nodes: list[str]) -> list[tuple[str, str]]:
    """About the MPI that runs. nodes: of each rank."""
    from mpi4py import MPI

    from hvd_backup import _core

    levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
    version = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
    return [
        ("MPI", f"{version}, thread level {levels[MPI.Query_thread()]}"),
        ("built with", _core.mpi_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]),
        ("mpirun", shutil.which("mpirun") or "not on PATH"),
        ("ranks", f"{len(nodes)} on " + ", ".join(f"{node} ({count})" for node, count in Counter(nodes).items())),
    ]


def ring(hvd: Any) -> tuple[str, bool]:
    """Every rank sends 1 MiB to the next one."""
    from hvd_backup import context

    comm = context.current().comm
    rank, size = hvd.rank(), hvd.size()
    mine, received = np.full(RING_ELEMENTS, float(rank)), np.empty(RING_ELEMENTS)
    hvd.barrier()
    started = time.perf_counter()
    comm.Sendrecv(mine, (rank + 1) % size, recvbuf=received, source=(rank - 1) % size)
    seconds = time.perf_counter() - started
    right = bool((received == (rank - 1) % size).all())
    outcomes = hvd.allgather_object((right, seconds))
    wrong = [str(number) for number, (passed, _) in enumerate(outcomes) if not passed]
    if wrong:
        return f"wrong data at ranks {', '.join(wrong)}", False
    return f"1 MiB from each rank to the next in at most {1e3 * max(s for _, s in outcomes):.1f} ms", True


def first_n(hvd: Any) -> tuple[str, bool]:
    """The last rank comes late; the others do not wait, and the sum says who contributed: rank r gives 2^r."""
    rank, size = hvd.rank(), hvd.size()
    hvd.first_n_allreduce(np.zeros(1), n=size, op=hvd.Sum, name="check.open")
    hvd.barrier()
    if rank == size - 1:
        time.sleep(LATE_S)
    started = time.perf_counter()
    outcome = hvd.first_n_allreduce(np.array([2.0**rank]), n=size - 1, op=hvd.Sum, name="check")
    seconds = time.perf_counter() - started
    outcomes = hvd.allgather_object((outcome.contributors, float(outcome.result[0]), seconds))
    contributors, total, _ = outcomes[0]
    waited = max(each[2] for each in outcomes[:-1])
    right = all(each[:2] == outcomes[0][:2] for each in outcomes) and total == sum(2.0**r for r in contributors)
    if not right or contributors != tuple(range(size - 1)) or waited > LATE_S / 2:
        return f"contributors {contributors}, sum {total}, the others waited {1e3 * waited:.0f} ms", False
    return (
        f"rank {size - 1} came {1e3 * LATE_S:.0f} ms late; the others had their sum after {1e3 * waited:.1f} ms",
        True,
    )
