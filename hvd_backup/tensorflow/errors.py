"""Failures of our ops as this package's own exceptions: eagerly, out of a tf.function, out of fit().

An op can fail only with one of TensorFlow's status codes and a text, and TensorFlow makes the exception of the class
that belongs to the code. `translate` teaches these classes that a text of ours makes an object of a class which is both
theirs and ours; so code which catches tf.errors.OpError goes on to work.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import tensorflow as tf

from hvd_backup import failures
from hvd_backup.errors import HvdBackupError, UsageError

__all__ = ["translate"]

# What our ops say, up to what TensorFlow adds; what our Python functions inside a graph have raised.
_OPS = re.compile(r"hvd_backup: (.*?)(?=\s*\[\[\{\{|\s*\[Op:|$)", re.DOTALL)
_FUNCTIONS = re.compile(r"(HvdBackupError|UsageError|ConfigError|NotInitializedError): (.*?)\s+Traceback ", re.DOTALL)


@functools.cache
def translate() -> None:
    """From now on TensorFlow raises our exceptions for our ops."""
    # While it traces a function, AutoGraph makes exceptions anew, with the place in their text, if it knows how: when
    # __init__ is this one. Otherwise users would get a StagingError.
    HvdBackupError.__init__ = Exception.__init__  # type: ignore[method-assign]
    errors = tf.errors
    for failed in (errors.AbortedError, errors.UnknownError):
        _teach(failed, HvdBackupError)
    for wrong in (errors.InvalidArgumentError, errors.FailedPreconditionError):
        _teach(wrong, UsageError)


def _teach(theirs: Any, ours: Any) -> None:
    """Objects of the class `theirs` are of `ours`, too, when their text is ours."""

    def new(kind: Any, node_def: Any = None, op: Any = None, message: str = "", *rest: Any) -> Any:
        wrong, text = _text_of(message)
        made = _both(theirs, UsageError if wrong else ours) if kind is theirs and text else kind
        if text and not wrong and ours is HvdBackupError:
            failures.happened(text)
        return Exception.__new__(made, node_def, op, message, *rest)

    theirs.__new__ = staticmethod(new)


@functools.cache
def _both(theirs: Any, ours: Any) -> Any:
    def begin(self: Any, node_def: Any, op: Any, message: str, *rest: Any) -> None:
        theirs.__init__(self, node_def, op, _text_of(message)[1] or message)

    name = "UsageError" if ours is UsageError else "HvdBackupError"
    return type(name, (ours, theirs), {"__init__": begin, "__module__": "hvd_backup.errors"})


def _text_of(message: str) -> tuple[bool, str]:
    """Whether it is known to be wrong use; our text, empty when it is not ours."""
    if found := _OPS.search(message):
        return False, found[1]
    if found := _FUNCTIONS.search(message):
        return found[1] != "HvdBackupError", found[2]
    return False, ""
