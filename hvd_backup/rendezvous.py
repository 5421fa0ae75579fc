"""All ranks meet before the training thread does a collective through MPI, and find out if they mean different ones.

MPI itself would hang, for ever and beyond Ctrl-C, when one rank has left the program, has joined, or calls another
collective. The meeting is an allreduce of our own over all ranks: the engine fails it when a rank has left, and each
rank puts a checksum of what it means into a place of its own.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

from hvd_backup.errors import UsageError
from hvd_backup.first_n import Collectives, ReduceOp, Signature

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Rendezvous", "describe_difference"]


class Rendezvous:
    """Where the ranks of `comm` meet."""

    def __init__(self, collectives: Collectives, comm: MPI.Intracomm) -> None:
        self._collectives = collectives
        self._comm = comm
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()

    def meet(self, what: str) -> None:
        """Returns when every rank is in `what`.

        Raises:
            UsageError: on every rank, when some are in something else; or when some have joined.
            HvdBackupError: a rank has left the program.
        """
        if self._size == 1:
            return
        mine = array("q", bytes(8 * self._size))
        mine[self._rank] = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest(), "big")
        everybody = array("q", bytes(8 * self._size))
        handle = self._collectives.start(
            Signature("full_collective", "int64", (self._size,), self._size, ReduceOp.SUM),
            "meeting",
            contribution=mine.buffer_info()[0],
            result=everybody.buffer_info()[0],
            keep=(mine, everybody),
            wait_follows=True,
        )
        contributors = handle.wait()
        if len(contributors) < self._size:
            joined = sorted(set(range(self._size)) - set(contributors))
            raise UsageError(f"{what} needs all ranks, but {_ranks(joined)} called join(): call it after that")
        if len(set(everybody)) > 1:
            raise UsageError(describe_difference(self._comm.allgather(what)))


def describe_difference(meanings: list[str]) -> str:
    """What is wrong when rank i is in `meanings[i]`."""
    groups: dict[str, list[int]] = {}
    for rank, what in enumerate(meanings):
        groups.setdefault(what, []).append(rank)
    told = "; ".join(f"{_ranks(ranks)}: {what}" for what, ranks in groups.items())
    return f"the ranks are in different collectives, which must be called by all in the same order: {told}"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
