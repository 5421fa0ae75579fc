"""How gradients travel: as they are, or as float16. Horovod's names and interface."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["Compression", "NoneCompressor"]


class NoneCompressor:
    """As they are."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Returns what travels, and what `decompress` needs to know."""
        return tensor, tensor.dtype

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """The opposite of `compress`."""
        return tensor


class FP16Compressor(NoneCompressor):
    """Floating point of other widths as float16."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """See NoneCompressor."""
        return (tf.cast(tensor, tf.float16) if tensor.dtype.is_floating else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """See NoneCompressor."""
        return tf.cast(tensor, ctx)


class Compression:
    """The choices for DistributedOptimizer(compression=...)."""

    none = NoneCompressor
    fp16 = FP16Compressor
