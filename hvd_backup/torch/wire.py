"""How the gradient of one parameter travels: compressed, and without its sparse layout."""

from __future__ import annotations

from typing import Any

import torch

from hvd_backup.errors import ConfigError
from hvd_backup.torch.compression import FP16Compressor, NoneCompressor
from hvd_backup.torch.staging import DTYPES

__all__ = ["Wire"]


class Wire:
    """How the gradient of one parameter travels: compressed, and without its sparse layout.

    Args:
        parameter: whose gradient.
        compression: Horovod's interface: compress(tensor) -> (tensor, context), decompress(tensor, context) -> tensor.
        sparse_dim: of the gradient; 0: it is dense.

    Attributes:
        dtype: of what travels.
        is_widened: what travels is the gradient, rounded to a narrower dtype, and nothing else.
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
        self._is_cast = compression in (NoneCompressor, FP16Compressor)  # what copying into a bucket does as well
        self.is_widened = self._is_cast and not self._as_it_is and sparse_dim == 0

    def outgoing(self, gradient: torch.Tensor) -> torch.Tensor:
        """What is to be copied into the gradient's place in a bucket."""
        dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        if self._is_cast:
            return dense
        compressed: torch.Tensor
        compressed, self._context = self._compression.compress(dense)
        return compressed

    def read(self, view: torch.Tensor) -> torch.Tensor:
        """The gradient that lies in a bucket: the view itself, if it travels as it is."""
        if self._as_it_is:
            return view
        gradient: torch.Tensor = self._compression.decompress(view, self._context)
        return gradient.to_sparse(self._sparse_dim) if self._sparse_dim else gradient
