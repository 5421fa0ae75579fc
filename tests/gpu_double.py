"""A GPU for ranks that are real processes, whose memory is the host's: csrc/bindings/testing_device.cpp."""

import functools
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from hvd_backup._core_testing import HostDevice

from hvd_backup import _core, context


def init(hvd: ModuleType, takes_gpu_memory: bool) -> None:
    """takes_gpu_memory: what MPI says."""
    over_mpi = functools.partial(_core.Engine.over_mpi, host_for_device=takes_gpu_memory)
    with mock.patch.object(context, "_core", mock.Mock(Engine=mock.Mock(over_mpi=over_mpi))):
        hvd.init()


class HostMemory:
    """See _gpu.HostMemory. Holds NaN, and others afterwards."""

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, 0xFF, np.uint8)
        self.address = self._bytes.ctypes.data

    def __del__(self) -> None:
        self._bytes[:] = 0xFF


class Gpu:
    """See _gpu.Device.

    Attributes:
        device: what the engine uses.
        host_bytes: how much host memory was asked for.
    """

    def __init__(self, folder: str, rank: int, why_no_groups: str = "") -> None:
        """folder: of all ranks, for what they exchange."""
        self.device = HostDevice(folder, rank + 1, why_no_groups)
        self.address = self.device.address
        self.why_no_groups = why_no_groups
        self.nccl_version = "2.28.0"
        self.host_bytes = 0

    def host_memory(self, bytes: int) -> Any:
        self.host_bytes += bytes
        return HostMemory(bytes)
