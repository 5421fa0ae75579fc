"""The GPUs that PyTorch can use, in words: for `hvd-backup check`."""

from collections import Counter

import torch

from hvd_backup import context
from hvd_backup.config import Config
from hvd_backup.errors import NotInitializedError
from hvd_backup.torch import data_plane, staging
from hvd_backup.torch.horovod_names import HOROVOD

__all__ = ["facts"]


def _mpi_takes_gpu_memory() -> bool:
    try:
        return context.current().engine.takes_device_memory
    except NotInitializedError:
        return False


def _data_plane() -> str:
    config = Config.from_environment()
    if config.data_plane == "host":
        return "through pinned host memory (HVD_BACKUP_DATA_PLANE=host)"
    device = torch.device("cuda", torch.cuda.current_device())
    means, why_not = data_plane.means_of(device, config, _mpi_takes_gpu_memory())
    if why_not:
        return f"through pinned host memory: {why_not}"
    transfers = staging.transfers_of(device)
    assert transfers is not None
    nccl = f"NCCL {transfers.engine_device(config.nccl_library).nccl_version}"
    kept = "on the GPU" if config.journal == "device" else "in page-locked host memory"
    return f"from GPU to GPU, by {'CUDA-aware MPI' if means == 'mpi' else nccl}; kept for late ranks {kept}"


def facts() -> list[tuple[str, str]]:
    """What there is, and in words what it is: the GPUs, and how gradients on them travel."""
    if not torch.cuda.is_available():
        return [("GPU", "none that PyTorch can use")]
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    packed = "one launch of the GPU library" if staging.library() else "PyTorch's operations: built without nvcc"
    return [
        ("GPU", ", ".join(f"{count} x {name}" for name, count in names.items())),
        ("GPU gradients", f"{_data_plane()}; buckets packed by {packed}"),
        ("GPU, b = 0", "Horovod's own optimizer" if HOROVOD.usable() else "the same: Horovod cannot be used"),
    ]
