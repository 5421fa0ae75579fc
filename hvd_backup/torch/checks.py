"""What DistributedOptimizer accepts. Checked before anything is set up, as Horovod does where it has the check."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from hvd_backup.errors import ConfigError, UsageError
from hvd_backup.first_n import ReduceOp
from hvd_backup.torch.buckets import DTYPES
from hvd_backup.torch.compression import NoneCompressor

__all__ = ["check_optimizer", "check_supported", "name_parameters", "positive", "scales"]

_REFUSED_OPTIMIZERS = {
    torch.optim.LBFGS: "it evaluates the loss several times in one step(), which each rank would have to do together",
    torch.optim.SparseAdam: "it needs sparse gradients; use Adam with DistributedOptimizer(..., sparse_as_dense=True)",
}


def positive(name: str, value: Any) -> int:
    """`value` as an integer >= 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected an integer >= 1")
    return number


def check_optimizer(optimizer: Any) -> None:
    """Raises UsageError unless it is an optimizer that can be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"DistributedOptimizer({type(optimizer).__name__}): expected a torch.optim.Optimizer")
    if hasattr(optimizer, "training"):
        raise UsageError("DistributedOptimizer was given an optimizer that is one already: wrap a plain one, once")
    for kind, why in _REFUSED_OPTIMIZERS.items():
        if isinstance(optimizer, kind):
            raise UsageError(f"DistributedOptimizer cannot wrap {kind.__name__}: {why}")


def check_supported(compression: Any, num_groups: int, groups: Any, process_set: Any) -> None:
    """Raises ConfigError for arguments of Horovod's that would otherwise be ignored."""
    if compression is not NoneCompressor:
        given = getattr(compression, "__name__", compression)
        raise ConfigError(f"compression={given}: only Compression.none is there yet")
    if num_groups or groups is not None:
        raise ConfigError(
            "num_groups and groups are not there yet: gradients are packed into buckets of HVD_BACKUP_BUCKET_BYTES in "
            "the order in which they become ready; leave them out"
        )
    if process_set is not None:
        raise ConfigError("process_set is not there yet: give init() a communicator of the ranks that train together")


def scales(op: Any, gradient_predivide_factor: float, size: int) -> tuple[float, float]:
    """The factors before and after the mean."""
    if op not in (ReduceOp.AVERAGE, ReduceOp.SUM):
        raise ConfigError(f"op={op!r}: expected hvd.Average or hvd.Sum; Adasum is not there yet")
    factor = float(gradient_predivide_factor)
    if not 0 < factor < float("inf"):
        raise ConfigError(f"gradient_predivide_factor={gradient_predivide_factor!r}: expected a finite number above 0")
    if op is ReduceOp.SUM:
        if factor != 1.0:
            raise ValueError("gradient_predivide_factor not supported with op != Average")
        return 1.0, float(size)
    return 1.0 / factor, factor


def name_parameters(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> list[tuple[str, torch.Tensor]]:
    """The parameters that get gradients, in the order of the groups, each with its name.

    Raises:
        ValueError: names that cannot be used (Horovod's checks).
        UsageError: a parameter that cannot be used.
    """
    if named_parameters is None:
        given: list[Any] = [
            (f"allreduce.noname.{i}.{j}", parameter)
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        ]
    else:
        given = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in given):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    repeated = [name for name, times in Counter(name for name, _ in given).items() if times > 1]
    if repeated:
        raise ValueError("Parameter names in named_parameters must be unique. Found duplicates: " + ", ".join(repeated))
    names = {id(parameter): name for name, parameter in given}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unnamed = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in names]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named. Shapes of those: "
            + ", ".join(map(str, unnamed))
        )
    named = [(names[id(parameter)], parameter) for parameter in parameters if parameter.requires_grad]
    if not sum(parameter.numel() for _, parameter in named):
        raise UsageError("DistributedOptimizer: no parameter of the optimizer requires a gradient")
    for name, parameter in named:
        _check_parameter(name, parameter)
    return named


def _check_parameter(name: str, parameter: torch.Tensor) -> None:
    if parameter.device.type != "cpu":
        raise UsageError(f"parameter {name} is on {parameter.device}: only the CPU is supported yet: use model.cpu()")
    if parameter.dtype not in DTYPES:
        remedy = "; a complex parameter can be a real one: torch.view_as_real" if parameter.is_complex() else ""
        raise UsageError(
            f"parameter {name} has dtype {str(parameter.dtype).removeprefix('torch.')}: supported are "
            + ", ".join(DTYPES.values())
            + remedy
        )
    if parameter.layout is not torch.strided:
        raise UsageError(f"parameter {name} has layout {parameter.layout}: only dense parameters are supported")
