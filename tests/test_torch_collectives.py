"""The collectives on tensors: every dtype, shape and layout, in place or not, differentiated."""

from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import faults

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


def given(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small integers, exact in every dtype, other ones on each rank."""
    return ((torch.arange(torch.Size(shape).numel()) % 7).reshape(shape) + 2**rank).to(dtype)


@pytest.mark.ranks(1, 2, 4)
def test_collectives_of_every_dtype_and_shape(size: int) -> None:
    hvd.init()
    rank = hvd.rank()
    for dtype in DTYPES:
        for shape in ((), (1,), (7,), (3, 5), (1000,)):
            everybody = torch.stack([given(r, shape, dtype) for r in range(size)])
            mine = given(rank, shape, dtype)
            total = everybody.sum(0).to(dtype)
            mean = everybody.double().mean(0).floor().to(dtype) if not dtype.is_floating_point else total / size
            assert torch.equal(hvd.allreduce(mine, op=hvd.Sum), total)
            torch.testing.assert_close(hvd.allreduce(mine), mean)
            assert torch.equal(hvd.allreduce(mine, average=False, name=f"{dtype}{shape}"), total)
            assert torch.equal(mine, given(rank, shape, dtype))
            assert hvd.allreduce_(mine, op=hvd.Sum) is mine and torch.equal(mine, total)
            handles = [hvd.allreduce_async(given(rank, shape, dtype), op=hvd.Sum) for _ in range(3)]
            assert all(torch.equal(hvd.synchronize(handle), total) for handle in reversed(handles))
            assert all(hvd.poll(handle) for handle in handles)
            result, contributors = hvd.first_n_allreduce(given(rank, shape, dtype), op=hvd.Sum)
            assert torch.equal(result, total) and contributors == tuple(range(size))
            root = size - 1
            assert torch.equal(hvd.broadcast(given(rank, shape, dtype), root), everybody[root])
            target = given(rank, shape, dtype)
            assert hvd.broadcast_(target, root) is target and torch.equal(target, everybody[root])
            rows = given(rank, shape and (rank, *shape[1:]), dtype)
            expected = [
                given(r, shape, dtype)[None] if shape == () else given(r, (r, *shape[1:]), dtype) for r in range(size)
            ]
            assert torch.equal(hvd.allgather(rows), torch.cat(expected))
    assert hvd.allgather(torch.tensor([rank > 0])).tolist() == [r > 0 for r in range(size)]
    assert hvd.broadcast_object({"rank": rank}, 0) == {"rank": 0}
    assert hvd.allgather_object(rank) == list(range(size))
    hvd.barrier()


@pytest.mark.ranks(2)
def test_layouts_scales_compression_and_derivatives() -> None:
    hvd.init()
    rank = hvd.rank()
    column = torch.arange(12.0).reshape(3, 4).t() + rank
    assert hvd.allreduce(column, op=hvd.Sum).tolist() == (2 * torch.arange(12.0).reshape(3, 4).t() + 1).tolist()
    strided = (torch.zeros(4, 6) + rank)[:, ::2]
    hvd.broadcast_(strided, 1)
    assert strided.tolist() == [[1.0] * 3] * 4
    hvd.allreduce_(strided, op=hvd.Sum)
    assert strided.tolist() == [[2.0] * 3] * 4
    assert hvd.allreduce(torch.ones(3), prescale_factor=4.0, postscale_factor=0.5, op=hvd.Sum).tolist() == [4.0] * 3
    squeezed = hvd.allreduce(torch.full((3,), 1.5 + rank), compression=hvd.Compression.fp16)
    assert squeezed.dtype is torch.float32 and squeezed.tolist() == [2.0] * 3
    for function, expected in (
        (lambda x: hvd.allreduce(x), 1.0),
        (lambda x: hvd.allreduce(x, op=hvd.Sum), 2.0),
        (lambda x: hvd.allgather(x), 2.0),
        (lambda x: hvd.broadcast(x, 1), 2.0 if rank == 1 else 0.0),
    ):
        x = torch.ones(3, requires_grad=True)
        function(x).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [expected] * 3
    for call, told in (
        (lambda: hvd.allreduce(torch.ones(2, dtype=torch.uint8)), "uint8 is not supported"),
        (lambda: hvd.allreduce(torch.ones(2, device="meta")), "is on meta"),
        (lambda: hvd.allreduce(torch.eye(2).to_sparse()), "dense"),
        (lambda: hvd.allreduce([1.0]), "expected a torch.Tensor"),
        (lambda: hvd.allreduce(torch.ones(2), average=True, op=hvd.Sum), "give one of them"),
        (lambda: hvd.allreduce(torch.ones(2), process_set=1), "process_set"),
        (lambda: hvd.broadcast(torch.ones(2), 2), "root_rank=2"),
        (lambda: hvd.first_n_allreduce(torch.ones(2), n=3), "n=3"),
        (lambda: hvd.broadcast_parameters({"a": 1}, 0), "a is a int, no tensor"),
    ):
        with pytest.raises(hvd.UsageError, match=told):
            call()
    with pytest.raises(hvd.UsageError, match=r"different collectives.*broadcast_parameters\(a float32\[[23]\]"):
        hvd.broadcast_parameters({"a": torch.ones(2 + rank)}, 0)
    hvd.barrier()


@pytest.mark.ranks(4)
def test_first_n_names_who_contributed() -> None:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    outcomes: list[Any] = []
    delays = faults.Injection((faults.Delay(rank="rotate:1", ms=20),))
    for step in range(12):
        delays.sleep(rank, step, size)
        result, contributors = hvd.first_n_allreduce(torch.full((5,), 2.0**rank), n=3, name="who", op=hvd.Sum)
        assert result.tolist() == [sum(2.0**r for r in contributors)] * 5
        assert len(contributors) >= 3
        outcomes.append(contributors)
    assert len(set(hvd.allgather_object(tuple(outcomes)))) == 1
    assert any(len(contributors) == 3 for contributors in outcomes)
    last = hvd.join()
    assert 0 <= last < size
