"""What must be refused is refused clearly, on every rank, and without a hang."""

import warnings
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import faults
from tests.launch import run_ranks, start_ranks
from tests.torch_training import batch, digest, loss_of, make_model


def sgd(model: torch.nn.Module, **options: Any) -> Any:
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), **options)


@pytest.mark.ranks(2)
def test_what_the_constructor_refuses() -> None:
    model = make_model()
    with pytest.raises(hvd.NotInitializedError, match=r"hvd\.init\(\)"):
        sgd(model)
    hvd.init()
    for options, told in (
        ({"backup_workers": 2}, "backup_workers=2, but there are 2 ranks"),
        ({"backup_workers": -1}, "backup_workers=-1.*expected"),
        ({"backup_workers": 1.5}, "backup_workers=1.5.*expected"),
        ({"policy": "sometimes"}, "sometimes.*unknown"),
        ({"policy": "softsync"}, "not there yet"),
        ({"scope": "layer"}, 'scope=.layer.*"step" or "bucket"'),
        ({"late": "keep"}, '"drop" or "carry"'),
        ({"max_staleness": 3}, "max_staleness=3"),
        ({"on_max_lag": "skip"}, '"resync" or "wait"'),
        ({"compression": "fp16"}, "compression='fp16'.*Compression.fp16"),
        ({"compression": hvd.Compression.fp16, "gradient_as_bucket_view": True}, "leave one out"),
        ({"groups": -1}, "groups should be a non-negative integer"),
        ({"groups": [["weight"]]}, "groups must consist of torch.Tensor"),
        ({"groups": [[model[0].bias], [model[0].bias]]}, "only appear once in groups"),
        ({"process_set": "half"}, "process_set=half needs Horovod's own DistributedOptimizer: HVD_BACKUP_HOROVOD=off"),
        ({"process_set": "half", "backup_workers": 1}, "process_set=half cannot be combined with backup_workers=1"),
        ({"op": "Adasum"}, "op='Adasum'"),
        ({"op": hvd.Adasum}, "op=Adasum needs Horovod"),
        ({"op": hvd.Min, "backup_workers": 1}, "op=Min cannot be combined with backup_workers=1"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor not supported with op"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor=0"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step=0"),
    ):
        with pytest.raises(ValueError, match=told):
            sgd(model, **options)
    parameters = list(model.parameters())
    plain = torch.optim.SGD(parameters, lr=0.1)
    for named, told in (
        ([("a", p) for p in parameters], "must be unique. Found duplicates: a"),
        (parameters, "sequence of tuples"),
        ([("w", parameters[0])], "were not named"),
    ):
        with pytest.raises(ValueError, match=told):
            hvd.DistributedOptimizer(plain, named)
    wrapped = sgd(model)
    for optimizer, told in (
        (wrapped, "one already"),
        (model, "expected a torch.optim.Optimizer"),
        (torch.optim.LBFGS(parameters), "LBFGS"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1), "complex64.*view_as_real"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(2, device="meta"))], 0.1), "a parameter on meta needs Horovod"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(2), requires_grad=False)], 0.1), "no parameter"),
    ):
        with pytest.raises(hvd.UsageError, match=told):
            hvd.DistributedOptimizer(optimizer)
    with pytest.raises(AttributeError, match=r"alltoall is Horovod's own.*HVD_BACKUP_HOROVOD=off"):
        hvd.alltoall(torch.ones(2))
    with pytest.raises(AttributeError, match="no attribute 'allreduced'"):
        hvd.allreduced(torch.ones(2))
    hvd.shutdown()
    with pytest.raises(hvd.NotInitializedError, match="after shutdown"):
        sgd(model)
    with pytest.raises(hvd.NotInitializedError, match="after shutdown"):
        loss_of(model, batch(0, 0)).backward()


