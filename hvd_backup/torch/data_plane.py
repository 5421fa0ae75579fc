"""The GPU that PyTorch's parameters are on, for hvd_backup/data_plane.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_backup import data_plane
from hvd_backup.config import Config
from hvd_backup.context import Context
from hvd_backup.policy import Policy
from hvd_backup.torch import staging

__all__ = ["engage", "gpu_of"]


def engage(place: Context, policy: Policy, parameters: Sequence[torch.Tensor]) -> bool:
    """See hvd_backup.data_plane.engage."""
    return data_plane.engage(place, policy, (parameter.device for parameter in parameters), gpu_of)


def gpu_of(device: torch.device, config: Config) -> data_plane.Gpu:
    """The GPU as the engine uses it, or None and why it cannot."""
    transfers = staging.transfers_of(device)
    if transfers is None:
        return None, data_plane.ON_THE_CPU
    return transfers.engine_device(config.nccl_library)
