"""On a GPU: the library's kernels, collectives, and training by ranks that share one. Skipped where there is none.

compute-sanitizer --tool memcheck python -m pytest tests/test_gpu.py -k kernel      # and --tool racecheck
"""

import ctypes
import os
import random
import time
from typing import Any

import numpy as np
import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import _core_testing as core
from hvd_backup.torch import staging
from tests.arithmetic import FLOATS, random_elements, storage
from tests.launch import start_ranks
from tests.rank_main import mark
from tests.test_gpu_kernels import CASTS
from tests.torch_training import batch, digest, loss_of, make_model

pytestmark = pytest.mark.gpu

COUNTS = [1, 7, 4096, 100_003, 0, 65536, 3]


def library() -> Any:
    found = staging.library()
    assert found is not None, "on a machine with a GPU, tests want hvd_backup built where nvcc is"
    return found


def stored(dtype: str, count: int, rng: np.random.Generator) -> Any:
    """Random elements of any bit pattern, in a tensor of bytes on the GPU, and the same in host memory."""
    elements = random_elements(dtype, count, rng, special=True)
    return torch.from_numpy(elements.view(np.uint8).copy()).cuda(), elements


def same_bytes(tensor: torch.Tensor, array: Any) -> bool:
    return tensor.cpu().numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize(("gradient", "wire"), CASTS)
