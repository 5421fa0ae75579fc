"""What the program does when its training is ended from outside: it saves what it has.

`on_failure` functions run once, between two updates: when this process is told to end (SIGTERM, which launchers send to
all ranks when one of them has died, and schedulers when the time is up), and when the engine or a channel has failed
(rank 0 has died; a rank that is needed has left), before that is raised.

A thread waits for the signal, because launchers leave little time, and the training thread may be in a call that does
not return within it, waiting for the very rank that has died.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hvd_backup.errors import HvdBackupError, UsageError

__all__ = ["happened", "on_failure", "reported", "unbroken"]

_log = logging.getLogger("hvd_backup")

_functions: list[Callable[[str], object]] = []
_update = threading.RLock()  # held while an update is applied, or while functions run
_earlier: Callable[[int, FrameType | None], object] | None = None  # the program's own handler
_ears: list[socket.socket] = []  # where the number of a signal is written, and where it is read


def on_failure(fn: Callable[[str], object]) -> None:
    """Runs fn(reason) once when training is ended from outside: the place to save a checkpoint.

        hvd.on_failure(lambda reason: torch.save(model.state_dict(), f"rank{hvd.rank()}.pt"))

    It runs on each rank by itself, between two updates, so the weights are whole; ranks may be some updates apart
    (`optimizer.global_step`). It cannot call collectives. After SIGTERM it runs in a thread of its own, and then the
    process ends, unless the program has handled SIGTERM before; launchers leave little time for it: Open MPI 5 a
    quarter of a second, 4.1 a second, Slurm 30. After a failure the error follows that it is about.

    Args:
        fn: an exception in it is logged, and the next function runs.

    Raises:
        UsageError: not a function; or not called in the main thread, where signals are set up.
    """
    if not callable(fn):
        raise UsageError(f"on_failure({type(fn).__name__}): expected a function of one argument, the reason")
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("on_failure() in another thread than the main one, where signals are set up: call it there")
    _functions.append(fn)
    _listen()


@contextmanager
def reported() -> Iterator[None]:
    """Around what waits for other ranks: when that fails for good, the functions run before the error goes on."""
    try:
        yield
    except UsageError:
        raise
    except HvdBackupError as error:
        happened(str(error))
        raise


def unbroken() -> threading.RLock:
    """A context manager around an update: no function runs meanwhile."""
    return _update


def happened(reason: str) -> None:
    """Runs the functions, unless they have run."""
    with _update:
        functions = _functions[:]
        _functions.clear()
        for fn in functions:
            try:
                fn(reason)
            except Exception:
                _log.exception("on_failure: an exception in %r, which was called because of: %s", fn, reason)


def _listen() -> None:
    """From now on a thread hears of SIGTERM at once."""
    global _earlier
    if _ears:
        return
    write, read = socket.socketpair()
    write.setblocking(False)
    _ears.extend((write, read))
    other = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    if other >= 0:
        _log.warning("on_failure: the program's own signal.set_wakeup_fd() is replaced")
    earlier = signal.signal(signal.SIGTERM, _on_signal)
    _earlier = earlier if callable(earlier) else None
    threading.Thread(target=_hear, args=(read,), name="hvd_backup on_failure", daemon=True).start()
    os.register_at_fork(after_in_child=_leave_child_alone)


def _leave_child_alone() -> None:
    """A data loader's worker, say: SIGTERM is what ends it, and no business of this process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, _earlier or signal.SIG_DFL)


def _hear(read: socket.socket) -> None:
    while signal.SIGTERM not in read.recv(64):
        pass
    happened("SIGTERM: the launcher ends this process (another rank has died, or the time is up)")
    if _earlier is None:
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _earlier is not None:
        _earlier(number, frame)
