"""hvd_backup.torch in place of horovod.torch, and beside it: names, signatures, results and errors are Horovod's."""

import inspect
import math
from typing import Any

import horovod.torch
import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup.torch import horovod_names
from tests import horovod_cases
from tests.launch import run_ranks
from tests.torch_training import batch, loss_of, make_model

BESIDE = {"HVD_BACKUP_HOROVOD": "auto"}

# Our own texts say what to do; their kind is Horovod's.
OWN_WORDS = {"wrong_optimizers", "wrong_collectives"}


def public_names() -> list[str]:
    """What `import horovod.torch as hvd` gives a user, without its submodules and what they import."""
    names = {name for name, value in vars(horovod.torch).items() if not name.startswith("_")}
    return sorted(
        names - {"check_extension", "compression", "functions", "mpi_lib_v2", "mpi_ops", "optimizer", "sync_batch_norm"}
    )


def test_every_public_name_is_there() -> None:
    assert set(public_names()) <= set(dir(hvd))
    assert set(public_names()) <= horovod_names.NAMES
    for name in public_names():
        assert getattr(hvd, name) is not None


@pytest.mark.parametrize("name", [name for name in public_names() if callable(getattr(horovod.torch, name))])
def test_signatures(name: str) -> None:
    """Ours may take more by keyword, and more in front of nothing."""
    theirs, ours = getattr(horovod.torch, name), getattr(hvd, name)
    if name in ("HorovodInternalError", "Compression"):
        return
    their_parameters = list(inspect.signature(theirs).parameters.values())
    our_parameters = list(inspect.signature(ours).parameters.values())
    if [p.kind for p in their_parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return  # init, shutdown: they say nothing
    for their, our in zip(their_parameters, our_parameters, strict=False):
        assert (their.name, their.kind) == (our.name, our.kind)
        if isinstance(their.default, (int, float, str, bool, type(None))):
            assert their.default == our.default, their.name
    assert len(our_parameters) >= len(their_parameters)
    for more in our_parameters[len(their_parameters) :]:
        assert more.kind is inspect.Parameter.KEYWORD_ONLY or more.default is not inspect.Parameter.empty


def test_reduction_operators_are_horovods() -> None:
    for name in ("Average", "Sum", "Adasum", "Min", "Max", "Product"):
        assert getattr(hvd, name) == getattr(horovod.torch, name)


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    """What two ranks see in all cases, with Horovod and with ours."""
    modules = ("horovod.torch", "hvd_backup.torch")
    return {module: run_ranks(2, horovod_cases.run, [module], env=BESIDE, timeout_s=120) for module in modules}


@pytest.mark.parametrize("name", [case.__name__ for case in horovod_cases.CASES])
def test_a_script_sees_what_it_sees_with_horovod(name: str, seen: dict[str, list[Any]]) -> None:
    for rank, (of_rank, with_ours) in enumerate(zip(seen["horovod.torch"], seen["hvd_backup.torch"], strict=True)):
        theirs, ours = of_rank[name], with_ours[name]
        if name in OWN_WORDS:
            for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
                assert set(their[0].split()[:1]) <= set(our[0].split()), f"{name}[{number}]: {their} {our}"
            continue
        differences = compare(theirs, ours, name)
        assert not differences, f"rank {rank}: " + "\n".join(differences)


def compare(theirs: Any, ours: Any, where: str) -> list[str]:
    """Where two results differ by more than rounding."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        return [told for key in theirs for told in compare(theirs[key], ours[key], f"{where}.{key}")]
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(theirs) == len(ours):
        return [told for i in range(len(theirs)) for told in compare(theirs[i], ours[i], f"{where}[{i}]")]
    if isinstance(theirs, float) and isinstance(ours, float):
        tolerance = 2e-3 if "fp16" in where else 1e-5
        return [] if math.isclose(theirs, ours, rel_tol=tolerance, abs_tol=tolerance) else [f"{where}: {theirs} {ours}"]
    return [] if theirs == ours else [f"{where}: Horovod {str(theirs)[:200]}, ours {str(ours)[:200]}"]


def both_orders(first: str) -> list[Any]:
    """Horovod initialised by the program itself, before or after ours; both work in turns."""
    if first == "horovod":
        horovod.torch.init()
    hvd.init()
    if first != "horovod":
        horovod.torch.init()
    rank, size = hvd.rank(), hvd.size()
    assert (rank, size) == (horovod.torch.rank(), horovod.torch.size())
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), backup_workers=1
    )
    seen = []
    for epoch in range(3):
        for number in hvd.follow(range(4), optimizer):
            optimizer.zero_grad()
            loss_of(model, batch(rank, number)).backward()
            optimizer.step()
        seen.append(horovod.torch.allreduce(torch.ones(2) * rank, op=horovod.torch.Sum).tolist())
        seen.append(hvd.allreduce(torch.ones(2) * epoch).tolist())
    seen.append([p.tolist() for p in model.parameters()])
    return seen


@pytest.mark.parametrize("first", ["horovod", "hvd_backup"])
def test_beside_a_horovod_that_the_program_initialises(first: str) -> None:
    values = run_ranks(2, both_orders, [first], env=BESIDE)
    assert values[0] == values[1]
    assert values[0][:2] == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.ranks(2)
def test_our_own_names_do_not_start_horovod() -> None:
    """Its background thread would make every rank depend on every other, all the time."""
    import os

    os.environ["HVD_BACKUP_HOROVOD"] = "auto"
    hvd.init()
    model = make_model(seed=hvd.rank())
    hvd.broadcast_parameters(model.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), backup_workers=1)
    hvd.broadcast_optimizer_state(optimizer, 0)
    loss_of(model, batch(hvd.rank(), 0)).backward()
    optimizer.step()
    hvd.barrier()
    assert hvd.broadcast_object(hvd.rank(), 1) == 1
    assert not horovod.torch.is_initialized()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == 2.0
    assert horovod.torch.is_initialized()
    hvd.shutdown()
    assert not horovod.torch.is_initialized() and not hvd.is_initialized()
    hvd.init()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == 2.0


@pytest.mark.ranks(2)
def test_what_needs_all_ranks_is_refused_with_backup_workers() -> None:
    import os

    os.environ["HVD_BACKUP_HOROVOD"] = "auto"
    hvd.init()
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), hvd.SyncBatchNorm(4), torch.nn.Linear(4, 3))
    parameters = list(model.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.1)
    for options, told in (
        ({"op": hvd.Adasum}, "op=Adasum cannot be combined with backup_workers=1"),
        ({"op": hvd.Max}, "op=Max cannot be combined"),
        ({"process_set": hvd.ProcessSet([0])}, "process_set.*cannot be combined"),
    ):
        with pytest.raises(hvd.ConfigError, match=told):
            hvd.DistributedOptimizer(sgd, backup_workers=1, **options)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(sgd, backup_workers=1)
    with pytest.raises(hvd.UsageError, match="SyncBatchNorm needs all ranks"):
        loss_of(model, batch(hvd.rank(), 0))
    for _ in hvd.follow(range(2), optimizer):
        with pytest.raises(hvd.UsageError, match=r"grouped_allreduce\(\) inside a loop over follow"):
            hvd.grouped_allreduce([torch.ones(1)])
        break
    hvd.barrier()
