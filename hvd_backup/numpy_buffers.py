"""NumPy arrays as the engine and MPI want them: contiguous, in native byte order, as bytes, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvd_backup import byte_collectives
from hvd_backup.errors import UsageError
from hvd_backup.first_n import ReduceOp

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["as_buffer", "bytes_of", "reduce_over_mpi", "signature_of"]


def as_buffer(operation: str, tensor: ArrayLike, name: object) -> NDArray[Any]:
    """`tensor` as a contiguous array in the byte order of this machine; copied only if need be. Checks `name`, too.

    Raises:
        UsageError: it holds Python objects, or `name` is no text.
    """
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{operation}: name={name!r}, expected a str (Horovod's average=False is op=Sum here)")
    try:
        array = np.asarray(tensor)
    except ValueError as error:
        raise UsageError(f"{operation}({type(tensor).__name__}): that is no array: {error}") from None
    if array.dtype.hasobject:
        raise UsageError(f"{operation} of dtype {array.dtype}: use broadcast_object or allgather_object for objects")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, shared with it."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # NumPy's stubs know no Buffer


def signature_of(array: NDArray[Any], first: str = "") -> str:
    """dtype and shape as text, for comparison between ranks. first: in place of the first dimension."""
    shape = [str(length) for length in array.shape]
    if first:
        shape[0] = first
    return f"{array.dtype}[{', '.join(shape)}]"


def reduce_over_mpi(comm: MPI.Intracomm, array: NDArray[Any], op: ReduceOp) -> NDArray[Any]:
    """MIN, MAX or PRODUCT over all ranks, by MPI. Collective over `comm`."""
    from mpi4py import MPI

    is_half = array.dtype.itemsize == 2 and array.dtype.kind not in "iu"
    source = (array.astype(np.float32) if is_half else array).reshape(-1)  # MPI knows no 16-bit floats
    result = np.empty_like(source)
    piece = byte_collectives.PIECE_BYTES // source.dtype.itemsize
    mpi_op = {ReduceOp.MIN: MPI.MIN, ReduceOp.MAX: MPI.MAX, ReduceOp.PRODUCT: MPI.PROD}[op]
    for start in range(0, source.size, piece):
        comm.Allreduce(source[start : start + piece], result[start : start + piece], mpi_op)
    return result.astype(array.dtype, copy=False).reshape(array.shape)
