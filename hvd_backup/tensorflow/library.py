"""The library with TensorFlow's ops, which is compiled against one version of TensorFlow and fits only that one.

Importing this module says so when they do not fit together; the library is loaded when it is first needed. Its source:
csrc/bindings/tensorflow_ops.cpp, tensorflow_device_ops.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import signal
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # no public name says whether a graph is compiled by XLA

from hvd_backup import _core
from hvd_backup.errors import UsageError
from hvd_backup.tensorflow.errors import translate

__all__ = ["mismatch", "native", "ops", "refuse_xla"]

REMEDY = (
    "build hvd_backup again in this environment, in its source folder: "
    "pip install --no-build-isolation --force-reinstall --no-deps . "
    "(before that: pip install scikit-build-core nanobind cmake ninja)"
)


def mismatch(folder: Path, version: str) -> str:
    """Why the ops in `folder` do not do for this version of TensorFlow; empty when they do."""
    built = sorted(path.stem.removeprefix("ops-") for path in folder.glob("ops-*.so"))
    if version in built:
        return ""
    if built:
        return (
            f"hvd_backup's TensorFlow ops were built with TensorFlow {', '.join(built)}, but TensorFlow {version} is "
            f"installed: {REMEDY}"
        )
    return f"hvd_backup was built without TensorFlow, so its TensorFlow ops are not in {folder}: {REMEDY}"


FOLDER = Path(str(_core.__file__)).parent / "tensorflow"
if WHY_NOT := mismatch(FOLDER, tf.__version__):
    raise ImportError(WHY_NOT)
PATH = str(FOLDER / f"ops-{tf.__version__}.so")
translate()


@functools.cache
def ops() -> Any:
    """The ops as Python functions: hvd_backup_submit and _next_update, also with _on_device, hvd_backup_first_n."""
    return tf.load_op_library(PATH)


@functools.cache
def native() -> ctypes.CDLL:
    """The C functions of csrc/bindings/tensorflow_stream.cpp."""
    ops()
    library = ctypes.CDLL(PATH)
    pointers = ctypes.POINTER(ctypes.c_void_p)
    library.hvdb_tf_open.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        *(pointers, pointers, ctypes.POINTER(ctypes.c_uint64), ctypes.c_char_p),
    ]
    library.hvdb_tf_open.restype = ctypes.c_int64
    library.hvdb_tf_close.argtypes = [ctypes.c_int64]
    library.hvdb_tf_close.restype = None
    library.hvdb_tf_set_samples.argtypes = [ctypes.c_int64, ctypes.c_double]
    library.hvdb_tf_set_samples.restype = None
    library.hvdb_tf_last_update.argtypes = [ctypes.c_int64]
    library.hvdb_tf_last_update.restype = ctypes.c_char_p
    library.hvdb_tf_answer_interrupts.restype = None
    library.hvdb_tf_answer_interrupts(ctypes.pythonapi.Py_AddPendingCall, _interrupt_raises)
    return library


@ctypes.CFUNCTYPE(ctypes.c_int)
def _interrupt_raises() -> int:
    """Whether Ctrl-C raises KeyboardInterrupt: the program has not set up something else for it."""
    return int(signal.getsignal(signal.SIGINT) is signal.default_int_handler)


def refuse_xla() -> None:
    """Raises UsageError where no op of ours can work."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise UsageError(
            "a function that XLA compiles cannot exchange anything with other ranks: model.compile(..., "
            "jit_compile=False), or tf.function without jit_compile=True; layers may be compiled by functions of their "
            "own"
        )
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        raise UsageError(
            "a tf.distribute strategy with several replicas is at work: hvd_backup needs one process for each device"
        )
