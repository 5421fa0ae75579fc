"""Before training: the same weights and the same optimizer state on all ranks. As in horovod.torch.functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hvd_backup import byte_collectives, context, mpi
from hvd_backup.errors import UsageError
from hvd_backup.survivors import Survivors
from hvd_backup.torch import hyperparameters
from hvd_backup.torch.horovod_names import HOROVOD, is_global
from hvd_backup.torch.memory import bytes_of, contiguous, signature_of
from hvd_backup.torch.optimizer import DistributedStep
from hvd_backup.torch.resync import remember

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, Any] | torch.Tensor], root_rank: int) -> None:
    """Gives all ranks the tensors of rank `root_rank`, in place.

    Buffers among them (BatchNorm) are from then on part of what a rank takes over when it is too far behind.

    Args:
        params: `model.state_dict()`, `model.named_parameters()` or `model.parameters()`. None in place of a tensor is
            passed over.
        root_rank: whose tensors they are to be.

    Raises:
        ValueError: no mapping and no sequence.
        UsageError: something that is no tensor; or, on every rank, names, shapes or dtypes that differ between ranks.
    """
    if not isinstance(params, Iterable) or isinstance(params, (str, bytes)):
        raise ValueError(f"invalid params of type: {type(params)}")
    pairs = list(params.items()) if isinstance(params, Mapping) else [_pair(entry) for entry in params]
    tensors = []
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]) if isinstance(params, Mapping) else pairs:
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise UsageError(f"broadcast_parameters: {name} is a {kind}, no tensor: use broadcast_object")
        if tensor is not None:
            tensors.append((name, tensor))
    here = context.current()
    root = here.root(root_rank)
    told = ", ".join(f"{name} {signature_of(tensor)}" for name, tensor in tensors)
    with here.full_collective(f"broadcast_parameters({told}, root_rank={root})") as left:
        _broadcast_in_place(left, [tensor for _, tensor in tensors], root)
    remember(here, [tensor for _, tensor in tensors])


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: Any = None) -> None:
    """Gives all ranks the optimizer state and the hyperparameters of rank `root_rank`, and the global step.

    Args:
        optimizer: any optimizer but LBFGS, distributed or not. When that of the root has not stepped yet, its state is
            made on all ranks by a step with gradients of zero, as Horovod does (so Adam counts one step more).
        root_rank: whose state it is to be.
        model: tells which parameters have sparse gradients.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"broadcast_optimizer_state({type(optimizer).__name__}): expected a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state")
    here = context.current()
    root = here.root(root_rank)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    told = ", ".join(signature_of(parameter) for parameter in parameters)
    what = f"broadcast_optimizer_state({type(optimizer).__name__} of {told}, root_rank={root})"
    with here.full_collective(what) as left:
        place = left.place_of(root)
        fresh, values = byte_collectives.broadcast_object(
            left.comm, (not optimizer.state, hyperparameters.snapshot(optimizer.param_groups)), place
        )
        hyperparameters.install(optimizer.param_groups, values)  # first: weight decay makes the step change weights
        if fresh:
            optimizer.state.clear()
            _step_with_zeros(optimizer, parameters, model)
        outline = byte_collectives.broadcast_object(left.comm, _outline(optimizer, parameters), place)
        state, values, global_step = outline
        for parameter, entries in zip(parameters, state, strict=True):
            if here.rank != root:
                _shape_state(optimizer, parameter, entries)
            tensors = [optimizer.state[parameter][key] for key, entry in entries.items() if isinstance(entry, _Shape)]
            _broadcast_in_place(left, tensors, root)
    hyperparameters.install(optimizer.param_groups, values)
    if hasattr(optimizer, "training"):
        optimizer.training.global_step = global_step


def _step_with_zeros(optimizer: Any, parameters: list[torch.Tensor], model: Any) -> None:
    """Gives an optimizer its initial state."""
    layers = model.modules() if model is not None else ()
    embeddings = [layer for layer in layers if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag))]
    sparse = {id(layer.weight) for layer in embeddings if layer.sparse}
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            if isinstance(optimizer, torch.optim.SparseAdam) or id(parameter) in sparse:
                parameter.grad = parameter.grad.to_sparse()
    (optimizer._apply_update if isinstance(optimizer, DistributedStep) else optimizer.step)()


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None, process_set: Any = None) -> Any:
    """The object of rank `root_rank`, on every rank. It must pickle (cloudpickle: functions and lambdas, too)."""
    if is_global(process_set):
        return mpi.broadcast_object(obj, root_rank, name)
    return HOROVOD.start().broadcast_object(obj, root_rank, name, process_set)


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """The objects of all ranks, by rank. Each must pickle."""
    return mpi.allgather_object(obj, name)


class _Shape:
    """Stands for a tensor that follows by itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device
        self.strides = torch.empty_like(tensor, device="meta").stride()

    def fits(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype)

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def _outline(optimizer: Any, parameters: list[torch.Tensor]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    state = [
        {key: _Shape(value) if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
        for entries in (optimizer.state.get(parameter, {}) for parameter in parameters)
    ]
    return state, hyperparameters.snapshot(optimizer.param_groups), getattr(optimizer, "global_step", 0)


def _shape_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, entries: dict[str, Any]) -> None:
    """Gives a parameter the entries that it has on the root, with tensors yet to be filled."""
    present = optimizer.state.pop(parameter, {})
    if not entries:
        return
    optimizer.state[parameter] = {
        key: (present[key] if entry.fits(present.get(key)) else entry.make()) if isinstance(entry, _Shape) else entry
        for key, entry in entries.items()
    }


def _broadcast_in_place(left: Survivors, tensors: list[torch.Tensor], root: int) -> None:
    for tensor in tensors:
        whole = contiguous("broadcast", tensor)
        byte_collectives.broadcast(left.comm, bytes_of(whole), left.place_of(root))
        if whole.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(whole)


def _pair(entry: Any) -> tuple[str, Any]:
    return entry if isinstance(entry, tuple) else ("", entry)
