"""Packing gradients into buckets, and hyperparameters into messages: no ranks."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup.torch import hyperparameters
from hvd_backup.torch.bucket_plan import plan
from hvd_backup.torch.buckets import Buckets, dense_strides
from hvd_backup.torch.staging import DTYPES


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(sorted(DTYPES, key=str))), min_size=1, max_size=12),
    st.integers(0, 200),
    st.randoms(use_true_random=False),
)
def test_a_plan_holds_every_gradient_once_in_the_order_of_completion(
    kinds: list[tuple[int, torch.dtype]], bucket_bytes: int, random: Any
) -> None:
    parameters = [torch.zeros(elements, dtype=dtype) for elements, dtype in kinds]
    order = list(range(len(parameters)))
    random.shuffle(order)
    planned = plan(parameters, order, bucket_bytes)
    assert sorted(index for members in planned for index in members) == list(range(len(parameters)))
    for members in planned:
        assert len({parameters[index].dtype for index in members}) == 1
        assert [order.index(index) for index in members] == sorted(order.index(index) for index in members)
        size = sum(parameters[index].nbytes for index in members)
        assert len(members) == 1 or size <= bucket_bytes
    # A bucket whose last gradient is ready earlier, and that nothing more would fit into, comes earlier.
    for dtype in DTYPES:
        ends = [order.index(members[-1]) for members in planned if parameters[members[0]].dtype is dtype]
        assert ends == sorted(ends)


def parameters_of_every_layout() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(3, 4)),
        torch.nn.Parameter(torch.randn(())),
        torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(6, 2).t()),
        torch.nn.Parameter(torch.randn(5, dtype=torch.float64)),
        torch.nn.Parameter(torch.randn(4, 6)[:, ::2]),  # with gaps
        torch.nn.Parameter(torch.randn(0, 3)),
        torch.nn.Parameter(torch.randn(1, 3).expand(4, 3)),  # overlapping
    ]


def test_views_have_the_form_of_the_gradients_and_lie_one_after_the_other() -> None:
    parameters = parameters_of_every_layout()
    buckets = Buckets(parameters, list(range(len(parameters)))[::-1], 80)
    seen = set()
    for bucket in buckets.all:
        for buffer, views in (
            (bucket.contribution, bucket.contribution_views),
            (bucket.result, bucket.result_views),
        ):
            buffer.zero_()
            for index, view in zip(bucket.members, views, strict=True):
                (parameters[index] * 1.0).sum().backward()
                gradient = parameters[index].grad
                assert gradient is not None
                assert (view.shape, view.dtype, view.stride()) == (gradient.shape, gradient.dtype, gradient.stride())
                view.fill_(1.0)
                seen.add(index)
                assert view.data_ptr() % 16 == 0 or view.numel() == 0
            assert int(buffer.sum()) == sum(view.numel() for view in views), "none overlap"
            assert len(buffer) - int(buffer.sum()) < 16 / buffer.itemsize * len(views)
            assert buffer.data_ptr() % 64 == 0
    assert seen == set(range(len(parameters)))
    assert dense_strides(parameters[5]) == (3, 1)
    assert [dtype for _, dtype in buckets.layout()].count("float64") == 1


def test_views_count_their_changes_each_for_itself() -> None:
    parameters = parameters_of_every_layout()[:2]
    bucket = Buckets(parameters, [0, 1], 1000).all[0]
    before = [view._version for view in bucket.result_views]
    bucket.result_views[0].add_(1)
    bucket.result.mul_(2)
    assert [view._version for view in bucket.result_views] == [before[0] + 1, before[1]]


@pytest.mark.parametrize("show", [False, True])
def test_gradients_go_in_and_results_come_out(show: bool) -> None:
    parameters = parameters_of_every_layout()
    buckets = Buckets(parameters, list(range(len(parameters))), 10**6)
    for step in range(3):
        given_gradients = []
        for index, parameter in enumerate(parameters):
            if index != 1:
                parameter.grad = torch.randn_like(parameter) if index != 3 else torch.randn(2, 6, dtype=parameter.dtype)
            else:
                parameter.grad = None  # counts as zero
            zero = torch.zeros_like(parameter)
            given_gradients.append(zero if parameter.grad is None else parameter.grad.detach().clone())
        complete = []
        for index in range(len(parameters)):
            buckets.pack(index, show)
            complete += [number for number, *_ in buckets.take_sent(wait=False)]
        assert sorted(complete) == list(range(len(buckets.all))), step
        for bucket in buckets.all:
            for slot, index in enumerate(bucket.members):
                assert torch.equal(bucket.contribution_views[slot], given_gradients[index])
                shown = parameters[index].grad is bucket.contribution_views[slot]
                assert shown == (show and index != 1)
            bucket.result.copy_(bucket.contribution * 2)
        addresses = buckets.result_addresses()
        buckets.show_results(0.25, [True] * len(buckets.all), own=True)
        for parameter, gradient in zip(parameters, given_gradients, strict=True):
            assert torch.equal(parameter.grad, gradient / 2)  # type: ignore[arg-type]
        versions = buckets.result_versions()
        parameters[0].grad.mul_(2)  # type: ignore[union-attr]
        parameters[4].grad = torch.zeros(5, dtype=torch.float64)
        changed = [i for i, (a, b) in enumerate(zip(versions, buckets.result_versions(), strict=True)) if a != b]
        assert changed == [0, 4]
        buckets.exchange_roles()
        buckets.start_afresh()
        assert set(addresses).isdisjoint(buckets.result_addresses())
    contributed = [view for bucket in buckets.all for view in bucket.contribution_views]
    assert any(parameters[0].grad is view for view in contributed)  # accumulating in place would need no copy
    buckets.show_results(1.0, [False] * len(buckets.all), own=False)
    assert all(parameter.grad.abs().sum() == 0 for parameter in parameters)  # type: ignore[union-attr]
    buckets.show_zeros()
    assert all(parameter.grad.abs().sum() == 0 for parameter in parameters)  # type: ignore[union-attr]


def test_residuals_are_added_after_scaling() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    bucket = Buckets([parameter], [0], 100).all[0]
    for value, used, expected in ((1.0, False, 0.5), (1.0, False, 1.0), (3.0, True, 2.5), (1.0, True, 0.5)):
        bucket.contribution.fill_(value)
        bucket.send(prescale=0.5)
        assert bucket.contribution.tolist() == [expected] * 2
        bucket.keep_residual(used, finite=True)
        if not used:
            bucket.contribution.fill_(float("nan"))
            bucket.keep_residual(False, finite=False)  # what waits, waits on


def test_hyperparameters_go_over_and_come_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "lr": torch.tensor(0.5), "betas": (0.9, torch.tensor(0.99)), "param_names": ["w"]},
        {"params": [], "lr": 1, "fused": None, "nesterov": True, "name": "head", "object": object(), "steps": [1, 2]},
    ]
    values = hyperparameters.snapshot(groups)
    assert values[0] == {"lr": 0.5, "betas": (0.9, pytest.approx(0.99))}
    assert values[1] == {"lr": 1, "fused": None, "nesterov": True, "name": "head", "steps": [1, 2]}
    assert hyperparameters.decode(hyperparameters.encode(values)) == values
    assert len(pickle.dumps(values)) < 500
    other = copy.deepcopy(values)
    other[0]["lr"] = 0.25
    other[1]["nesterov"] = False
    other[1]["new"] = 3
    told = hyperparameters.changes(values, other)
    assert told == (
        "lr of parameter group 0 from 0.5 to 0.25, nesterov of parameter group 1 from True to False, "
        "new of parameter group 1 from None to 3"
    )
    assert hyperparameters.changes(values, values) == ""
    assert "number of parameter groups" in hyperparameters.changes(values, values[:1])
    tensor = groups[0]["lr"]
    hyperparameters.install(groups, other)
    assert groups[0]["lr"] is tensor and tensor.item() == 0.25
    assert groups[1]["nesterov"] is False and groups[0]["params"] == [parameter]
