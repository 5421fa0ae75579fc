"""first_n_allreduce on torch tensors: from and to their own memory, without a copy; on a GPU through the host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hvd_backup import context
from hvd_backup.errors import UsageError
from hvd_backup.first_n import Handle, ReduceOp, Signature, contributors_wanted
from hvd_backup.torch.memory import contiguous, dtype_name

__all__ = ["FirstN", "first_n_allreduce", "first_n_allreduce_async", "start"]


class FirstN(NamedTuple):
    """Outcome of a first-N allreduce: the result, and the ranks whose tensors it holds, ascending."""

    result: torch.Tensor
    contributors: tuple[int, ...]


def first_n_allreduce(
    tensor: torch.Tensor,
    n: int | None = None,
    name: str | None = None,
    op: ReduceOp = ReduceOp.AVERAGE,
    *,
    backup_workers: int | None = None,
) -> FirstN:
    """Mean or sum over the first `n` ranks to arrive, the same on all ranks; nobody waits for the others.

    The k-th call under a name on each rank is the k-th collective. A rank that comes too late gets the result that the
    others have already computed, without its own tensor.

    Args:
        tensor: float16, bfloat16, float32, float64, int32 or int64; shape and dtype equal on all ranks.
        n: how many contributors to wait for, 1 to size.
        name: of the collective; without one, calls are matched by their order in the program.
        op: Average (over the contributors; integers: floor of the exact mean) or Sum.
        backup_workers: in place of n: size - n. Without both, HVD_BACKUP_BACKUP_WORKERS counts; without that, n = size.

    Raises:
        UsageError: a dtype, n or op that cannot be used, or a name under way.
        HvdBackupError: ranks differ in shape, dtype, n or op; or the engine has failed.
    """
    outcome: FirstN = _first_n(tensor, n, name, op, backup_workers, wait_follows=True).wait()
    return outcome


def first_n_allreduce_async(
    tensor: torch.Tensor,
    n: int | None = None,
    name: str | None = None,
    op: ReduceOp = ReduceOp.AVERAGE,
    *,
    backup_workers: int | None = None,
) -> Handle:
    """Starts `first_n_allreduce`; `synchronize` gives its outcome. Do not change the tensor before."""
    return _first_n(tensor, n, name, op, backup_workers, wait_follows=False)


def _first_n(
    tensor: torch.Tensor, n: int | None, name: str | None, op: ReduceOp, backup_workers: int | None, wait_follows: bool
) -> Handle:
    here = context.current()
    wanted = contributors_wanted(n, backup_workers, here.size, here.default_backup_workers)
    return start("first_n_allreduce", tensor, wanted, name, op, 1.0, 1.0, FirstN, wait_follows)


def start(
    operation: str,
    tensor: torch.Tensor,
    required: int,
    name: str | None,
    op: ReduceOp,
    prescale: float,
    postscale: float,
    outcome: Callable[[torch.Tensor, tuple[int, ...]], Any],
    wait_follows: bool,
) -> Handle:
    """Starts a collective of the engine.

    Args:
        outcome: makes what `synchronize` gives, from result and contributors.
        wait_follows: see `Collectives.start`. The others: as in `first_n_allreduce`.
    """
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{operation}: name={name!r}, expected a str")
    contribution = contiguous(operation, tensor)
    if prescale != 1.0:
        contribution = contribution * prescale
    result = torch.empty_like(contribution)

    def finish(contributors: tuple[int, ...]) -> Any:
        if op is ReduceOp.AVERAGE and not result.dtype.is_floating_point:  # the engine sums integers exactly
            result.floor_divide_(len(contributors))
        return outcome((result if postscale == 1.0 else result.mul_(postscale)).to(tensor.device), contributors)

    return context.current().collectives.start(
        Signature(operation, dtype_name(contribution), tuple(tensor.shape), required, op),
        name,
        contribution=contribution.data_ptr(),
        result=result.data_ptr(),
        keep=(contribution, result),
        finish=finish,
        wait_follows=wait_follows,
    )
