"""The exceptions of this package: one tree, rooted in what the native core raises.

- HvdBackupError (RuntimeError): everything raised on purpose. When it is no UsageError, the world failed: a peer was
  lost, MPI reported an error; the text names rank, step and peer.
  - UsageError: the caller did something wrong and is told what to do instead.
    - ConfigError (also ValueError): an option, environment variable or specification whose value cannot be used.
    - NotInitializedError (also ValueError, as in Horovod): called before init() or after shutdown().
"""

from hvd_backup import _core

__all__ = ["ConfigError", "HvdBackupError", "NotInitializedError", "UsageError"]

HvdBackupError = _core.CoreError
UsageError = _core.CoreUsageError
for _kind, _name in ((HvdBackupError, "HvdBackupError"), (UsageError, "UsageError")):  # as a traceback shows them
    _kind.__name__ = _kind.__qualname__ = _name
    _kind.__module__ = __name__


class ConfigError(UsageError, ValueError):
    """An option has a value that cannot be used; says what was given and what was expected."""


class NotInitializedError(UsageError, ValueError):
    """A call that needs a running engine came before init() or after shutdown()."""
