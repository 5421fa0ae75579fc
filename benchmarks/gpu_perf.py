"""Gradients on a GPU: the GPU library's kernels, collectives of GPU tensors, and a training step with backup workers.

    python benchmarks/gpu_perf.py [--ranks 4] [--bucket-mib 25 100 400] [--json FILE] [--quick]

Needs a GPU that PyTorch can use; ranks share it when there are fewer GPUs than ranks.

Kernels, on rank 0 while the others sleep: a bucket made of 160 gradients, whose sizes are those of ResNet-50 scaled to
the bucket. Bandwidth is bytes read and written over the GPU's time for a call, from CUDA events around a group of calls
that the GPU begins only when the host has begun them all; median of interleaved rounds. Beside it, the host's time to
begin a call. The peer of every kernel is a copy from device to device of as many bytes, in the same round, and what
PyTorch offers for the same: torch.cat and a multiplication, torch._foreach_copy_ and one. Each result is verified
against float64.

allreduce: microseconds per call of hvd.allreduce of a float32 tensor on the GPU, slowest rank, and of the same tensor
in host memory, verified. Step: milliseconds per update of a model with the 161 parameters of ResNet-50 (25.6 million)
in bfloat16, with and without a backup worker, nobody slow and the last rank slower by --straggler-ms; and without any
computing, which leaves the data plane. With a backup worker on each data plane that there is (HVD_BACKUP_DATA_PLANE);
ranks that share a GPU use NCCL only if it is told that they may (2.29 or later). All ranks verify that their weights
are equal.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement
from hvd_backup import context, data_plane
from hvd_backup.config import Config
from hvd_backup.torch import staging
from hvd_backup.torch.data_plane import gpu_of

Job = Callable[[], object]

CALLS = 10  # between two events
GATE_CYCLES = 20_000_000  # the GPU waits for the host: 10 ms at 2 GHz
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]


def resnet50_sizes() -> list[int]:
    """Elements of each parameter, from the first layer to the last: 25,557,032 in 161."""
    sizes = [3 * 64 * 49, 64, 64]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(inputs, width, 1), (width, width, 9), (width, 4 * width, 1)]
            if block == 0:
                convolutions.append((inputs, 4 * width, 1))
            for into, out, kernel in convolutions:
                sizes += [into * out * kernel, out, out]
            inputs = 4 * width
    return [*sizes, 2048 * 1000, 1000]


def scaled_sizes(total: int) -> list[int]:
    """160 sizes in the proportions of ResNet-50, `total` elements together or a little less."""
    sizes = resnet50_sizes()[:160]
    factor = total / sum(sizes)
    return [max(1, int(size * factor)) for size in sizes]


class Seconds(NamedTuple):
    """Of one call, median of interleaved rounds."""

    gpu: float
    host: float  # until the call returns
    host_bound: float  # not 0: the GPU waited for the host, and `gpu` is too long


def rounds_of(jobs: dict[str, Job], rounds: int) -> dict[str, Seconds]:
    """Each job on a stream that has nothing else to do."""
    times: dict[str, list[Seconds]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(GATE_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            began = time.perf_counter()
            for _ in range(CALLS):
                job()
            host = time.perf_counter() - began
            end.record()
            host_bound = float(begin.query())
            end.synchronize()
            if number > 0:  # the first round warms up
                times[name].append(Seconds(begin.elapsed_time(end) / 1e3 / CALLS, host / CALLS, host_bound))
    return {name: Seconds(*map(statistics.median, zip(*each, strict=True))) for name, each in times.items()}


class KernelCase:
    """One bucket of one size and pair of dtypes."""

    def __init__(self, bucket_mib: float, gradient: torch.dtype, wire: torch.dtype) -> None:
        self.gradient, self.wire = gradient, wire
        self.scale = 0.125
        sizes = scaled_sizes(int(bucket_mib * 2**20 / wire.itemsize))
        step = 16 // wire.itemsize
        self.begins, end = [], 0
        for size in sizes:
            self.begins.append(end)
            end += -(-size // step) * step
        self.gradients = [torch.randn(size, device="cuda").to(gradient) for size in sizes]
        self.bucket = torch.zeros(end, dtype=wire, device="cuda")
        self.views = [self.bucket[b : b + size] for b, size in zip(self.begins, sizes, strict=True)]
        self.moved_bytes = sum(sizes) * (gradient.itemsize + wire.itemsize)
        self.copied = [torch.zeros(self.moved_bytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.shards = [torch.randn(end, device="cuda").to(wire) for _ in range(4)]
        self.sum = torch.zeros_like(self.bucket)
        self.tally = torch.zeros(2, dtype=torch.float64, device="cuda")

    def library(self, name: str, *more: Any) -> None:
        gpu = staging.library()
        assert gpu is not None
        getattr(gpu, name)(
            staging.DTYPES[self.gradient],
            staging.DTYPES[self.wire],
            [tensor.data_ptr() for tensor in self.gradients],
            self.begins,
            [tensor.numel() for tensor in self.gradients],
            self.bucket.data_ptr(),
            self.scale,
            self.bucket.device.index,
            torch.cuda.current_stream().cuda_stream,
            *more,
        )

    def library_sum(self) -> None:
        gpu = staging.library()
        assert gpu is not None
        gpu.sum(
            staging.DTYPES[self.wire],
            self.sum.data_ptr(),
            [shard.data_ptr() for shard in self.shards],
            [1.0] * len(self.shards),
            0.25,
            self.sum.numel(),
            self.sum.device.index,
            torch.cuda.current_stream().cuda_stream,
        )

    def cat(self) -> None:
        torch.cat(self.gradients).to(self.wire).mul_(self.scale)

    def foreach(self) -> None:
        torch._foreach_copy_(self.views, self.gradients)
        self.bucket.mul_(self.scale)

    def foreach_back(self) -> None:
        torch._foreach_copy_(self.gradients, self.views)
        torch._foreach_mul_(self.gradients, self.scale)

    def stacked_sum(self) -> None:
        torch.stack(self.shards).sum(0).mul_(0.25)

    def copy(self) -> None:
        self.copied[0].copy_(self.copied[1])

    def verify(self) -> None:
        """Against float64; raises."""
        before = [tensor.clone() for tensor in self.gradients]
        self.library("pack", self.tally.data_ptr())
        for tensor, view in zip(before, self.views, strict=True):
            expected = (tensor.double() * self.scale).to(self.wire)
            torch.testing.assert_close(view, expected, rtol=2 * torch.finfo(self.wire).eps, atol=0)
        squares = float(sum(view.double().square().sum() for view in self.views))
        if abs(float(self.tally[0]) / squares - 1) > 1e-9 or float(self.tally[1]) != 0:
            raise AssertionError(f"a wrong tally: {self.tally.tolist()}, expected {squares} and 0")
        self.library("unpack")
        for tensor, view in zip(self.gradients, self.views, strict=True):
            expected = (view.double() * self.scale).to(self.gradient)
            torch.testing.assert_close(tensor, expected, rtol=2 * torch.finfo(self.gradient).eps, atol=0)
        self.library_sum()
        exact = torch.stack([shard.double() for shard in self.shards]).sum(0) * 0.25
        torch.testing.assert_close(self.sum.double(), exact, rtol=2 * torch.finfo(self.wire).eps, atol=1e-6)
        for tensor, kept in zip(self.gradients, before, strict=True):
            tensor.copy_(kept)

    def run(self, rounds: int) -> list[dict[str, Any]]:
        """Bandwidth of each kernel and of its peers."""
        self.verify()
        jobs: dict[str, Job] = {
            "copy": self.copy,
            "pack + scale": lambda: self.library("pack"),
            "pack + scale + norm": lambda: self.library("pack", self.tally.data_ptr()),
            "torch.cat, mul_": self.cat,
            "_foreach_copy_, mul_": self.foreach,
            "unpack + scale": lambda: self.library("unpack"),
            "_foreach_copy_, _foreach_mul_": self.foreach_back,
            "sum of 4": self.library_sum,
            "torch.stack, sum": self.stacked_sum,
        }
        seconds = rounds_of(jobs, rounds)
        summed = (len(self.shards) + 1) * self.sum.numel() * self.wire.itemsize
        copy_rate = self.moved_bytes / seconds["copy"].gpu
        results = []
        for name, each in seconds.items():
            rate = (summed if "sum" in name else self.moved_bytes) / each.gpu
            results.append(
                {
                    "bucket_mib": self.bucket.numel() * self.wire.itemsize / 2**20,
                    "dtypes": f"{staging.DTYPES[self.gradient]} to {staging.DTYPES[self.wire]}",
                    "what": name,
                    "us": each.gpu * 1e6,
                    "host_us": each.host * 1e6,
                    "host_bound": each.host_bound > 0,
                    "gb_per_s": rate / 1e9,
                    "of_copy_bandwidth": rate / copy_rate,
                    "verified": True,
                }
            )
        return results


def allreduce_us(comm: MPI.Intracomm, elements: int, device: str, rounds: int) -> float:
    """Median over rounds of the slowest rank's time per call, in microseconds."""
    tensor = torch.full((elements,), float(comm.rank), device=device)
    expected = (comm.size - 1) / 2
    times = []
    for number in range(rounds + 1):
        measurement.quiet_barrier(comm)
        began = time.perf_counter()
        mean = hvd.allreduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        took = comm.allreduce(time.perf_counter() - began, MPI.MAX)
        if not bool((mean == expected).all()):
            raise AssertionError(f"allreduce gave {mean[:3].tolist()}, expected {expected}")
        if number > 0:
            times.append(took)
    return statistics.median(times) * 1e6


