"""Which gradient lies where: gradients packed into flat buckets of one dtype each, in host memory that the ops share.

Buckets are filled from the last variable to the first, which is the order in which a backward pass has gradients ready.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_backup.errors import UsageError
from hvd_backup.first_n import DTYPE_BYTES

__all__ = ["Gradient", "Layout", "plan"]


@dataclass(frozen=True)
class Gradient:
    """What is sent for one variable.

    Attributes:
        name: of the variable.
        shape: of the gradient.
        dtype: of what is sent, as the engine has it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise UsageError(
                f"variable {self.name} has gradients of dtype {self.dtype}: supported are float16, "
                "bfloat16, float32, float64"
            )

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size."""
        return self.elements * DTYPE_BYTES[self.dtype]


def plan(gradients: Sequence[Gradient], bucket_bytes: int) -> list[list[int]]:
    """Buckets of indices into `gradients`, each of one dtype, closed before they exceed `bucket_bytes`."""
    closed: list[list[int]] = []
    growing: dict[str, list[int]] = {}
    for index in reversed(range(len(gradients))):
        gradient = gradients[index]
        bucket = growing.setdefault(gradient.dtype, [])
        if bucket and sum(gradients[i].bytes for i in bucket) + gradient.bytes > bucket_bytes:
            closed.append(bucket)
            bucket = growing[gradient.dtype] = []
        bucket.append(index)
    return closed + sorted(growing.values(), key=lambda bucket: -bucket[-1])


class Layout:
    """The buckets of an optimizer and their memory.

    Attributes:
        gradients: in the order of the variables.
        buckets: for each, the indices of its gradients, in the order in which they lie in it.
    """

    def __init__(self, gradients: Sequence[Gradient], bucket_bytes: int, gpu: Any = None) -> None:
        """gpu: which reads and writes the buffers itself (`_gpu.Device`); None: gradients come to the CPU."""
        self._gpu = gpu
        self.gradients = list(gradients)
        self.buckets = plan(gradients, bucket_bytes)
        self._contributions = [self._buffer(bucket) for bucket in self.buckets]
        self._results = [self._buffer(bucket) for bucket in self.buckets]

    def _buffer(self, bucket: list[int]) -> np.ndarray:
        elements = sum(self.gradients[index].elements for index in bucket)
        dtype = np.dtype(tf.as_dtype(self.gradients[bucket[0]].dtype).as_numpy_dtype)
        if self._gpu is None:
            return np.zeros(elements, dtype)
        return np.asarray(_PageLocked(self._gpu, elements * dtype.itemsize)).view(dtype)

    def elements(self, bucket: int) -> list[int]:
        """Of each of its gradients, in the order in which they lie in it."""
        return [self.gradients[index].elements for index in self.buckets[bucket]]

    @property
    def sizes(self) -> list[tuple[int, str]]:
        """Elements and dtype of each bucket."""
        return [
            (len(buffer), self.gradients[bucket[0]].dtype)
            for bucket, buffer in zip(self.buckets, self._results, strict=True)
        ]

    @property
    def buffers(self) -> list[tuple[int, int, int]]:
        """Of each bucket: bytes, where gradients are packed, where updates arrive."""
        return [
            (result.nbytes, contribution.ctypes.data, result.ctypes.data)
            for contribution, result in zip(self._contributions, self._results, strict=True)
        ]

    @property
    def result_addresses(self) -> list[int]:
        """Where updates arrive."""
        return [buffer.ctypes.data for buffer in self._results]


class _PageLocked:
    """Zeros for NumPy, whose arrays over it keep it alive."""

    def __init__(self, gpu: Any, size: int) -> None:
        self._memory = gpu.host_memory(max(size, 1))
        ctypes.memset(self._memory.address, 0, size)
        self.__array_interface__ = {
            **{"version": 3, "typestr": "|u1", "shape": (size,)},
            "data": (self._memory.address, False),
        }
