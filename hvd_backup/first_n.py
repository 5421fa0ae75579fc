"""The bare collective on addresses: sum over the first n ranks to arrive, without any framework.

Each name is a channel of the engine: the k-th call under a name on each rank is the k-th collective. A rank that comes
after the decision gets the result that the others have computed, with its own contribution left out. `allreduce` is
the same with n = size. The framework modules make tensors of it: they allocate, call `Collectives.start`, and divide
the sum of integers when a mean is wanted.

Names. An unnamed call takes the lowest number that no unfinished call of the same signature holds, so names follow from
the order of the program. Under one name each new signature opens the next channel (loss, loss[1], ...), and the ranks
compare the signatures of equal channels: calls that differ between ranks are found when a signature is first used,
instead of leaving everybody to wait for somebody who calls something else.
"""

from __future__ import annotations

import enum
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvd_backup import _core, failures
from hvd_backup.errors import HvdBackupError, UsageError
from hvd_backup.policy import journal_depth

__all__ = ["DTYPE_BYTES", "Collectives", "Handle", "ReduceOp", "Signature", "checked_handle", "contributors_wanted"]

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8}


class ReduceOp(enum.IntEnum):
    """How contributions become a result; the numbers are Horovod's. Only AVERAGE and SUM for the first n."""

    AVERAGE = 0
    SUM = 1
    ADASUM = 2  # Horovod's own optimizer and allreduce have it
    MIN = 3
    MAX = 4
    PRODUCT = 5


