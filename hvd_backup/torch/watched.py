"""The parameters of one optimizer, watched for changes that would be lost, or would set ranks apart, without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvd_backup.errors import UsageError
from hvd_backup.torch.buckets import dense_strides

__all__ = ["WatchedParameters"]


class WatchedParameters:
    """Parameters with their names.

    Attributes:
        names, all: of one length; they grow with `extend`.
    """

    def __init__(self, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.names: list[str] = []
        self.all: list[torch.Tensor] = []
        self._handed_over: dict[int, int] = {}  # by index: the version of p.grad
        self._opened_as: list[tuple[torch.dtype, torch.Size]] = []
        self.extend(named)

    def extend(self, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """More of them."""
        self.names += [name for name, _ in named]
        self.all += [parameter for _, parameter in named]

    def start_afresh(self) -> None:
        """The next gradient is awaited."""
        self._handed_over.clear()

    def handed_over(self, index: int) -> None:
        """What p.grad shows is on its way."""
        self._handed_over[index] = self._version_of(index)

    def _version_of(self, index: int) -> int:
        gradient = self.all[index].grad
        return -1 if gradient is None else gradient._version

    def check_untouched(self) -> None:
        """What has been handed over must still be what p.grad shows: a change would be lost."""
        for index, version in sorted(self._handed_over.items()):
            if version != self._version_of(index):
                raise UsageError(
                    f"the gradient of {self.names[index]} was changed after backward() had handed it over: clip "
                    "between synchronize() and step(), or in optimizer.on_update(..., when='before'); hand a "
                    "GradScaler over with optimizer.register_scaler(scaler); "
                    "register your own gradient hooks before making the DistributedOptimizer"
                )

    def opened(self) -> None:
        """Buckets are made of the parameters as they are now."""
        self._opened_as = [(parameter.dtype, parameter.shape) for parameter in self.all]

    def check_unchanged(self, index: int) -> None:
        """The buckets are those of the parameters as they were when training began."""
        parameter, (dtype, shape) = self.all[index], self._opened_as[index]
        if parameter.dtype is dtype and parameter.shape == shape:
            return
        was, now = (
            (f"dtype {str(dtype).removeprefix('torch.')}", f"dtype {str(parameter.dtype).removeprefix('torch.')}")
            if parameter.dtype is not dtype
            else (f"shape {tuple(shape)}", f"shape {tuple(parameter.shape)}")
        )
        raise UsageError(
            f"parameter {self.names[index]} has {now} now, but had {was} when training began: make a new "
            "DistributedOptimizer, on all ranks, after you have changed the model"
        )

    def check_all_known(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """A gradient that is not exchanged would make the weights of the ranks differ."""
        known = {id(parameter) for parameter in self.all}
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in known:
                    raise UsageError(
                        f"a parameter of group {number}, of shape {tuple(parameter.shape)}, has a gradient but was "
                        "frozen when the DistributedOptimizer was made, so nothing is exchanged for it: make the "
                        "optimizer after unfreezing, or give the parameter to optimizer.add_param_group() only then"
                    )

    def describe(self) -> list[str]:
        """A line for each, equal on all ranks."""
        lines = []
        for name, parameter in zip(self.names, self.all, strict=True):
            line = f"{name} {tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
            strides = dense_strides(parameter)
            contiguous = torch.empty(parameter.shape, device="meta").stride()
            lines.append(line if strides == contiguous else f"{line} strides {strides}")
        return lines
