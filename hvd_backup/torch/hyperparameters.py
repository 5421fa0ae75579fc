"""The hyperparameters of an optimizer on their way to other ranks: learning rate, momentum, weight decay of each group.

They travel with the decision, so that a rank that was late applies an update exactly as the contributors did. Pure
functions of `param_groups`; everything in a group but its parameters is a hyperparameter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Hyperparameters", "changes", "decode", "encode", "install", "snapshot"]

Hyperparameters = list[dict[str, Any]]

_TUPLE = "tuple"  # {"tuple": [...]} stands for a tuple, which JSON does not know
_NOT_THOSE = ("params", "param_names")


def snapshot(param_groups: Sequence[dict[str, Any]]) -> Hyperparameters:
    """The values now, one-element tensors as numbers. What is no number, text or sequence of those is left out."""
    return [
        {key: _plain(value) for key, value in group.items() if key not in _NOT_THOSE and _is_plain(value)}
        for group in param_groups
    ]


def encode(values: Hyperparameters) -> bytes:
    """For the message, and for traces: as JSON, so that a trace can be read, and replayed without trusting it."""
    return json.dumps(_marked(values)).encode()


def decode(data: bytes) -> Hyperparameters:
    """The opposite of `encode`: equal values of the same types."""
    values: Hyperparameters = json.loads(data, object_hook=lambda made: tuple(made[_TUPLE]) if _TUPLE in made else made)
    return values


def install(param_groups: Sequence[dict[str, Any]], values: Hyperparameters) -> None:
    """Sets them; a tensor keeps its identity (a compiled or captured optimizer reads from it)."""
    for group, wanted in zip(param_groups, values, strict=True):
        for key, value in wanted.items():
            present = group.get(key)
            if isinstance(present, torch.Tensor):
                present.fill_(value)
            elif present != value:
                group[key] = value


def changes(before: Hyperparameters, now: Hyperparameters) -> str:
    """What differs, in words; empty when nothing does."""
    if len(before) != len(now):
        return f"the number of parameter groups from {len(before)} to {len(now)}"
    told = []
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                where = f" of parameter group {index}" if len(before) > 1 else ""
                told.append(f"{key}{where} from {old.get(key)!r} to {new.get(key)!r}")
    return ", ".join(told)


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_marked(item) for item in value]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    return value