@dataclass(frozen=True)
class Signature:
    """What must be equal on all ranks for one collective.

    Attributes:
        operation: the function that the user called, such as "first_n_allreduce".
        dtype: a key of DTYPE_BYTES.
        shape: of the tensor.
        required: n, 1 <= n <= size.
        op: AVERAGE or SUM.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    required: int
    op: ReduceOp

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise UsageError(f"{self.operation}: dtype {self.dtype} is not supported, only {known}: convert the tensor")
        if not isinstance(self.op, ReduceOp) or self.op not in (ReduceOp.AVERAGE, ReduceOp.SUM):
            raise UsageError(f"{self.operation}: op={self.op!r} is not supported, only Average and Sum")

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def description(self) -> str:
        """Lines that the engine compares between ranks."""
        return f"dtype {self.dtype}\nshape {self.shape}\nn {self.required}\nop {self.op.name.lower()}"


class Handle:
    """A collective that has been started. Its buffers are kept until it has ended, also when nobody waits for it."""

    def __init__(self, line: _Line, keep: object, finish: Callable[[tuple[int, ...]], Any] | None) -> None:
        self._line = line
        self._keep = keep
        self._finish = finish
        self._outcome: Any = None
        self._ended = False

    def poll(self) -> bool:
        """Whether `wait` would return at once (or raise)."""
        return self._ended or self._line.poll()

    def wait(self) -> Any:
        """Blocks until the result is there. May be called again, with the same outcome; answers Ctrl-C.

        Returns:
            What `finish` made of the contributors; without `finish`, the ranks that contributed, ascending.

        Raises:
            HvdBackupError: the ranks differ in what they called, or a rank that is needed has left.
        """
        if not self._ended:
            with failures.reported():
                contributors = self._line.take()
            self._ended = True
            self._keep = None
            self._outcome = contributors if self._finish is None else self._finish(contributors)
            self._finish = None
        return self._outcome


def checked_handle(operation: str, handle: Any) -> Any:
    """`handle`, which must be what an asynchronous collective has returned."""
    if not callable(getattr(handle, "wait", None)) or not callable(getattr(handle, "poll", None)):
        raise UsageError(f"{operation}({type(handle).__name__}): expected a handle, as allreduce_async() returns it")
    return handle


class _Line:
    """One channel, and the call that is under way on it. failure: why it can never be used again, if so."""

    def __init__(self, open_channel: Callable[[], _core.Channel]) -> None:
        self.running: Handle | None = None
        self.failure = ""
        self._abandoned: Handle | None = None  # after a failure the engine may still use the buffers for a while
        self._open = open_channel

    @functools.cached_property
    def _channel(self) -> _core.Channel:
        return self._open()

    def start(self, handle: Handle, contribution: int, result: int, wait_follows: bool) -> None:
        if self.failure:
            raise HvdBackupError(self.failure)
        self.running = handle
        try:
            self._channel.begin(1.0, b"")
            self._channel.submit(0, contribution, result, wait_follows)
        except HvdBackupError as error:
            self._remember(error)
            raise

    def poll(self) -> bool:
        return bool(self.failure) or self._channel.poll()

    def take(self) -> tuple[int, ...]:
        try:
            update = self._channel.wait()
        except HvdBackupError as error:
            self._remember(error)
            raise
        if update.kind != "update":
            raise HvdBackupError(f"the engine answered a collective with {update.kind!r}; please report this")
        self.running = None
        return tuple(update.contributors[0])

    def _remember(self, error: HvdBackupError) -> None:
        self.failure = str(error)
        self.running, self._abandoned = None, self.running


class Collectives:
    """All collectives of one process by name. The calls of all ranks must come in the same order under each name."""

    def __init__(
        self, engine: _core.Engine, journal_bytes: int, check_process: Callable[[], None] = lambda: None
    ) -> None:
        """check_process: raises where the engine cannot be used."""
        self._engine = engine
        self._check_process = check_process
        self._journal_bytes = journal_bytes
        self._joins = 0
        self._lines: dict[str, dict[tuple[Signature, int], _Line]] = {}
        self._retired: list[object] = []

    def start(
        self,
        signature: Signature,
        name: str | None,
        contribution: int,
        result: int,
        keep: object,
        finish: Callable[[tuple[int, ...]], Any] | None = None,
        wait_follows: bool = False,
    ) -> Handle:
        """Starts a collective and returns at once (the first call of a signature asks the coordinator first).

        Args:
            signature: what is reduced; of at least one element.
            name: of the collective; None: from the order of the program.
            contribution: address of the elements, contiguous and unchanged until `Handle.wait` has returned.
            result: address of as many elements in another buffer, where the mean or sum will be (of integers, the sum).
            keep: what owns both buffers.
            finish: called with the contributors, once, to make what `Handle.wait` returns.
            wait_follows: `Handle.wait` is called at once. In a collective of all ranks, this rank then does nothing
                else until all have come, and meanwhile nobody waits for it in a collective of the first n.

        Raises:
            UsageError: n is not in 1..size; or an earlier call of the same name has not been waited for.
            HvdBackupError: the ranks differ in what they called under this name, or a rank that is needed has left.
        """
        self._check_process()
        if not 1 <= signature.required <= self._engine.size:
            raise UsageError(
                f"{signature.operation}: n={signature.required}, expected 1 to {self._engine.size}, the number of ranks"
            )
        line = self._line(signature, name)
        handle = Handle(line, keep, finish)
        if wait_follows and signature.required == self._engine.size:
            self._engine.away()
        line.start(handle, contribution, result, wait_follows)
        return handle

    def under_way(self) -> bool:
        """Whether there is a collective that has been started and not been waited for."""
        return any(line.running is not None for lines in self._lines.values() for line in lines.values())

    def start_afresh(self) -> None:
        """After a join: ranks that had joined have missed collectives, so all ranks begin to count anew."""
        self._joins += 1
        self._retired.append(self._lines)  # with the buffers of those that have failed
        self._lines = {}

    def _line(self, signature: Signature, name: str | None) -> _Line:
        lines = self._lines.setdefault(f"{signature.operation}:{'' if name is None else name}", {})
        slot = 0
        if name is None:
            while (busy := lines.get((signature, slot))) is not None and busy.running is not None:
                slot += 1
        elif any(line.running is not None for line in lines.values()):
            raise UsageError(
                f"{signature.operation}: a collective named {name!r} is under way: synchronize() it first, or give "
                "another name"
            )
        index = len(lines)
        return lines.setdefault((signature, slot), _Line(lambda: self._open(signature, name, index)))

    def _open(self, signature: Signature, name: str | None, index: int) -> _core.Channel:
        update_bytes = signature.elements * DTYPE_BYTES[signature.dtype]
        count = (f"[{index}]" if index or name is None else "") + (f"[join {self._joins}]" if self._joins else "")
        channel = self._engine.open(
            name=f"{signature.operation}{count}" + ("" if name is None else f":{name}"),
            kind="collective",
            description=signature.description(),
            proposal=b"",
            required=signature.required,
            max_lag=journal_depth(update_bytes, self._engine.size, self._journal_bytes),
            average=signature.op is ReduceOp.AVERAGE,
        )
        channel.set_layout([(signature.elements, signature.dtype)], [0])
        return channel


def contributors_wanted(n: int | None, backup_workers: int | None, size: int, default: int) -> int:
    """n from what the user gave: `n`, or `backup_workers` = size - n, or the default number of backup workers."""
    if n is not None and backup_workers is not None:
        raise UsageError(f"give n or backup_workers, not both (n={n}, backup_workers={backup_workers})")
    given: Any = n if backup_workers is None else backup_workers
    if given is None:
        return size - default
    try:
        number = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = -1
    wanted = number if backup_workers is None else size - number
    if number < 0 or not 1 <= wanted <= size:
        what = f"n={given!r}" if backup_workers is None else f"backup_workers={given!r}"
        expected = f"n from 1 to {size}" if backup_workers is None else f"backup_workers from 0 to {size - 1}"
        raise UsageError(f"{what}: expected {expected}, there are {size} ranks")
    return wanted