def test_kernels_give_the_bits_that_they_give_on_the_cpu(gradient: str, wire: str) -> None:
    rng = np.random.default_rng(0)
    step = 16 // storage(wire).itemsize
    begins, end = [], 0
    for count in COUNTS:
        begins.append(end)
        end += -(-count // step) * step
    there, here = zip(*(stored(gradient, count, rng) for count in COUNTS), strict=True)
    bucket, expected = stored(wire, end, rng)
    tally = torch.ones(2, dtype=torch.float64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    sizes = begins, COUNTS
    library().pack(
        gradient, wire, [t.data_ptr() for t in there], *sizes, bucket.data_ptr(), 1 / 3, 0, stream, tally.data_ptr()
    )
    _, squares, nonfinite = core.gpu_pack(
        gradient, wire, [a.ctypes.data for a in here], *sizes, expected.ctypes.data, 1 / 3, True
    )
    assert same_bytes(bucket, expected)
    assert (tally[1].item() != 0) == nonfinite
    assert tally[0].item() == pytest.approx(squares, rel=1e-9, nan_ok=True)
    library().unpack(gradient, wire, [t.data_ptr() for t in there], *sizes, bucket.data_ptr(), 3.0, 0, stream)
    core.gpu_unpack(gradient, wire, [a.ctypes.data for a in here], *sizes, expected.ctypes.data, 3.0)
    assert all(same_bytes(tensor, array) for tensor, array in zip(there, here, strict=True))


def test_the_gpu_writes_to_its_host_memory() -> None:
    memory = library().Device(0).host_memory(4)
    element = ctypes.c_float.from_address(memory.address)
    element.value = 1.0
    stream = torch.cuda.current_stream().cuda_stream
    library().pack("float32", "float32", [0], [0], [1], memory.address, 1.0, 0, stream)
    torch.cuda.synchronize()
    assert element.value == 0.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_kernel_gives_the_bits_of_the_cpus(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for count in COUNTS:
        there, here = zip(*(stored(dtype, count, rng) for _ in range(5)), strict=True)
        weights = [1.0, 0.3, -2.5, 0.0, 1.0]
        stream = torch.cuda.current_stream().cuda_stream
        library().sum(dtype, there[4].data_ptr(), [t.data_ptr() for t in there], weights, 0.25, count, 0, stream)
        pointers = [array.ctypes.data for array in here]
        core.weighted_sum(dtype, pointers[4], pointers, weights, 0.25, count)
        assert same_bytes(there[4], here[4])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spoiled", [False, True])
def test_the_sum_kernel_measures_what_it_sums(dtype: str, spoiled: bool) -> None:
    """To the same bits as without; the norms are those that the CPU finds, thread by thread."""
    rng = np.random.default_rng(0)
    weights = [1.0, 0.3, -2.5]
    norms = torch.full((2,), 7.0, dtype=torch.float64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for count in COUNTS:
        here = [random_elements(dtype, count, rng, special=spoiled) for _ in weights]
        there = [torch.from_numpy(array.view(np.uint8).copy()).cuda() for array in here]
        addresses = [tensor.data_ptr() for tensor in there]
        library().sum(dtype, addresses[2], addresses, weights, 0.25, count, 0, stream, norms.data_ptr())
        pointers = [array.ctypes.data for array in here]
        expected = core.gpu_sum(dtype, pointers[2], pointers, weights, 0.25, count, True)
        assert same_bytes(there[2], here[2])
        assert norms.tolist() == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_a_device_gives_the_norms_of_each_of_its_sums() -> None:
    device = library().Device(0)
    for count in COUNTS:
        there = [torch.full((count,), value, dtype=torch.float64, device="cuda") for value in (3.0, 5.0)]
        torch.cuda.synchronize()
        addresses = [tensor.data_ptr() for tensor in there]
        norms = core.measured_sum_on(device.address, "float64", addresses[1], addresses, [1.0, 1.0], 0.5, count)
        assert norms == (34.0 * count, 16.0 * count)


@pytest.mark.ranks(2)
def test_collectives_give_tensors_back_on_the_gpu() -> None:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device="cuda")

    hvd.init()
    assert hvd.allreduce(ones(3) * hvd.rank(), op=hvd.Sum).tolist() == [1.0] * 3
    in_place = ones(2) * hvd.rank()
    hvd.allreduce_(in_place)
    assert in_place.is_cuda and in_place.tolist() == [0.5, 0.5]
    assert hvd.allgather(ones(1, 2)).is_cuda
    assert hvd.broadcast(ones(2) * hvd.rank(), 1).tolist() == [1.0, 1.0]
    assert hvd.first_n_allreduce(ones(2), n=1).result.is_cuda


@pytest.mark.parametrize("where", ["current stream", "another stream"])
@pytest.mark.parametrize("compression", ["none", "fp16"])
@pytest.mark.ranks(4)
def test_i1_training_on_a_gpu_that_ranks_share(where: str, compression: str) -> None:
    """Random delays, one backup worker: the same weights, bit for bit."""
    hvd.init()
    torch.manual_seed(0)
    model = make_model().cuda()
    hvd.broadcast_parameters(model.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01),
        backup_workers=1,
        compression=getattr(hvd.Compression, compression),
    )
    rng = random.Random(os.getpid())
    side = torch.cuda.Stream() if where == "another stream" else torch.cuda.current_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in hvd.follow(range(60), optimizer):
            time.sleep(rng.choice([0, 0, 0.002, 0.02]))
            optimizer.zero_grad()
            loss_of(model, tuple(x.cuda() for x in batch(hvd.rank(), optimizer.global_step))).backward()
            optimizer.step()
    torch.cuda.synchronize()
    digests = hvd.allgather_object(digest(model, optimizer))
    assert all(each == digests[0] for each in digests)
    assert optimizer.global_step == 60


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_bucket_is_judged_while_it_is_packed(spoiled: bool) -> None:
    """As nonfinite="drop" does, also for a gradient that lies in its bucket already."""
    library()
    device = torch.device("cuda", 0)
    transfers = staging.transfers_of(device)
    assert transfers is not None
    bucket, tally = torch.ones(10, device=device), torch.ones(2, dtype=torch.int64, device=device)
    bucket[3] = float("inf") if spoiled else 3.0
    packing = staging.Packing()
    packing.add(bucket[:4], bucket[:4])
    packing.add(torch.full((6,), 2.0, device=device), bucket[4:])
    transfers.pack(packing, bucket, 1.0, tally)
    verdict = transfers.host_memory(2, torch.int64)
    transfers.to_host(tally, verdict).wait()
    assert (int(verdict[1]) != 0) == spoiled
    assert bucket[4:].tolist() == [2.0] * 6


def train_from_gpu_to_gpu(steps: int) -> dict[str, Any]:
    hvd.init()
    torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    model = make_model().cuda()
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), backup_workers=1, grace=0.005)
    rng = random.Random(os.getpid())
    for _ in hvd.follow(range(steps), optimizer):
        time.sleep(rng.choice([0.005, 0.005, 0.01, 0.05]))
        optimizer.zero_grad()
        loss_of(model, tuple(x.cuda() for x in batch(hvd.rank(), optimizer.global_step))).backward()
        optimizer.step()
        if optimizer.global_step > steps // 4:
            mark("trains")
    torch.cuda.synchronize()
    return {"digest": digest(model, optimizer), "step": optimizer.global_step, "caught_up": optimizer.counters()}


@pytest.mark.parametrize("journal", ["host", "device"])
@pytest.mark.parametrize("stops", [False, True])
def test_i1_i4_training_from_gpu_to_gpu_by_nccl(stops: bool, journal: str) -> None:
    """On one GPU, if there are no more: NCCL 2.29 or later can. One process may be stopped: the others go on."""
    env = {"HVD_BACKUP_DATA_PLANE": "nccl", "HVD_BACKUP_JOURNAL": journal, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    with start_ranks(4, train_from_gpu_to_gpu, [400], env=env, timeout_s=300) as job:
        if stops:
            job.wait_for_mark(0, "trains", timeout_s=200)
            job.stop(3)
            time.sleep(2.0)
            job.resume(3)
        outcome = job.wait()
    values = outcome.values()
    assert "exchange data directly (NCCL)" in outcome.ranks[0].output, outcome.describe()
    assert len({value["digest"] for value in values}) == 1
    assert [value["step"] for value in values] == [400] * 4
