"""A channel of the engine as TensorFlow's ops know it: by number. Its other side: csrc/bindings/tensorflow_stream.h."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Sequence
from typing import Any

from hvd_backup import _core
from hvd_backup.context import Context
from hvd_backup.tensorflow.library import REMEDY, native

__all__ = ["Stream"]


class Stream:
    """Closed when it is collected, and before the engine leaves. Whoever makes it keeps channel and buffers longer.

    Args:
        place: whose end is awaited.
        channel: open, with its layout.
        buffers: of each bucket: bytes, and the addresses (contribution, result); 0 when the ops bring their own.
        hyperparameters: names of the numbers that travel with updates.

    Attributes:
        number: for the ops' attribute `stream`.
    """

    def __init__(
        self,
        place: Context,
        channel: _core.Channel,
        buffers: Sequence[tuple[int, int, int]],
        hyperparameters: Sequence[str] = (),
    ) -> None:
        addresses = ctypes.c_void_p * len(buffers)
        sizes, contributions, results = zip(*buffers, strict=True)
        self.number: int = native().hvdb_tf_open(
            _core.function_table(),
            channel.address,
            len(buffers),
            addresses(*contributions),
            addresses(*results),
            (ctypes.c_uint64 * len(buffers))(*sizes),
            ",".join(hyperparameters).encode(),
        )
        if self.number < 0:
            raise ImportError(f"hvd_backup's TensorFlow ops are of another version than its core: {REMEDY}")
        self._account: dict[str, Any] = {"calls": 0, "leftovers": 0, "kind": ""}
        self._close = weakref.finalize(self, native().hvdb_tf_close, self.number)
        place.before_close.append(self._close)

    def set_samples(self, samples: float) -> None:
        """This rank's weight in the next updates."""
        native().hvdb_tf_set_samples(self.number, samples)

    def account(self) -> dict[str, Any]:
        """What has happened: `calls` (steps that have ended), `leftovers`, `kind`, and of the last update the rest."""
        if text := native().hvdb_tf_last_update(self.number):  # none once it is closed
            self._account = json.loads(text)
        return self._account