@pytest.mark.ranks(2)
def test_wrong_use_of_a_step() -> None:
    hvd.init()
    rank = hvd.rank()
    model = make_model()
    optimizer = sgd(model)
    for _ in range(2):  # in the first step, and later
        loss_of(model, batch(rank, 0)).backward()
        with pytest.raises(AssertionError, match="prohibited"):
            optimizer.zero_grad()
        with pytest.raises(AssertionError, match="more than backward_passes_per_step"):
            loss_of(model, batch(rank, 0)).backward()
        with pytest.raises(hvd.UsageError, match="between backward"):
            optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(hvd.UsageError, match="between backward"):
            next(iter(hvd.follow(range(3), optimizer)))
        model[0].weight.grad.mul_(2)
        with pytest.raises(hvd.UsageError, match=r"0\.weight was changed after backward"):
            optimizer.step()
        model[0].weight.grad.div_(2)
        for index in range(len(list(model.parameters()))):
            optimizer.training._framework._watched.handed_over(index)  # as if untouched
        with optimizer.skip_synchronize(), pytest.raises(hvd.UsageError, match=r"call synchronize\(\) before"):
            optimizer.step()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    for loop, told in (
        (lambda: hvd.follow(range(3), []), "at least one optimizer"),
        (lambda: hvd.follow(range(3), torch.optim.SGD(model.parameters(), 0.1)), "was not made by"),
        (lambda: hvd.follow(range(3), optimizer, align_every=0), "align_every=0"),
        (lambda: [list(hvd.follow(range(2), optimizer)) for _ in hvd.follow(range(2), optimizer)], "end that loop"),
    ):
        with pytest.raises(hvd.UsageError, match=told):
            loop()
    with pytest.raises(hvd.UsageError, match="more than once for a batch"):
        for number in hvd.follow(range(4), optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model, batch(rank, number)).backward()
                optimizer.step()
    loss_of(model, batch(rank, 0)).backward()
    with pytest.raises(hvd.UsageError, match=r"add_param_group\(\) between backward\(\) and step\(\)"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    optimizer.step()
    for _ in hvd.follow(range(1), optimizer):
        with pytest.raises(hvd.UsageError, match=r"add_param_group\(\) inside a loop over follow"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    frozen = make_model()
    frozen[0].requires_grad_(False)
    partly = sgd(frozen)
    frozen[0].requires_grad_(True)
    loss_of(frozen, batch(rank, 0)).backward()
    with pytest.raises(hvd.UsageError, match=r"of shape \(16, 6\).*was frozen"):
        partly.step()
    hvd.barrier()
    hvd.shutdown()
    hvd.init()
    with pytest.raises(hvd.UsageError, match="make a new DistributedOptimizer"):
        loss_of(model, batch(rank, 0)).backward()


@pytest.mark.ranks(2)
def test_what_backup_workers_forbid() -> None:
    """Whatever would make a late rank apply an update otherwise than the contributors did."""
    hvd.init()
    rank = hvd.rank()

    def after_backward(**options: Any) -> tuple[torch.nn.Module, Any]:
        model = make_model()
        optimizer = sgd(model, backup_workers=1, grace=1.0, **options)
        for step in range(2):
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        loss_of(model, batch(rank, 2)).backward()
        return model, optimizer

    model, optimizer = after_backward()
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(hvd.UsageError, match=r"lr from 0\.1 to 0\.05.*register_scheduler"):
        optimizer.step()
    model, optimizer = after_backward()
    with pytest.raises(hvd.UsageError, match=r"barrier\(\) between backward\(\) and step\(\).*optimizer\.metrics"):
        hvd.barrier()
    optimizer.synchronize()
    with pytest.raises(hvd.UsageError, match=r"call step\(\) in skip_synchronize.*register_scaler"):
        loss_of(model, batch(rank, 3)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with optimizer.skip_synchronize(), pytest.raises(hvd.UsageError, match="when='before'"):
        optimizer.step()
    model, optimizer = after_backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(hvd.UsageError, match=r"optimizer\.register_scaler\(scaler\)"):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(1))
        scaler.step(optimizer)
    with optimizer.skip_synchronize():
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(\) without a gradient"):
        optimizer.step()
    # A function of on_update that fails in the middle of an update leaves weights that are nobody else's.
    model, optimizer = after_backward()
    optimizer.on_update(lambda update: 1 / 0, when="before")
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    with pytest.raises(hvd.HvdBackupError, match="no longer those of the others"):
        loss_of(model, batch(rank, 3)).backward()
    hvd.barrier()


@pytest.mark.ranks(4)
def test_layouts_that_differ_are_found_on_every_rank() -> None:
    hvd.init()
    rank = hvd.rank()
    odd = rank == 2

    def layers(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*[torch.nn.Linear(4, size, dtype=dtype) for size in sizes])

    def swapped() -> list[tuple[str, torch.Tensor]]:
        model = layers(3, 3)
        return [(name.replace("0", "x").replace("1", "0").replace("x", "1"), p) for name, p in model.named_parameters()]

    cases: list[tuple[str, Any, dict[str, Any]]] = [
        (r"0\.weight \(5, 4\).*0\.weight \(3, 4\)|0\.weight \(3, 4\).*0\.weight \(5, 4\)", layers(5 if odd else 3), {}),
        ("float64", layers(3, dtype=torch.float64 if odd else torch.float32), {}),
        ("1.weight", layers(3, 3) if odd else layers(3), {}),
        (r"1\.weight.*0\.weight|0\.weight.*1\.weight", swapped() if odd else layers(3, 3), {}),
        ("backup_workers", layers(3), {"backup_workers": 1 if odd else 0}),
        ("late carry", layers(3), {"backup_workers": 1, "late": "carry" if odd else "drop"}),
        ("op sum", layers(3), {"op": hvd.Sum if odd else hvd.Average}),
    ]
    for told, model, options in cases:
        named = list(model.named_parameters()) if isinstance(model, torch.nn.Module) else model
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p for _, p in named], lr=0.1), named, **options)
        sum(p.float().sum() for _, p in named).backward()
        with pytest.raises(hvd.HvdBackupError, match=told) as caught:
            optimizer.step()
        assert "optimizer." in str(caught.value) and "2" in str(caught.value)
    model = layers(3)
    optimizer = sgd(model)
    if odd:
        optimizer.metrics(other=1.0)
    else:
        optimizer.metrics(loss=1.0)
    model[0](torch.ones(4)).sum().backward()
    with pytest.raises(hvd.HvdBackupError, match="metrics other"):
        optimizer.step()
    hvd.barrier()  # the engine is as good as new


