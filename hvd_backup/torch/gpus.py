"""The GPUs that PyTorch can use, in words: for `hvd-backup check`."""

import functools
from collections import Counter

import torch

from hvd_backup import data_plane
from hvd_backup.torch.data_plane import gpu_of
from hvd_backup.torch.horovod_names import HOROVOD

__all__ = ["facts"]


def facts() -> list[tuple[str, str]]:
    """What there is, and in words what it is: the GPUs, and how gradients on them travel."""
    if not torch.cuda.is_available():
        return [("GPU", "none that PyTorch can use")]
    device = torch.device("cuda", torch.cuda.current_device())
    travel = data_plane.in_words(functools.partial(gpu_of, device))
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    packed = "one launch of the GPU library" if data_plane.library() else "PyTorch's operations: built without nvcc"
    return [
        ("GPU", ", ".join(f"{count} x {name}" for name, count in names.items())),
        ("GPU gradients", f"{travel}; buckets packed by {packed}"),
        ("GPU, b = 0", "Horovod's own optimizer" if HOROVOD.usable() else "the same: Horovod cannot be used"),
    ]
