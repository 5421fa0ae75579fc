"""The ranks that are left, as MPI's own collectives see them.

Where MPI survives the death of a process (ULFM: Open MPI 5, `mpirun --with-ft ulfm`), its collectives work among the
processes that are left, on a communicator of theirs. Elsewhere all ranks are always there, and nothing here does
anything.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, cast

from hvd_backup.errors import HvdBackupError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Survivors"]


class Survivors:
    """A context manager, for MPI's collectives: if a rank dies in one of them, the others get an error.

    Attributes:
        comm: a communicator of the ranks that are left; valid inside.
        ranks: their numbers among all ranks, ascending.
    """

    def __init__(self, comm: MPI.Intracomm, survives_losses: bool) -> None:
        """comm: of all ranks. Collective over it where losses are survived."""
        self.comm = comm
        self.ranks = list(range(comm.Get_size()))
        self._all = comm.Dup() if survives_losses else None  # no collective that may have to be given up goes over it
        self._count = len(self.ranks)  # of those in comm
        self._given_up = False

    def are(self, ranks: list[int]) -> None:
        """From now on these are left; all of them say so."""
        self.ranks = ranks

    def place_of(self, rank: int) -> int:
        """The number of `rank` in `comm`."""
        if rank not in self.ranks:
            raise HvdBackupError(f"this needs rank {rank}, whose process has died: name another rank")
        return self.ranks.index(rank)

    def communicators(self) -> list[MPI.Intracomm]:
        """All that this holds, to be freed when nobody is in a collective any more."""
        return [self.comm] if self._all is None else [self.comm, self._all]

    def __enter__(self) -> Survivors:
        """Collective over the ranks that are left, if they are fewer than the last time."""
        if self._all is not None and (self._given_up or self._count != len(self.ranks)):
            self.comm.Free()
            self.comm = cast("MPI.Intracomm", self._all.Shrink())
            self._count = self.comm.Get_size()
            self._given_up = False
            if self._count < len(self.ranks):
                self._give_up()
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if self._all is None:
            return
        from mpi4py import MPI

        lost = {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED}
        if isinstance(error, MPI.Exception) and error.Get_error_class() in lost:
            self._give_up()

    def _give_up(self) -> None:
        self._given_up = True
        self.comm.Revoke()  # so that nobody waits in it for those who have noticed
        raise HvdBackupError("a process has died in the middle of this collective: call it again") from None
