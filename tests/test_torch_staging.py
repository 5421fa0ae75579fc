"""Gradients on a GPU, which reach the engine through host memory: with a stand-in for a GPU, and on one where one is.

The stand-in copies late, and finds what is used too early (tests/delayed_transfers.py). That training gives the same
bits with it as without is tested with everything that people combine: test_torch_combinations.py.
"""

from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup.torch import staging
from hvd_backup.torch.buckets import Buckets, plan
from tests.delayed_transfers import DelayedTransfers, use
from tests.torch_training import batch, digest, loss_of, make_model


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> DelayedTransfers:
    late = DelayedTransfers()
    monkeypatch.setattr(staging, "transfers_of", lambda device: late)
    return late


def filled(parameters: list[torch.Tensor]) -> Buckets:
    """Buckets whose contribution is on its way."""
    buckets = Buckets(parameters, list(range(len(parameters))), 1 << 20)
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, index + 1.0)
        buckets.pack(index, show=False)
    buckets.send(0, prescale=2.0)
    return buckets


def parameters_of(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


def test_a_contribution_is_in_host_memory_when_it_is_said_to_be(transfers: DelayedTransfers) -> None:
    buckets = filled(parameters_of((2,), (3,)))
    (bucket,) = buckets.all
    assert bucket.sent.data_ptr() != bucket.contribution.data_ptr()
    assert bucket.sent.isnan().all()
    while not (sent := list(buckets.take_sent(wait=False))):
        assert bucket.sent.isnan().all()
    assert sent == [(0, bucket.sent.data_ptr(), bucket.received.data_ptr())]
    assert bucket.sent.tolist() == [2.0, 2.0, 4.0, 4.0, 4.0]
    assert list(buckets.take_sent(wait=True)) == [], "it is handed over once"


def test_all_streams_that_have_packed_are_gathered(transfers: DelayedTransfers) -> None:
    (bucket,) = filled(parameters_of((2,), (2,), (2,))).all
    assert transfers.ungathered == set()
    assert bucket.is_sent(wait=True)


def test_a_result_comes_back_and_stays_until_it_is_loaded(transfers: DelayedTransfers) -> None:
    parameters = parameters_of((2,), (2, 2))
    buckets = filled(parameters)
    (bucket,) = buckets.all
    bucket.is_sent(wait=True)
    bucket.received.copy_(torch.arange(6.0))
    buckets.show_results(0.5, [True])
    assert [parameter.grad.tolist() for parameter in parameters] == [[0.0, 0.5], [[1.0, 1.5], [2.0, 2.5]]]
    bucket.received.zero_()
    with pytest.raises(AssertionError, match="has changed before"):
        buckets.results_loaded()


def test_what_the_user_makes_of_a_result_is_what_late_ranks_get(transfers: DelayedTransfers) -> None:
    parameters = parameters_of((2,), (2,))
    buckets = filled(parameters)
    (bucket,) = buckets.all
    bucket.is_sent(wait=True)
    bucket.received.copy_(torch.arange(4.0))
    buckets.show_results(1.0, [True])
    buckets.results_loaded()
    parameters[0].grad = torch.tensor([7.0, 8.0])
    parameters[1].grad.mul_(10.0)
    buckets.settle_results()
    buckets.store_results()
    assert bucket.received.tolist() == [7.0, 8.0, 20.0, 30.0]


def test_roles_are_exchanged_in_host_memory_too(transfers: DelayedTransfers) -> None:
    buckets = filled(parameters_of((2,)))
    (bucket,) = buckets.all
    sent, received = bucket.sent.data_ptr(), bucket.received.data_ptr()
    assert buckets.result_addresses() == [received]
    buckets.exchange_roles()
    assert (bucket.sent.data_ptr(), bucket.received.data_ptr()) == (received, sent)
    assert buckets.result_addresses() == [sent]


def test_a_bucket_is_on_one_device() -> None:
    parameters = [torch.zeros(2), torch.zeros(2, device="meta"), torch.zeros(2)]
    assert plan(parameters, [0, 1, 2], 1 << 20) == [[1], [0, 2]]
    assert plan(parameters, [0, 1, 2], 1 << 20, groups=[[0, 1, 2]]) == [[1], [0, 2]]


def test_on_the_cpu_the_engine_uses_the_very_buffers() -> None:
    (bucket,) = filled(parameters_of((2,))).all
    assert bucket.sent is bucket.contribution and bucket.received is bucket.result
    assert bucket.is_sent(wait=False)


@pytest.mark.ranks(4)
def test_ranks_with_and_without_a_gpu_train_together() -> None:
    """The same bits as without."""
    hvd.init()
    late = DelayedTransfers(seed=hvd.rank())
    digests = []
    for staged in (False, True):
        use(late if staged and hvd.rank() % 2 else None)
        model = make_model()
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, batch(hvd.rank(), step)).backward()
            optimizer.step()
        digests.append(digest(model, optimizer))
    assert digests[0] == digests[1]
    assert (late.sent > 0 and late.loaded > 0) == bool(hvd.rank() % 2)


def on_gpu(*shape: int) -> Any:
    return torch.ones(shape, device="cuda")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@gpu
@pytest.mark.ranks(2)
def test_collectives_give_tensors_back_on_the_gpu() -> None:
    hvd.init()
    assert hvd.allreduce(on_gpu(3) * hvd.rank(), op=hvd.Sum).tolist() == [1.0] * 3
    in_place = on_gpu(2) * hvd.rank()
    hvd.allreduce_(in_place)
    assert in_place.is_cuda and in_place.tolist() == [0.5, 0.5]
    assert hvd.allgather(on_gpu(1, 2)).is_cuda
    assert hvd.broadcast(on_gpu(2) * hvd.rank(), 1).tolist() == [1.0, 1.0]
    assert hvd.first_n_allreduce(on_gpu(2), n=1).result.is_cuda


@gpu
@pytest.mark.ranks(4)
def test_i1_training_on_a_gpu_that_ranks_share() -> None:
    hvd.init()
    torch.manual_seed(0)
    model = make_model().cuda()
    hvd.broadcast_parameters(model.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), backup_workers=1)
    for _ in hvd.follow(range(30), optimizer):
        optimizer.zero_grad()
        loss_of(model, tuple(x.cuda() for x in batch(hvd.rank(), optimizer.global_step))).backward()
        optimizer.step()
    assert len({tuple(each) for each in hvd.allgather_object([p.sum().item() for p in model.parameters()])}) == 1
