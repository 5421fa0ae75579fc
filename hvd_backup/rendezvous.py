"""All ranks meet before the training thread does a collective through MPI, and find out if they mean different ones.

MPI itself would hang, for ever and beyond Ctrl-C, when one rank has left the program, has joined, or calls another
collective. The meeting is an allreduce of our own over all ranks: the engine fails it when a rank has left, and each
rank puts a checksum of what it means into a place of its own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

from hvd_backup.errors import UsageError
from hvd_backup.first_n import Collectives, ReduceOp, Signature
from hvd_backup.survivors import Survivors

__all__ = ["Rendezvous", "describe_difference"]


class Rendezvous:
    """Where all ranks meet that are left."""

    def __init__(self, collectives: Collectives, survivors: Survivors, lost: Callable[[], list[int]]) -> None:
        """survivors: all ranks, as yet. lost: which ranks have died."""
        self._collectives = collectives
        self._survivors = survivors
        self._lost = lost
        self._rank = survivors.comm.Get_rank()
        self._size = survivors.comm.Get_size()

    def meet(self, what: str) -> Survivors:
        """Returns when every rank that is left is in `what`: these ranks.

        Raises:
            UsageError: on every rank, when some are in something else; or when some have joined.
            HvdBackupError: a rank has left the program.
        """
        if self._size == 1:
            return self._survivors
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
        contributors = sorted(handle.wait())
        if len(contributors) < self._size and (joined := set(range(self._size)) - {*contributors, *self._lost()}):
            raise UsageError(f"{what} needs all ranks, but {_ranks(sorted(joined))} called join(): call it after that")
        self._survivors.are(contributors)
        if len({everybody[rank] for rank in contributors}) > 1:
            with self._survivors as left:
                raise UsageError(describe_difference(dict(zip(left.ranks, left.comm.allgather(what), strict=True))))
        return self._survivors


def describe_difference(meanings: dict[int, str]) -> str:
    """What is wrong when a rank is in what it says. meanings: by rank."""
    groups: dict[str, list[int]] = {}
    for rank, what in meanings.items():
        groups.setdefault(what, []).append(rank)
    told = "; ".join(f"{_ranks(ranks)}: {what}" for what, ranks in groups.items())
    return f"the ranks are in different collectives, which must be called by all in the same order: {told}"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
