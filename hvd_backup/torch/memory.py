"""Torch tensors as the engine and MPI want them: in host memory, contiguous, as bytes, as text."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch

from hvd_backup.errors import UsageError
from hvd_backup.torch.staging import is_supported

__all__ = ["Done", "bytes_of", "checksum_of", "contiguous", "dtype_name", "signature_of"]


class Done:
    """The handle of a collective that has ended."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    def poll(self) -> bool:
        """Always."""
        return True

    def wait(self) -> Any:
        """The outcome."""
        return self._outcome


def dtype_name(tensor: torch.Tensor) -> str:
    """As the engine has it."""
    return str(tensor.dtype).removeprefix("torch.")


def contiguous(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its graph, contiguous, in host memory; copied only if need be.

    Raises:
        UsageError: it is no dense tensor on the CPU or a GPU.
    """
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{operation}({type(tensor).__name__}): expected a torch.Tensor")
    if not is_supported(tensor.device):
        raise UsageError(
            f"{operation}: the tensor is on {tensor.device}, supported are the CPU and CUDA: use tensor.cpu()"
        )
    if tensor.layout is not torch.strided:
        raise UsageError(f"{operation}: the tensor has layout {tensor.layout}, not a dense one: use tensor.to_dense()")
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    start, length = tensor.storage_offset() * tensor.element_size(), tensor.numel() * tensor.element_size()
    view = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (length,), (1,))
    return memoryview(view.numpy())  # type: ignore[arg-type]  # NumPy's stubs know no Buffer


def checksum_of(tensors: Iterable[torch.Tensor]) -> str:
    """Equal tensors, bit for bit, have equal checksums."""
    checksum = 0
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        checksum = zlib.crc32(bytes_of(data), checksum) if data.numel() else checksum
    return f"{checksum:08x}"


def signature_of(tensor: torch.Tensor, first: str = "") -> str:
    """dtype and shape as text, for comparison between ranks. first: in place of the first dimension."""
    shape = [str(length) for length in tensor.shape]
    if first:
        shape[0] = first
    return f"{dtype_name(tensor)}[{', '.join(shape)}]"
