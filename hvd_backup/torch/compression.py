"""Horovod's compression of tensors for the collectives. Any class with these two static methods can be given."""

from __future__ import annotations

import torch

__all__ = ["Compression", "FP16Compressor", "NoneCompressor"]


class NoneCompressor:
    """Leaves tensors as they are."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
        """Returns the tensor to send, and what `decompress` needs."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype | None) -> torch.Tensor:
        """Returns the tensor as it was before `compress`."""
        return tensor


class FP16Compressor(NoneCompressor):
    """Sends floating-point tensors as float16."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
        """Returns the tensor to send, and its dtype."""
        return (tensor.to(torch.float16), tensor.dtype) if tensor.dtype.is_floating_point else (tensor, None)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype | None) -> torch.Tensor:
        """Returns the tensor in the dtype that it had before `compress`."""
        return tensor if ctx is None else tensor.to(ctx)


class Compression:
    """The choices, as in Horovod."""

    none = NoneCompressor
    fp16 = FP16Compressor
