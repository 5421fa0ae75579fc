"""Broadcast and allgather of bytes and of Python objects over MPI, of any length.

MPI counts elements in 32-bit integers, so what is longer goes in pieces. Every function is collective over `comm`,
blocking, and assumes that all ranks are there: call `Context.full_collective` first. The framework modules make tensors
of the bytes.
"""

from __future__ import annotations

import pickle
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import cloudpickle

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["allgather", "allgather_pickled", "broadcast", "broadcast_object", "broadcast_pickled", "pickled"]

PIECE_BYTES = 1 << 30


def broadcast(comm: MPI.Intracomm, data: memoryview, root: int) -> None:
    """Overwrites `data` with the bytes of rank `root`. data: contiguous, writable, as long on all ranks."""
    flat = data.cast("B")
    for start in range(0, len(flat), PIECE_BYTES):
        comm.Bcast([flat[start : start + PIECE_BYTES], _byte()], root)


def allgather(comm: MPI.Intracomm, mine: memoryview, everybody: memoryview, lengths: list[int]) -> None:
    """Writes the bytes of all ranks into `everybody`, one after the other. lengths: of each rank's `mine`, in bytes."""
    target = everybody.cast("B")
    starts = [0, *accumulate(lengths)]
    if starts[-1] < 1 << 31:
        comm.Allgatherv([mine.cast("B"), _byte()], [target, (lengths, starts[:-1]), _byte()])
        return
    own = comm.Get_rank()
    target[starts[own] : starts[own + 1]] = mine.cast("B")
    for rank, start in enumerate(starts[:-1]):
        broadcast(comm, target[start : starts[rank + 1]], rank)


def broadcast_object(comm: MPI.Intracomm, value: Any, root: int) -> Any:
    """`value` of rank `root`, on every rank; on `root` the very object. It must pickle; functions do, too."""
    is_root = comm.Get_rank() == root
    other = broadcast_pickled(comm, pickled(value) if is_root else b"", root)
    return value if is_root else other


def broadcast_pickled(comm: MPI.Intracomm, mine: bytes, root: int) -> Any:
    """The object that rank `root` has pickled; None on `root`."""
    is_root = comm.Get_rank() == root
    length = comm.bcast(len(mine), root)
    data = bytearray(mine) if is_root else bytearray(length)
    broadcast(comm, memoryview(data), root)
    return None if is_root else pickle.loads(data)


def allgather_pickled(comm: MPI.Intracomm, mine: bytes) -> list[Any]:
    """The objects that all ranks have pickled, by rank."""
    lengths = comm.allgather(len(mine))
    everybody = memoryview(bytearray(sum(lengths)))
    allgather(comm, memoryview(mine), everybody, lengths)
    starts = [0, *accumulate(lengths)]
    return [pickle.loads(everybody[starts[rank] : starts[rank + 1]]) for rank in range(len(lengths))]


def pickled(value: Any) -> bytes:
    """`value` as bytes. It must pickle: call this before the ranks meet, so that nobody waits for one that cannot."""
    return bytes(cloudpickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def _byte() -> MPI.Datatype:
    from mpi4py import MPI

    return MPI.BYTE
