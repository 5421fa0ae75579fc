"""Gradients on a GPU, which reach the engine through host memory: with a stand-in for a GPU. On one: test_gpu.py.

The stand-in copies late, and finds what is used too early (tests/delayed_transfers.py). That training gives the same
bits with it as without is tested with everything that people combine: test_torch_combinations.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import data_plane
from hvd_backup.torch import staging
from hvd_backup.torch.bucket_plan import plan
from hvd_backup.torch.buckets import Buckets
from tests.delayed_transfers import DelayedTransfers, HostLibrary, use
from tests.torch_training import batch, digest, loss_of, make_model


@pytest.fixture(params=[HostLibrary, None], ids=["fused", "without the GPU library"])
def transfers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[DelayedTransfers]:
    late = DelayedTransfers()
    monkeypatch.setattr(staging, "transfers_of", lambda device: late)
    monkeypatch.setattr(staging, "library", lambda: request.param)
    yield late
    assert late.fused == (1 if request.param else 0)


def filled(parameters: list[torch.Tensor]) -> Buckets:
    """Buckets whose contribution is on its way."""
    buckets = Buckets(parameters, list(range(len(parameters))), 1 << 20, prescale=2.0)
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, index + 1.0)
        buckets.pack(index, show=False)
    return buckets


def parameters_of(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


def test_a_contribution_is_in_host_memory_when_it_is_said_to_be(transfers: DelayedTransfers) -> None:
    buckets = filled(parameters_of((4,), (3,)))
    (bucket,) = buckets.all
    assert bucket.sent.data_ptr() != bucket.contribution.data_ptr()
    assert bucket.sent.isnan().all()
    while not (sent := list(buckets.take_sent(wait=False))):
        assert bucket.sent.isnan().all()
    assert sent == [(0, bucket.sent.data_ptr(), bucket.received.data_ptr(), None)]
    assert bucket.sent.tolist() == [2.0] * 4 + [4.0] * 3
    assert list(buckets.take_sent(wait=True)) == [], "it is handed over once"


def test_all_streams_that_have_packed_are_gathered(transfers: DelayedTransfers) -> None:
    (bucket,) = filled(parameters_of((2,), (2,), (2,))).all
    assert transfers.ungathered == set()
    assert bucket.is_sent(wait=True)


def test_a_result_comes_back_and_stays_until_it_is_loaded(transfers: DelayedTransfers) -> None:
    parameters = parameters_of((4,), (2, 2))
    buckets = filled(parameters)
    (bucket,) = buckets.all
    bucket.is_sent(wait=True)
    bucket.received.copy_(torch.arange(8.0))
    buckets.show_results(0.5, [True], own=True)
    assert [parameter.grad.tolist() for parameter in parameters] == [[0.0, 0.5, 1.0, 1.5], [[2.0, 2.5], [3.0, 3.5]]]
    bucket.received.zero_()
    with pytest.raises(AssertionError, match="has changed before"):
        buckets.results_loaded()


def test_what_the_user_makes_of_a_result_is_what_late_ranks_get(transfers: DelayedTransfers) -> None:
    parameters = parameters_of((4,), (2,))
    buckets = filled(parameters)
    (bucket,) = buckets.all
    bucket.is_sent(wait=True)
    bucket.received.copy_(torch.arange(6.0))
    buckets.show_results(1.0, [True], own=True)
    buckets.results_loaded()
    parameters[0].grad = torch.tensor([6.0, 7.0, 8.0, 9.0])
    parameters[1].grad.mul_(10.0)
    buckets.settle_results()
    buckets.store_results()
    assert bucket.received.tolist() == [6.0, 7.0, 8.0, 9.0, 40.0, 50.0]


def test_roles_are_exchanged_in_host_memory_too(transfers: DelayedTransfers) -> None:
    buckets = filled(parameters_of((2,)))
    (bucket,) = buckets.all
    sent, received = bucket.sent.data_ptr(), bucket.received.data_ptr()
    assert buckets.result_addresses() == [received]
    buckets.exchange_roles()
    assert (bucket.sent.data_ptr(), bucket.received.data_ptr()) == (received, sent)
    assert buckets.result_addresses() == [sent]


@pytest.mark.parametrize("library", [HostLibrary, None], ids=["fused", "without the GPU library"])
@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
@pytest.mark.parametrize("show", [False, True])
def test_gradients_of_every_form_are_packed(
    monkeypatch: pytest.MonkeyPatch, library: Any, compression: Any, show: bool
) -> None:
    """None, of another order of elements than its parameter, in its place already, not aligned: and twice."""
    if show and compression is hvd.Compression.fp16:
        return  # DistributedOptimizer refuses the two together
    late = DelayedTransfers()
    monkeypatch.setattr(staging, "transfers_of", lambda device: late)
    monkeypatch.setattr(staging, "library", lambda: library)
    parameters = parameters_of((3, 5), (7,), (2, 3, 4, 5), (6,), (1, 1))
    parameters[2] = torch.nn.Parameter(parameters[2].detach().to(memory_format=torch.channels_last))
    buckets = Buckets(parameters, [4, 1, 0, 3, 2], 1 << 20, compression=compression, prescale=0.5)
    (bucket,) = buckets.all
    for missing in (None, 3):
        expected = []
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape) if index != 2 else torch.randn_like(parameter)
            parameter.grad = gradient if index != missing else None
            if index == 1:
                parameter.grad = torch.randn(8)[1:]
            expected.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
            buckets.pack(index, show)
        bucket.is_sent(wait=True)
        for index, view in zip(bucket.members, bucket.contribution_views, strict=True):
            assert torch.equal(view, (expected[index] * 0.5).to(view.dtype))
            assert (parameters[index].grad is view) == (show and index != missing)
        assert torch.equal(bucket.sent, bucket.contribution)
        buckets.start_afresh()
    parameters[0].grad = torch.randn(5, 3).t()
    scaled = parameters[0].grad * 0.5
    for index in range(len(parameters)):
        buckets.pack(index, show)
    slot = bucket.members.index(0)
    assert torch.equal(bucket.contribution_views[slot], scaled.to(bucket.contribution.dtype))
    assert late.fused == (0 if library is None else 3 if show else 2), "another order of elements: not by the library"


def test_a_gpu_library_that_does_not_run_here_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class CompiledForOthers:
        @staticmethod
        def try_on(number: int) -> None:
            if number > 1000:
                raise RuntimeError("CUDA: moving gradients: no kernel image is available for execution on the device")

        @staticmethod
        def Device(number: int, nccl_library: str) -> None:  # noqa: N802
            raise RuntimeError("CUDA: making a memory pool: operation not supported")

    for module in (staging, data_plane):
        monkeypatch.setattr(module, "library", lambda: CompiledForOthers)
    assert staging.library_for(1000) is CompiledForOthers
    with pytest.warns(UserWarning, match=r"PyTorch packs gradients: .* not run on GPU 1001 \(CUDA: .*no kernel image"):
        assert staging.library_for(1001) is None
    assert data_plane.the_gpu(1001, "")[0] is None
    gpu, why_not = data_plane.the_gpu(1000, "")
    assert gpu is None and "GPU 1000 does not have what the engine needs (CUDA: making a memory pool" in why_not
    for module in (staging, data_plane):
        monkeypatch.setattr(module, "library", lambda: None)
    assert staging.library_for(1000) is None
    assert data_plane.the_gpu(1000, "") == (None, "hvd_backup was built without the GPU library (nvcc)")


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
        use(late if staged and hvd.rank() % 2 else None, library=HostLibrary if hvd.rank() == 1 else None)
        model = make_model()
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, batch(hvd.rank(), step)).backward()
            optimizer.step()
        digests.append(digest(model, optimizer))
    assert digests[0] == digests[1]
    assert (late.sent > 0 and late.loaded > 0) == bool(hvd.rank() % 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_what_was_compressed_is_unpacked_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, scale: float, dtype: torch.dtype
) -> None:
    """On the CPU, on a GPU, and on one without the GPU library: all ranks apply the same."""
    torch.manual_seed(1)
    mean = torch.randn(200).half()
    for transfers, library in ((None, None), (DelayedTransfers(), None), (DelayedTransfers(), HostLibrary)):
        monkeypatch.setattr(staging, "transfers_of", lambda device, own=transfers: own)
        monkeypatch.setattr(staging, "library", lambda own=library: own)
        parameters = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters_of((3, 5), (2, 3, 4, 5), (6,), (0,))]
        parameters[1] = torch.nn.Parameter(parameters[1].detach().to(memory_format=torch.channels_last))
        buckets = Buckets(parameters, [3, 1, 0, 2], 1 << 20, compression=hvd.Compression.fp16)
        (bucket,) = buckets.all
        bucket.received.copy_(mean[: bucket.received.numel()])
        views = [view.clone() for view in bucket.result_views]
        buckets.show_results(scale, [True], own=True)
        if transfers is None:
            expected = [(view.to(dtype) * scale) for view in views]
        else:
            assert transfers.unpacked == (library is not None)
        for index, value in zip(bucket.members, expected, strict=True):
            gradient = parameters[index].grad
            assert gradient is not None and gradient.dtype == dtype and torch.equal(gradient, value)


@pytest.mark.parametrize("library", [HostLibrary, None])
@pytest.mark.parametrize("spoiled", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 5])
def test_a_bucket_is_judged_while_it_is_packed(place: int, spoiled: float, library: Any) -> None:
    """nonfinite="drop"; also a gradient that lies in its bucket already."""
    bucket, tally = torch.ones(10), torch.ones(2, dtype=torch.int64)
    gradients = torch.arange(10.0)
    gradients[place] = spoiled
    bucket[:4] = gradients[:4]
    packing = staging.Packing()
    packing.add(bucket[:4], bucket[:4])
    packing.add(gradients[4:], bucket[4:])
    packing.pack(library, bucket, 1.0, 0, tally)
    assert (int(tally[1]) != 0) == (spoiled != 0)
    assert torch.equal(bucket, gradients) or spoiled != spoiled
