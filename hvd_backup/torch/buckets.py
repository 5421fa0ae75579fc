"""Gradients packed into flat buffers: which gradient lies where, and the two buffers of each bucket.

One buffer of a bucket holds this rank's contribution, the other takes the result; they change roles after each step. So
the averaged gradients that p.grad shows after step() lie where the next contribution is made, and a gradient that
autograd accumulates into them in place (zero_grad(set_to_none=False), gradient_as_bucket_view) needs no copy at all,
while the engine never writes into a buffer that p.grad shows outside of step().

It knows no engine and no steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hvd_backup.errors import ConfigError
from hvd_backup.torch.compression import NoneCompressor

__all__ = ["DTYPES", "Bucket", "Buckets", "Wire", "dense_strides", "gradients_kept", "plan"]

# Names as the engine has them.
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


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
        groups: the buckets that the user wants, as indices; those in none have a bucket of their own. Of one dtype each
            after all.

    Returns:
        Buckets of indices, of one dtype each, in the order in which they become complete.
    """
    if groups is not None:
        return _plan_groups(parameters, order, groups)
    closed: list[list[int]] = []
    growing: dict[torch.dtype, list[int]] = {}
    sizes: dict[torch.dtype, int] = {}
    for index in order:
        dtype = parameters[index].dtype
        size = parameters[index].numel() * parameters[index].element_size()
        if growing.get(dtype) and sizes[dtype] + size > bucket_bytes:
            closed.append(growing.pop(dtype))
        if dtype not in growing:
            growing[dtype], sizes[dtype] = [], 0
        growing[dtype].append(index)
        sizes[dtype] += size
    closed.extend(sorted(growing.values(), key=lambda bucket: order.index(bucket[-1])))
    return closed


def _plan_groups(
    parameters: Sequence[torch.Tensor], order: Sequence[int], groups: Sequence[Sequence[int]]
) -> list[list[int]]:
    of = {index: number for number, group in enumerate(groups) for index in group}
    buckets: dict[tuple[int, torch.dtype], list[int]] = {}
    for index in order:
        buckets.setdefault((of.get(index, -1 - index), parameters[index].dtype), []).append(index)
    return sorted(buckets.values(), key=lambda bucket: order.index(bucket[-1]))


def dense_strides(parameter: torch.Tensor) -> tuple[int, ...]:
    """The strides that autograd gives to a gradient of `parameter`: its own, unless those leave gaps or overlap."""
    return torch.empty_like(parameter, device="meta").stride()


@contextmanager
def gradients_kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it updates may be loaded and applied, without autograd; afterwards p.grad is what it was before."""
    shown = [parameter.grad for parameter in parameters]
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter, gradient in zip(parameters, shown, strict=True):
            parameter.grad = gradient


class Wire:
    """How the gradient of one parameter travels: compressed, and without its sparse layout.

    Args:
        parameter: whose gradient.
        compression: Horovod's interface: compress(tensor) -> (tensor, context), decompress(tensor, context) -> tensor.
        sparse_dim: of the gradient; 0: it is dense.

    Attributes:
        dtype: of what travels.
    """

    def __init__(self, parameter: torch.Tensor, compression: Any, sparse_dim: int) -> None:
        probe, self._context = compression.compress(torch.zeros_like(parameter.detach()))
        if not isinstance(probe, torch.Tensor) or probe.shape != parameter.shape or probe.dtype not in DTYPES:
            raise ConfigError(
                f"compression={getattr(compression, '__name__', compression)}: it must keep the shape of a gradient "
                f"and give one of {', '.join(DTYPES.values())}"
            )
        self.dtype = probe.dtype
        self._compression = compression
        self._sparse_dim = sparse_dim
        self._as_it_is = sparse_dim == 0 and compression.decompress(probe, self._context) is probe

    def write(self, gradient: torch.Tensor, view: torch.Tensor) -> None:
        """Puts a gradient into its place in a bucket."""
        dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        compressed, self._context = self._compression.compress(dense)
        view.copy_(compressed)

    def read(self, view: torch.Tensor) -> torch.Tensor:
        """The gradient that lies in a bucket: the view itself, if it travels as it is."""
        if self._as_it_is:
            return view
        gradient: torch.Tensor = self._compression.decompress(view, self._context)
        return gradient.to_sparse(self._sparse_dim) if self._sparse_dim else gradient


class Bucket:
    """One bucket, with views of the parameters' gradients in both of its buffers.

    Attributes:
        members: indices of its parameters, in the order in which their gradients lie in it.
        contribution, result: the buffers, one-dimensional.
        contribution_views, result_views: a tensor for each member, of its parameter's shape and strides. They
            share memory with the buffer but count their in-place changes (`_version`) each for itself.
        residual: what of this rank's gradients has been dropped and is to be added to the next contribution, or None.
        unpacked: how many gradients of the next contribution are not there yet.
    """

    def __init__(self, members: list[int], parameters: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self.members = members
        elements = sum(parameters[index].numel() for index in members)
        self.contribution = torch.zeros(elements, dtype=dtype)
        self.result = torch.zeros(elements, dtype=dtype)
        self.contribution_views = self._views(self.contribution, parameters)
        self.result_views = self._views(self.result, parameters)
        self.residual: torch.Tensor | None = None
        self.unpacked = len(members)

    def _views(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        views, offset = [], 0
        for index in self.members:
            parameter = parameters[index]
            view = torch.empty(0, dtype=buffer.dtype)
            views.append(view.set_(buffer.untyped_storage(), offset, parameter.shape, dense_strides(parameter)))
            offset += parameter.numel()
        return views

    def exchange_roles(self) -> None:
        """The result becomes the next contribution's buffer, and the other way round."""
        self.contribution, self.result = self.result, self.contribution
        self.contribution_views, self.result_views = self.result_views, self.contribution_views

    def finish_contribution(self, prescale: float) -> None:
        """Scales what has been packed, and adds what was dropped before."""
        if prescale != 1.0:
            self.contribution.mul_(prescale)
        if self.residual is not None:
            self.contribution.add_(self.residual)

    def keep_residual(self, used: bool, finite: bool) -> None:
        """What was contributed has been used, or was dropped: then it waits for the next contribution.

        finite: otherwise it is of no use, and what waited before goes on to.
        """
        if used:
            self.residual = None
        elif finite:
            self.residual = self.contribution.clone()