class Weighing(torch.autograd.Function):
    """Adds up the weights' first elements; the gradient of each weight is made by the GPU, like a layer's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x + weight.flatten()[0].float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (weight,) = ctx.saved_tensors
        return grads[0], weight * 0.01 + 1e-3


def planes_here(comm: MPI.Intracomm) -> list[str]:
    """The values of HVD_BACKUP_DATA_PLANE that can be used on all ranks."""
    device = torch.device("cuda", torch.cuda.current_device())
    planes = ["host"]
    for plane in ("nccl", "mpi"):
        config = Config.from_environment().override(data_plane=plane)
        gpu, why_not = gpu_of(device, config)
        if not why_not:
            _, why_not = data_plane.means_of(gpu, config, context.current().engine.takes_device_memory)
        told = [text for text in comm.allgather(why_not) if text]
        if told and comm.rank == 0:
            print(f"not by {plane}: {told[0]}")
        planes += [] if told else [plane]
    return planes


def step_ms(
    comm: MPI.Intracomm, plane: str, backup_workers: int, straggler_ms: float, steps: int, compute_ms: float
) -> float:
    """Median milliseconds per update on rank 0, a straggler or none; raises if the ranks' weights differ."""
    hvd.shutdown()
    os.environ["HVD_BACKUP_DATA_PLANE"] = plane
    hvd.init()
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, device="cuda").bfloat16()) for size in resnet50_sizes()]
    named = [(f"layer{index}", weight) for index, weight in enumerate(weights)]
    plain = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
    options = {"backup_workers": backup_workers, "grace": 0.002}  # nobody is left out for nothing
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=named, **options)
    ended = []
    for _ in hvd.follow(range(steps), optimizer):
        time.sleep((compute_ms + (straggler_ms if comm.rank == comm.size - 1 else 0.0)) / 1e3)
        optimizer.zero_grad()
        x = torch.zeros(1, device="cuda", requires_grad=True)
        for weight in weights:
            x = Weighing.apply(x, weight)  # type: ignore[no-untyped-call]
        x.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        torch.cuda.synchronize()
        ended.append(time.perf_counter())
    digests = hvd.allgather_object([float(weight.double().sum()) for weight in weights])
    if any(digest != digests[0] for digest in digests):
        raise AssertionError("the weights of the ranks differ")
    # The second half: by then GPUs are connected.
    return statistics.median(b - a for a, b in itertools.pairwise(ended[steps // 2 :])) * 1e3


def print_kernels(results: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            f"{r['bucket_mib']:.0f}",
            r["dtypes"],
            r["what"],
            f"{r['us']:.1f}{'*' if r['host_bound'] else ''}",
            f"{r['gb_per_s']:.0f}",
            f"{r['of_copy_bandwidth']:.2f}",
            f"{r['host_us']:.1f}",
        )
        for r in results
    ]
    columns = ["bucket [MiB]", "dtypes", "what", "time [us]", "GB/s", "of a copy's", "host [us]"]
    measurement.print_table(
        f"Kernels on {torch.cuda.get_device_name()}",
        columns,
        rows,
        "Verified against float64. *: the GPU waited for the host.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bucket-mib", type=float, nargs="+", default=[25.0, 100.0, 400.0], help="sizes of buckets")
    parser.add_argument("--rounds", type=int, default=20, help="of each measurement (default 20)")
    parser.add_argument("--steps", type=int, default=40, help="updates of each training (default 40)")
    parser.add_argument("--compute-ms", type=float, default=50.0, help="every rank's computing per step (default 50)")
    parser.add_argument("--straggler-ms", type=float, default=200.0, help="what the last rank adds to it (default 200)")
    if not torch.cuda.is_available():
        parser.parse_args()
        sys.exit("gpu_perf: PyTorch finds no GPU here (torch.cuda.is_available() is False), nothing to measure")
    args = measurement.parse(parser, ranks=4)
    if args.quick:
        args.bucket_mib, args.rounds, args.steps = [1.0, 25.0], 3, 12
    comm = MPI.COMM_WORLD
    hvd.init()
    torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    if hvd.local_size() > torch.cuda.device_count():
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    kernels: list[dict[str, Any]] = []
    if comm.rank == 0 and staging.library() is not None:
        for mib in args.bucket_mib:
            for gradient, wire in DTYPES:
                kernels += KernelCase(mib, gradient, wire).run(args.rounds)
        print_kernels(kernels)
    elif comm.rank == 0:
        print("no kernels: hvd_backup was built without the GPU library (no nvcc)")
    measurement.quiet_barrier(comm)
    sizes = [2**10, 2**16, 2**20, 2**24]
    planes = [
        {"bytes": 4 * size, "device": device, "us": allreduce_us(comm, size, device, args.rounds)}
        for size in sizes
        for device in ("cuda", "cpu")
    ]
    loads = [(args.compute_ms, 0.0), (args.compute_ms, args.straggler_ms), (0.0, 0.0)]
    ways = [("host", 0), *((plane, 1) for plane in planes_here(comm) if comm.size > 1)]
    steps = [
        {
            "plane": plane,
            "backup_workers": b,
            "compute_ms": compute,
            "straggler_ms": late,
            "ms": step_ms(comm, plane, b, late, args.steps, compute),
        }
        for plane, b in ways
        for compute, late in loads
    ]
    if comm.rank == 0:
        rows = [(f"{p['bytes'] / 1024:.0f}", p["device"], f"{p['us']:.0f}") for p in planes]
        measurement.print_table(f"allreduce, {comm.size} ranks", ["size [KiB]", "on", "time [us]"], rows)
        rows = [
            (s["plane"], str(s["backup_workers"]), f"{s['compute_ms']:g}", f"{s['straggler_ms']:g}", f"{s['ms']:.1f}")
            for s in steps
        ]
        title = f"Update of ResNet-50's size in bfloat16, {comm.size} ranks"
        columns = ["data plane", "b", "computing [ms]", "last rank late by [ms]", "update [ms]"]
        measurement.print_table(title, columns, rows, "Verified: equal weights on all ranks.")
        document = {"kernels": kernels, "allreduce": planes, "steps": steps}
        settings = {**vars(args), "ranks": comm.size, "gpu": torch.cuda.get_device_name()}
        measurement.write_json(args.json, "gpu_perf", settings, document)
    hvd.shutdown()


if __name__ == "__main__":
    main()