def train_until_one_raises(backup_workers: int) -> tuple[int, str]:
    hvd.init()
    model = make_model()
    optimizer = sgd(model, backup_workers=backup_workers)
    for number in hvd.follow(range(20), optimizer):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), number)).backward()
        optimizer.step()
        if hvd.rank() == 1 and optimizer.global_step >= 5:
            raise ValueError("corrupt sample")
    return optimizer.global_step, digest(model)


def test_an_exception_on_one_rank_ends_a_synchronous_run_and_not_one_with_backup_workers() -> None:
    with start_ranks(4, train_until_one_raises, [0]) as job:
        outcome = job.wait()
    assert [each.state for each in outcome.ranks] == ["raised"] * 4, outcome.describe()
    assert "ValueError: corrupt sample" in outcome.ranks[1].error
    for rank in (0, 2, 3):
        assert "rank 1 has left" in outcome.ranks[rank].error and "corrupt sample" in outcome.ranks[rank].error
    with start_ranks(4, train_until_one_raises, [1]) as job:
        outcome = job.wait()
    assert [each.state for each in outcome.ranks] == ["returned", "raised", "returned", "returned"], outcome.describe()
    assert len({outcome.ranks[rank].value for rank in (0, 2, 3)}) == 1
    assert outcome.ranks[0].value[0] == 20


def test_more_leftovers_than_one_warn_once_and_backup_by_environment() -> None:
    values = run_ranks(2, leftovers, env={"HVD_BACKUP_BACKUP_WORKERS": "1", "HVD_BACKUP_DELAY": "rank=1,ms=30"})
    assert values[0][0] == values[1][0]
    assert [len(told) for _, told in values] == [0, 1]
    assert "barrier()" in values[1][1][0] and "hvd.follow(loader, optimizer)" in values[1][1][0]


def leftovers() -> tuple[str, list[str]]:
    hvd.init()
    assert faults.injected().delays
    model = make_model()
    optimizer = sgd(model)
    assert optimizer.training.backup_workers == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for number in range(5):
                optimizer.zero_grad()
                loss_of(model, batch(hvd.rank(), number)).backward()
                optimizer.step()
            hvd.barrier()
    return digest(model), [str(each.message) for each in caught if "were dropped" in str(each.message)]