class Buckets:
    """All buckets of an optimizer, in the order in which they become complete.

    Args:
        parameters: in the order of the optimizer's groups.
        order, bucket_bytes, groups: see `plan`.
        compression: see `Wire`.
        sparse: the sparse dimensions of those gradients that are sparse, by index.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        order: Sequence[int],
        bucket_bytes: int,
        groups: Sequence[Sequence[int]] | None = None,
        compression: Any = NoneCompressor,
        sparse: Mapping[int, int] | None = None,
    ) -> None:
        self._wires = [Wire(p, compression, (sparse or {}).get(i, 0)) for i, p in enumerate(parameters)]
        planned = plan(parameters, order, bucket_bytes, groups)
        self.all = [Bucket(members, parameters, self._wires[members[0]].dtype) for members in planned]
        self._parameters = parameters
        self._shown: list[torch.Tensor | None] = [None] * len(parameters)
        home = {i: (b, slot) for b, bucket in enumerate(self.all) for slot, i in enumerate(bucket.members)}
        self._home = [home[i] for i in range(len(parameters))]

    def layout(self) -> list[tuple[int, str]]:
        """Elements and dtype name of each."""
        return [(bucket.contribution.numel(), DTYPES[bucket.contribution.dtype]) for bucket in self.all]

    def result_addresses(self) -> list[int]:
        """Where results go now."""
        return [bucket.result.data_ptr() for bucket in self.all]

    def pack(self, index: int, show: bool) -> int | None:
        """Puts p.grad of a parameter into its bucket, unless it lies there already. No gradient counts as zero.

        Args:
            show: p.grad becomes the view in the bucket.

        Returns:
            The number of the bucket, when this has completed it.
        """
        number, slot = self._home[index]
        bucket = self.all[number]
        view = bucket.contribution_views[slot]
        parameter = self._parameters[index]
        gradient = parameter.grad
        if gradient is None:
            view.zero_()
        elif gradient is not view:
            self._wires[index].write(gradient, view)
            if show:
                parameter.grad = view
        bucket.unpacked -= 1
        return number if bucket.unpacked == 0 else None

    def start_afresh(self) -> None:
        """Nothing of the next contribution is there yet."""
        for bucket in self.all:
            bucket.unpacked = len(bucket.members)

    def show_results(self, postscale: float, filled: list[bool]) -> None:
        """Makes p.grad show the results, times `postscale`; zeros in a bucket that is not `filled`."""
        for bucket, has_result in zip(self.all, filled, strict=True):
            if not has_result:
                bucket.result.zero_()
            elif postscale != 1.0:
                bucket.result.mul_(postscale)
            for index, view in zip(bucket.members, bucket.result_views, strict=True):
                self._shown[index] = gradient = self._wires[index].read(view)
                if self._parameters[index].grad is not gradient:
                    self._parameters[index].grad = gradient

    def settle_results(self) -> None:
        """What p.grad shows now, after the user has changed it, becomes the result. No gradient counts as zero."""
        for bucket in self.all:
            for index, view in zip(bucket.members, bucket.result_views, strict=True):
                gradient = self._parameters[index].grad
                if gradient is view:
                    continue
                if gradient is None:
                    view.zero_()
                else:
                    self._wires[index].write(gradient, view)
                self._parameters[index].grad = self._wires[index].read(view)

    def spoil_result(self) -> None:
        """Marks the result as one that is not to be applied: whoever gets it finds a NaN."""
        bucket = self.all[0]
        bucket.result[0] = float("nan")
        index = bucket.members[0]
        self._parameters[index].grad = self._wires[index].read(bucket.result_views[0])

    def result_versions(self) -> list[int]:
        """Counts of in-place changes of what `show_results` shows; -1 where p.grad shows something else."""
        return [
            shown._version if shown is not None and parameter.grad is shown else -1
            for shown, parameter in zip(self._shown, self._parameters, strict=True)
        ]

    def show_zeros(self) -> None:
        """Makes p.grad show zeros, in the buffers where the next contribution is made."""
        for bucket in self.all:
            bucket.contribution.zero_()
            for index, view in zip(bucket.members, bucket.contribution_views, strict=True):
                self._parameters[index].grad = view

    def exchange_roles(self) -> None:
        """See Bucket."""
        for bucket in self.all:
            bucket.exchange_roles()
