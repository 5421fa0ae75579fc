"""Whether the gradients of an optimizer go from GPU to GPU (NCCL or CUDA-aware MPI), or through host memory.

Where they can, the engine gets them where they are, and all ranks that can form a group: csrc/control/device_groups.h.
What a group cannot serve, or not yet, goes through host memory all the same, to the same bits. On which GPU they are,
each framework says: hvd_backup/torch/data_plane.py, hvd_backup/tensorflow/data_plane.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeVar

from hvd_backup import context
from hvd_backup.config import Config
from hvd_backup.context import Context
from hvd_backup.errors import ConfigError, NotInitializedError
from hvd_backup.policy import Policy

__all__ = ["ON_THE_CPU", "Gpu", "engage", "in_words", "library", "means_of", "the_gpu", "why_no_library"]

ON_THE_CPU = "the parameters are on the CPU"

Place = TypeVar("Place")  # a device, as a framework has it
Gpu = tuple[Any, str]  # as the engine uses it (`_gpu.Device`), or None and why it cannot


@functools.cache
def library() -> ModuleType | None:
    """The GPU library, or None: hvd_backup was built without it."""
    try:
        from hvd_backup import _gpu
    except ImportError:
        return None
    return _gpu


def why_no_library(number: int) -> str:
    """Why the GPU library cannot be used on a GPU; empty: it can, and has shown it.

    number: as CUDA counts those that this process sees.
    """
    return "hvd_backup was built without the GPU library (nvcc)" if library() is None else _why_it_does_not_run(number)


@functools.cache
def _why_it_does_not_run(number: int) -> str:
    gpu: Any = library()
    try:
        gpu.try_on(number)
    except RuntimeError as error:  # compiled for other GPUs, or by a CUDA that is newer than the driver
        return (
            f"hvd_backup's GPU library does not run on GPU {number} ({error}): build it with CUDAARCHS set to this "
            "GPU's architecture, and with a CUDA that the driver supports"
        )
    return ""


def the_gpu(number: int, nccl_library: str) -> Gpu:
    """A GPU of this process as the engine uses it, one for all frameworks; or None and why it cannot.

    Args:
        number: see why_no_library.
        nccl_library: where NCCL is, if it is not found by name.
    """
    if why_not := why_no_library(number):
        return None, why_not
    try:
        return _device(number, nccl_library), ""
    except RuntimeError as error:
        return None, f"GPU {number} does not have what the engine needs ({error})"


@functools.cache
def _device(number: int, nccl_library: str) -> Any:
    gpu: Any = library()
    return gpu.Device(number, nccl_library)


def engage(place: Context, policy: Policy, devices: Iterable[Place], gpu_of: Callable[[Place, Config], Gpu]) -> bool:
    """Whether the engine is to get the gradients of these parameters on their GPU, which it uses from now on.

    Args:
        place: where the engine is.
        policy: of the optimizer.
        devices: of its parameters.
        gpu_of: the GPU that such a device is.

    Raises:
        ConfigError: they cannot be exchanged between GPUs, but HVD_BACKUP_DATA_PLANE asks for it.
    """
    plane = place.config.data_plane
    if plane == "host" or place.size == 1:
        return False
    why_not = _why_not(place, policy, set(devices), gpu_of)
    if why_not and plane != "auto":
        raise ConfigError(
            f"HVD_BACKUP_DATA_PLANE={plane} on rank {place.rank}: {why_not}. "
            "With 'auto' or 'host' gradients go through host memory"
        )
    return not why_not


def means_of(gpu: Any, config: Config, mpi_takes_gpu_memory: bool) -> tuple[str, str]:
    """By what data can go from this GPU to others, "nccl" or "mpi", and why not; one of them is empty."""
    reasons = {
        "nccl": str(gpu.why_no_groups),
        "mpi": "" if mpi_takes_gpu_memory else "MPI says that it does not take GPU memory (is not CUDA-aware)",
    }
    asked_for = [config.data_plane] if config.data_plane in reasons else list(reasons)
    for means in asked_for:
        if not reasons[means]:
            return means, ""
    return "", "; ".join(reasons[means] for means in asked_for)


def in_words(gpu_of: Callable[[Config], Gpu]) -> str:
    """How gradients on this GPU travel, as far as that does not depend on the optimizer: for `hvd-backup check`."""
    config = Config.from_environment()
    if config.data_plane == "host":
        return "through pinned host memory (HVD_BACKUP_DATA_PLANE=host)"
    gpu, why_not = gpu_of(config)
    means, why_not = ("", why_not) if why_not else means_of(gpu, config, _mpi_takes_gpu_memory())
    if why_not:
        return f"through pinned host memory: {why_not}"
    kept = "on the GPU" if config.journal == "device" else "in page-locked host memory"
    how = "CUDA-aware MPI" if means == "mpi" else f"NCCL {gpu.nccl_version}"
    return f"from GPU to GPU, by {how}; kept for late ranks {kept}"


def _mpi_takes_gpu_memory() -> bool:
    try:
        return context.current().engine.takes_device_memory
    except NotInitializedError:
        return False


def _why_not(place: Context, policy: Policy, devices: set[Place], gpu_of: Callable[[Place, Config], Gpu]) -> str:
    if not policy.may_leave_out:
        return "without backup workers, of which no rank could be left out if one stopped amid an exchange"
    if policy.scope == "bucket":
        return "scope='bucket' decides for each bucket by itself, which goes through host memory"
    if len(devices) > 1:
        return f"the parameters are on {', '.join(sorted(map(str, devices)))}: one GPU for each optimizer"
    (device,) = devices
    gpu, why_not = gpu_of(device, place.config)
    if why_not:
        return why_not
    means, why_not = means_of(gpu, place.config, place.engine.takes_device_memory)
    if why_not:
        return why_not
    if place.engine.device is None:
        place.engine.use_device(gpu, means, journal_on_device=place.config.journal == "device")
    return "" if place.engine.device is gpu else "another optimizer of this rank is on another GPU"
