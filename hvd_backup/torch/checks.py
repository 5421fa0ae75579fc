"""What DistributedOptimizer accepts. Checked before anything is set up, as Horovod does where it has the check."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any

import torch

from hvd_backup.errors import ConfigError, UsageError
from hvd_backup.first_n import ReduceOp
from hvd_backup.torch.compression import NoneCompressor
from hvd_backup.torch.horovod_names import is_global
from hvd_backup.torch.staging import DTYPES, is_supported

__all__ = [
    "check_compression",
    "check_optimizer",
    "check_parameter",
    "group_parameters",
    "is_on_gpu",
    "name_parameters",
    "needs_horovod",
    "positive",
    "reduce_op",
    "scales",
]

_REFUSED_OPTIMIZERS = {
    torch.optim.LBFGS: "it evaluates the loss several times in one step(), which each rank would have to do together",
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


def reduce_op(op: Any) -> ReduceOp:
    """`op`, also as Horovod's number."""
    try:
        return ReduceOp(op)
    except ValueError:
        raise ConfigError(f"op={op!r}: expected hvd.Average, hvd.Sum, or another of Horovod's") from None


def check_optimizer(optimizer: Any) -> None:
    """Raises UsageError unless it is an optimizer that can be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"DistributedOptimizer({type(optimizer).__name__}): expected a torch.optim.Optimizer")
    if hasattr(optimizer, "training"):
        raise UsageError("DistributedOptimizer was given an optimizer that is one already: wrap a plain one, once")
    for kind, why in _REFUSED_OPTIMIZERS.items():
        if isinstance(optimizer, kind):
            raise UsageError(f"DistributedOptimizer cannot wrap {kind.__name__}: {why}")


def needs_horovod(optimizer: torch.optim.Optimizer, op: ReduceOp, process_set: Any) -> str:
    """What only Horovod's own DistributedOptimizer can do, in words; empty when ours can do it all."""
    if op not in (ReduceOp.AVERAGE, ReduceOp.SUM):
        return f"op={op.name.capitalize()}"
    if not is_global(process_set):
        return f"process_set={process_set}"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not is_supported(parameter.device):
                return f"a parameter on {parameter.device}"
    return ""


def is_on_gpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether some parameter is."""
    return any(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"])


def check_compression(compression: Any, bucket_views: bool) -> None:
    """Raises unless it has Horovod's interface."""
    if not all(callable(getattr(compression, name, None)) for name in ("compress", "decompress")):
        raise ConfigError(
            f"compression={compression!r}: expected Compression.none, Compression.fp16 or a class like them"
        )
    if bucket_views and compression is not NoneCompressor:
        raise ConfigError("gradient_as_bucket_view with compression: p.grad cannot be what is sent; leave one out")


def group_parameters(num_groups: int, groups: Any, named: list[tuple[str, torch.Tensor]]) -> list[list[int]] | None:
    """Horovod's num_groups and groups as lists of indices into `named`; None: no groups.

    Raises:
        ValueError: as Horovod does.
    """
    if num_groups != 0:
        warnings.warn(
            "Parameter `num_groups` has been replaced by `groups` and will be removed in v0.23.0.",
            DeprecationWarning,
            stacklevel=3,
        )
        if groups is None:
            groups = num_groups
    if groups is None:
        return None
    if not isinstance(groups, list) and (isinstance(groups, bool) or not isinstance(groups, int) or groups <= 0):
        raise ValueError("groups should be a non-negative integer or a list of list of torch.Tensor.")
    if not isinstance(groups, list):
        size, longer = divmod(len(named), groups)
        starts = [number * size + min(number, longer) for number in range(groups + 1)]
        return [list(range(start, end)) for start, end in pairwise(starts)]
    index_of = {id(parameter): index for index, (_, parameter) in enumerate(named)}
    seen: set[int] = set()
    for parameter in chain.from_iterable(groups):
        if not isinstance(parameter, torch.Tensor):
            raise ValueError("groups must consist of torch.Tensor.")
        if id(parameter) in seen:
            raise ValueError("A parameter can only appear once in groups.")
        seen.add(id(parameter))
    return [[index_of[id(parameter)] for parameter in group if id(parameter) in index_of] for group in groups]


def scales(op: Any, gradient_predivide_factor: float, size: int) -> tuple[float, float]:
    """The factors before and after the mean."""
    try:
        factor = float(gradient_predivide_factor)
    except (TypeError, ValueError):
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ConfigError(f"gradient_predivide_factor={gradient_predivide_factor!r}: expected a finite number above 0")
    if op == ReduceOp.SUM:
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
        given = list(named_parameters) if isinstance(named_parameters, Iterable) else [named_parameters]
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in given):
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
        check_parameter(name, parameter)
    return named


def check_parameter(name: str, parameter: torch.Tensor) -> None:
    """Raises UsageError unless its gradients can be exchanged."""
    if parameter.dtype not in DTYPES:
        remedy = "; a complex parameter can be a real one: torch.view_as_real" if parameter.is_complex() else ""
        raise UsageError(
            f"parameter {name} has dtype {str(parameter.dtype).removeprefix('torch.')}: supported are "
            + ", ".join(DTYPES.values())
            + remedy
        )
    if parameter.layout is not torch.strided:
        raise UsageError(f"parameter {name} has layout {parameter.layout}: only dense parameters are supported")
