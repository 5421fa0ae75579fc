"""The state of a torch optimizer, with all that its updates depend on, for a rank beyond the journal.

    weights, optimizer state, hyperparameters     of the optimizer's parameter groups
    schedulers, scaler                            that were registered
    buffers (BatchNorm)                           that broadcast_parameters() was given: it is how we know of them
    anything else                                 optimizer.resync_also(name=...)

All is loaded in place, so that whatever shares memory with it goes on to do so. How it travels is not here
(hvd_backup/resync.py).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hvd_backup.context import Context
from hvd_backup.errors import UsageError
from hvd_backup.torch import hyperparameters
from hvd_backup.torch.memory import bytes_of

__all__ = ["TorchArrays", "check_resyncable", "load", "remember", "state_of"]


class TorchArrays:
    """Dense tensors. See hvd_backup.resync.Arrays."""

    def contents(self, value: object) -> tuple[Any, memoryview] | None:
        """See Arrays."""
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return (whole.dtype, tuple(whole.shape)), bytes_of(whole)

    def array(self, header: Any, contents: memoryview) -> Any:
        """See Arrays."""
        dtype, shape = header
        if not len(contents):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(contents, dtype=torch.uint8).view(dtype).reshape(shape)


_Remembered = dict[tuple[int, int, tuple[int, ...]], torch.Tensor]  # by address, bytes and shape; in order

_remembered: weakref.WeakKeyDictionary[Context, _Remembered] = weakref.WeakKeyDictionary()


def remember(place: Context, tensors: Iterable[torch.Tensor]) -> None:
    """These were made equal on all ranks, in the same order. Those that no optimizer has are buffers, it seems."""
    known = _remembered.setdefault(place, {})
    for tensor in tensors:
        known.setdefault((tensor.data_ptr(), tensor.numel(), tuple(tensor.shape)), tensor.detach())


def _buffers(place: Context, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What was remembered and shares no memory with the parameters; those are forgotten."""
    known = _remembered.get(place, {})
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    for key in [key for key, tensor in known.items() if tensor.untyped_storage().data_ptr() in of_parameters]:
        del known[key]
    return list(known.values())


def check_resyncable(name: str, thing: Any) -> None:
    """Raises UsageError for what resync_also() cannot take."""
    if not all(callable(getattr(thing, method, None)) for method in ("state_dict", "load_state_dict")):
        raise UsageError(
            f"resync_also({name}={type(thing).__name__}): expected an object with state_dict() and load_state_dict() "
            "(a module, say)"
        )


def state_of(place: Context, optimizer: Any, also: Mapping[str, Any]) -> dict[str, Any]:
    """All of it; tensors share memory with the optimizer's. also: by name, what has state_dict()."""
    parameters = _parameters(optimizer)
    return {
        "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": [dict(optimizer.state.get(parameter, {})) for parameter in parameters],
        "on gpu": [_on_gpu(optimizer.state.get(parameter, {})) for parameter in parameters],
        "groups": hyperparameters.snapshot(optimizer.param_groups),
        "also": {name: thing.state_dict() for name, thing in also.items()},
        "buffers": _buffers(place, parameters),
    }


@torch.no_grad()
def load(place: Context, optimizer: Any, also: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Makes it that of this rank, in place.

    Raises:
        UsageError: the other rank has registered other things.
    """
    parameters = _parameters(optimizer)
    buffers = _buffers(place, parameters)
    if state["also"].keys() != also.keys() or len(state["buffers"]) != len(buffers):
        raise UsageError(
            f"this rank has registered {', '.join(also) or 'nothing'} and broadcast {len(buffers)} buffers, the one "
            f"whose state it is to take over {', '.join(state['also']) or 'nothing'} and {len(state['buffers'])}: "
            "register the same schedulers, scaler and resync_also() on all ranks, in the same order"
        )
    for parameter, value in zip(parameters, state["parameters"], strict=True):
        parameter.copy_(value)
    for parameter, entries, on_gpu in zip(parameters, state["optimizer"], state["on gpu"], strict=True):
        _load_entries(optimizer, parameter, entries, on_gpu)
    hyperparameters.install(optimizer.param_groups, state["groups"])
    for buffer, value in zip(buffers, state["buffers"], strict=True):
        buffer.copy_(value)
    for name, thing in also.items():
        thing.load_state_dict(copy.deepcopy(state["also"][name]))  # it may keep what it is given


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _on_gpu(entries: Mapping[str, Any]) -> list[str]:
    return [key for key, value in entries.items() if isinstance(value, torch.Tensor) and value.is_cuda]


def _load_entries(optimizer: Any, parameter: torch.Tensor, entries: Mapping[str, Any], on_gpu: Sequence[str]) -> None:
    """What the optimizer keeps for a parameter. Of the same dtypes: load_state_dict() of torch's would change them."""
    if not entries:
        optimizer.state.pop(parameter, None)
        return
    present = optimizer.state[parameter]
    for key in [key for key in present if key not in entries]:
        del present[key]
    for key, value in entries.items():
        if not isinstance(value, torch.Tensor):
            present[key] = copy.deepcopy(value)
            continue
        own = present.get(key)
        if isinstance(own, torch.Tensor) and own.shape == value.shape and own.dtype == value.dtype:
            own.copy_(value)
        elif value.shape == parameter.shape:
            present[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # with the parameter's strides
        else:
            present[key] = value.clone().to(parameter.device if key in on_gpu else "cpu")
