"""What the tests of hvd_backup.torch share: a small model, data by rank, digests, and the decisions of a trace."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers with 163 weights; the same for equal seeds."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)


def batch(rank: int, step: int, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [size, 6] and targets [size, 3], a pure function of rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x.sum(1), x[:, 0] * x[:, 1], x.abs().amax(1)], 1).to(dtype)


def loss_of(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean squared error."""
    return torch.nn.functional.mse_loss(model(data[0]), data[1])


def digest(model: torch.nn.Module, optimizer: Any = None) -> str:
    """SHA-256 of the weights and, if given, of the optimizer's state and hyperparameters, bit for bit."""
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        for key, value in sorted(optimizer.state[parameter].items()) if optimizer is not None else ():
            sha.update(key.encode())
            sha.update(
                value.cpu().contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else pickle.dumps(value)
            )
    for group in optimizer.param_groups if optimizer is not None else ():
        sha.update(repr(sorted((key, value) for key, value in group.items() if key != "params")).encode())
    return sha.hexdigest()


class Unsized:
    """An iterable without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def decisions(trace: Path, channel: str = "optimizer.0") -> list[dict[str, Any]]:
    """The decisions of a channel, in the order in which they were made."""
    records = [json.loads(line) for line in trace.read_text().splitlines()]
    return [record for record in records if record["event"] == "decision" and record["channel"] == channel]
