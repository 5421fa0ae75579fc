"""Training in which computing is sleeping: what step_perf.py and stopped_rank_perf.py run.

The model is a stack of weights; a step sleeps for the time that forward and backward pass would take, and its
backward pass then yields all gradients at once: nothing of the communication can hide behind computing, which is the
hardest case. Sleeping ranks leave the cores to those that communicate, so a small machine behaves like several.

Rank r's gradient is 2^r in every element, so the weights after training prove, through the mean over the contributors
of each update, who contributed to what: `verify` recomputes them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

import hvd_backup.torch as hvd
import measurement

Contributors = tuple[tuple[int, ...], ...]  # ranks, for each scope of an update

LAYERS = 8
RATE = 2.0**-20  # a power of two: the updates stay exact in float32 for long, and small


@dataclass(frozen=True)
class StepRecord:
    """One iteration on one rank; times in seconds on rank 0's clock."""

    step: int  # the update that the gradient was computed for
    began: float  # computing began: the iteration before had returned
    ready: float  # all gradients computed
    ended: float  # optimizer.step() returned
    contributed: bool
    caught_up: int  # missed updates that were applied in this iteration


class ConstantGradient(torch.autograd.Function):
    """Passes its input through; the weight's gradient is a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, value: float) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0], torch.full_like(weight, ctx.value), None


class SimulatedTraining:
    """One optimizer on a model of `model_mib` MiB of float32, on all ranks of MPI.COMM_WORLD."""

    def __init__(self, model_mib: float, compute_s: float, **options: Any) -> None:
        """options: those of DistributedOptimizer (backup_workers, scope, arrive, max_lag)."""
        self.comm = MPI.COMM_WORLD
        self.compute_s = compute_s
        elements = max(1, int(model_mib * 2**20 / 4 / LAYERS))
        self.weights = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(LAYERS)]
        named = [(f"layer{index}", weight) for index, weight in enumerate(self.weights)]
        self.plain = torch.optim.SGD(self.weights, lr=RATE)
        self.optimizer = hvd.DistributedOptimizer(self.plain, named_parameters=named, **options)
        self.updates: list[Contributors] = []  # of every update, as this rank applied them
        self.optimizer.on_update(lambda update: self.updates.append(update.by_scope))
        self.clock = measurement.clock_of_rank_zero(self.comm)

    def backward(self) -> None:
        x = torch.zeros(1, requires_grad=True)
        for weight in self.weights:
            x = ConstantGradient.apply(x, weight, 2.0**self.comm.rank)  # type: ignore[no-untyped-call]
        x.sum().backward()  # type: ignore[no-untyped-call]

    def run(self, steps: int, extra_s: Callable[[int], float]) -> list[StepRecord]:
        """Trains until global step `steps`. `extra_s(step)`: how much longer this rank computes at that step."""
        records: list[StepRecord] = []
        measurement.quiet_barrier(self.comm)
        began = self.clock()
        for step in hvd.follow(range(steps), self.optimizer):
            time.sleep(self.compute_s)
            if extra := extra_s(step):
                time.sleep(extra)
            self.optimizer.zero_grad()
            self.backward()
            ready = self.clock()
            before = len(self.updates)
            self.optimizer.step()
            ended = self.clock()
            mine = len(self.updates) == step + 1 and all(self.comm.rank in scope for scope in self.updates[step])
            records.append(StepRecord(step, began, ready, ended, mine, len(self.updates) - before - mine))
            began = ended
        return records

    def verify(self, steps: int, required: int) -> None:
        """Raises unless all that are left applied the same `steps` updates, each of `required` contributors."""
        digest = hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in self.weights)).hexdigest()
        seen = hvd.allgather_object((digest, self.updates))
        if any(other != seen[0] for other in seen):
            raise AssertionError(f"ranks differ in weights or history: {[(d[:8], len(u)) for d, u in seen]}")
        fewest = min((len(ranks) for update in self.updates for ranks in update), default=0)
        if len(self.updates) != steps or fewest < required:
            raise AssertionError(
                f"{len(self.updates)} updates with at least {fewest} contributors, "
                f"expected {steps} updates with at least {required}"
            )
        by_scope = zip(*self.updates, strict=True)
        expected = [-RATE * sum(sum(2.0**r for r in ranks) / len(ranks) for ranks in scope) for scope in by_scope]
        for weight in self.weights:
            if not any(torch.allclose(weight, torch.tensor(value), rtol=1e-4, atol=0.0) for value in expected):
                raise AssertionError(f"a wrong mean was applied: weights {weight.detach()[:3]}..., expected {expected}")
