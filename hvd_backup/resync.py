"""A rank's state as bytes for a rank beyond the journal (on_max_lag="resync"), which goes on as if it were that rank.

Arrays travel as they lie in memory, copied once on either side, by the engine and into the place where they belong; all
that is around them is pickled. What it is not: what belongs to the state, which each framework knows (torch/resync.py,
keras/updates.py), and how it travels (csrc/engine/state_fetch.h).
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Callable
from typing import Any, Protocol

import cloudpickle
import numpy as np

from hvd_backup.numpy_buffers import bytes_of

__all__ = ["Arrays", "NumpyArrays", "PackedState", "memory_at", "pack", "unpack"]

ALIGNMENT = 64
LENGTH_BYTES = 8


class Arrays(Protocol):
    """What the arrays of a framework are."""

    def contents(self, value: object) -> tuple[Any, memoryview] | None:
        """What `array` needs to make it again, and its bytes; None: it is none, and is pickled."""

    def array(self, header: Any, contents: memoryview) -> Any:
        """Such an array; it may share `contents`."""


class NumpyArrays:
    """NumPy's own. See Arrays."""

    def contents(self, value: object) -> tuple[Any, memoryview] | None:
        """See Arrays."""
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            return None
        whole = np.ascontiguousarray(value)
        return (whole.dtype, value.shape), bytes_of(whole)

    def array(self, header: Any, contents: memoryview) -> Any:
        """See Arrays."""
        dtype, shape = header
        return np.frombuffer(contents, dtype).reshape(shape)


class PackedState:
    """Parts that make the bytes, one after the other, and what owns them.

    Attributes:
        parts: (address, bytes) of each.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []
        self._owners: list[object] = []

    def append(self, contents: memoryview) -> None:
        """One more."""
        flat = np.frombuffer(contents, np.uint8)
        self.parts.append((flat.ctypes.data, flat.nbytes))
        self._owners.append(flat)


def pack(state: Any, arrays: Arrays) -> PackedState:
    """Length of the pickle, pickle, arrays; each array begins at a multiple of ALIGNMENT after the pickle's end.

    Args:
        state: anything that pickles, with arrays in it. They are not copied: what comes of it must be used at once.
        arrays: which of them are such.
    """
    found: list[memoryview] = []
    total = 0

    def reference(value: object) -> Any:
        nonlocal total
        contents = arrays.contents(value)
        if contents is None:
            return None
        found.append(contents[1])
        begin = total
        total += _padded(contents[1].nbytes)
        return contents[0], begin, contents[1].nbytes

    file = io.BytesIO()
    _Pickler(file, reference).dump(state)
    outline = file.getvalue()
    outline += bytes(_padded(LENGTH_BYTES + len(outline)) - LENGTH_BYTES - len(outline))
    packed = PackedState()
    packed.append(memoryview(len(outline).to_bytes(LENGTH_BYTES, "little") + outline))
    for contents in found:
        if contents.nbytes:
            packed.append(contents)
        if gap := _padded(contents.nbytes) - contents.nbytes:
            packed.append(memoryview(bytes(gap)))
    return packed


def unpack(memory: memoryview, arrays: Arrays) -> Any:
    """What was packed. Its arrays share `memory`."""
    end = LENGTH_BYTES + int.from_bytes(memory[:LENGTH_BYTES], "little")

    def array(reference: Any) -> Any:
        header, begin, length = reference
        return arrays.array(header, memory[end + begin : end + begin + length])

    return _Unpickler(io.BytesIO(memory[LENGTH_BYTES:end]), array).load()


def memory_at(address: int, size: int) -> memoryview:
    """The engine's memory."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no annotations
    """Functions pickle, too: a scheduler may hold one."""

    def __init__(self, file: io.BytesIO, reference: Callable[[object], Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._reference = reference

    def persistent_id(self, value: object) -> Any:
        """Arrays go separately."""
        return self._reference(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, array: Callable[[Any], Any]) -> None:
        super().__init__(file)
        self._array = array

    def persistent_load(self, reference: Any) -> Any:
        return self._array(reference)
