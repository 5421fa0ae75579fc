"""Which gradients go together into one bucket, and in which order buckets become complete."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["plan"]

_Kind = tuple[torch.dtype, torch.device]


def _kind(parameter: torch.Tensor) -> _Kind:
    return parameter.dtype, parameter.device


def plan(
    parameters: Sequence[torch.Tensor],
    order: Sequence[int],
    bucket_bytes: int,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Which parameters go into which bucket.

    Args:
        parameters: in the order of the optimizer's groups.
        order: their indices, in the order in which gradients become ready.
        bucket_bytes: a bucket is closed before it exceeds this; a larger gradient has a bucket of its own.
        groups: the buckets that the user wants, as indices; those in none have a bucket of their own. Of one dtype and
            device each after all.

    Returns:
        Buckets of indices, of one dtype and device each, in the order in which they become complete.
    """
    if groups is not None:
        return _plan_groups(parameters, order, groups)
    closed: list[list[int]] = []
    growing: dict[_Kind, list[int]] = {}
    sizes: dict[_Kind, int] = {}
    for index in order:
        kind = _kind(parameters[index])
        size = parameters[index].numel() * parameters[index].element_size()
        if growing.get(kind) and sizes[kind] + size > bucket_bytes:
            closed.append(growing.pop(kind))
        if kind not in growing:
            growing[kind], sizes[kind] = [], 0
        growing[kind].append(index)
        sizes[kind] += size
    closed.extend(sorted(growing.values(), key=lambda bucket: order.index(bucket[-1])))
    return closed


def _plan_groups(
    parameters: Sequence[torch.Tensor], order: Sequence[int], groups: Sequence[Sequence[int]]
) -> list[list[int]]:
    of = {index: number for number, group in enumerate(groups) for index in group}
    buckets: dict[tuple[int, _Kind], list[int]] = {}
    for index in order:
        buckets.setdefault((of.get(index, -1 - index), _kind(parameters[index])), []).append(index)
    return sorted(buckets.values(), key=lambda bucket: order.index(bucket[-1]))
