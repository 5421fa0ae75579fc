"""Whether the gradients of an optimizer go from GPU to GPU (NCCL or CUDA-aware MPI), or through host memory.

Where they can, the engine gets them where they are, and all ranks that can form a group: csrc/control/device_groups.h.
What a group cannot serve, or not yet, goes through host memory all the same, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_backup.config import Config
from hvd_backup.context import Context
from hvd_backup.errors import ConfigError
from hvd_backup.policy import Policy
from hvd_backup.torch import staging

__all__ = ["engage", "means_of"]


def engage(place: Context, policy: Policy, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether the engine is to get the gradients of these parameters on their GPU, which it uses from now on.

    Raises:
        ConfigError: they cannot be exchanged between GPUs, but HVD_BACKUP_DATA_PLANE asks for it.
    """
    plane = place.config.data_plane
    if plane == "host" or place.size == 1:
        return False
    why_not = _why_not(place, policy, parameters)
    if why_not and plane != "auto":
        raise ConfigError(
            f"HVD_BACKUP_DATA_PLANE={plane} on rank {place.rank}: {why_not}. "
            "With 'auto' or 'host' gradients go through host memory"
        )
    return not why_not


def means_of(device: torch.device, config: Config, mpi_takes_gpu_memory: bool) -> tuple[str, str]:
    """By what data can go from this device to others' GPUs, "nccl" or "mpi", and why not; one of them is empty."""
    transfers = staging.transfers_of(device)
    if transfers is None:
        return "", "the parameters are on the CPU"
    gpu = transfers.engine_device(config.nccl_library)
    if gpu is None:
        return "", "hvd_backup was built without the GPU library (nvcc)"
    reasons = {
        "nccl": str(gpu.why_no_groups),
        "mpi": "" if mpi_takes_gpu_memory else "MPI says that it does not take GPU memory (is not CUDA-aware)",
    }
    asked_for = [config.data_plane] if config.data_plane in reasons else list(reasons)
    for means in asked_for:
        if not reasons[means]:
            return means, ""
    return "", "; ".join(reasons[means] for means in asked_for)


def _why_not(place: Context, policy: Policy, parameters: Sequence[torch.Tensor]) -> str:
    if not policy.may_leave_out:
        return "without backup workers, of which no rank could be left out if one stopped amid an exchange"
    if policy.scope == "bucket":
        return "scope='bucket' decides for each bucket by itself, which goes through host memory"
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        return f"the parameters are on {', '.join(sorted(map(str, devices)))}: one GPU for each optimizer"
    (device,) = devices
    means, why_not = means_of(device, place.config, place.engine.takes_device_memory)
    if why_not:
        return why_not
    transfers = staging.transfers_of(device)
    assert transfers is not None
    gpu = transfers.engine_device(place.config.nccl_library)
    if place.engine.device is None:
        place.engine.use_device(gpu, means, journal_on_device=place.config.journal == "device")
    return "" if place.engine.device is gpu else "another optimizer of this rank is on another GPU"
