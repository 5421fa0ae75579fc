"""DistributedOptimizer: makes any torch optimizer one whose step() applies the mean of the first gradients to arrive.

The name and the arguments are Horovod's (horovod/torch/optimizer.py, 0.28.1), and then ours. The wrapped optimizer
becomes an object of a class derived from its own, so that isinstance, learning-rate schedulers and GradScaler see what
they expect.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hvd_backup import context
from hvd_backup.errors import ConfigError
from hvd_backup.first_n import ReduceOp
from hvd_backup.policy import Policy
from hvd_backup.torch import checks
from hvd_backup.torch.compression import Compression, NoneCompressor
from hvd_backup.torch.exchange import ExchangeOptions, GradientExchange
from hvd_backup.torch.horovod_names import HOROVOD
from hvd_backup.torch.optimizer import DistributedStep

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(  # noqa: N802
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[NoneCompressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = ReduceOp.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    backup_workers: int | float | str | None = None,
    min_contributors: int | None = None,
    policy: str | None = None,
    grace: float | None = None,
    max_misses: int | None = None,
    max_staleness: int | None = None,
    late: str | None = None,
    max_lag: int | str | None = None,
    on_max_lag: str | None = None,
    scope: str | None = None,
    arrive: str | None = None,
    nonfinite: str | None = None,
    gradient_as_bucket_view: bool = False,
) -> Any:
    """Wraps a torch optimizer: its step() applies the mean gradient over the first ranks to arrive.

    Make it on all ranks, with the same arguments, after init(); use the returned optimizer in place of the given one.
    All ranks must begin with the same weights (`broadcast_parameters`).

    Args:
        optimizer: any torch.optim.Optimizer that applies gradients when step() is called without a closure.
        named_parameters: `model.named_parameters()`; names make errors readable.
        compression: Compression.none; Compression.fp16 sends float16; or a class like them that keeps shapes.
        backward_passes_per_step: how many backward passes accumulate into p.grad before it is handed over.
        op: Average; or Sum: the mean times the number of ranks, so that who is late does not change the scale. The
            others (Adasum, Min, Max, Product) need Horovod, and no backup workers.
        gradient_predivide_factor: with Average: gradients are divided by it before the mean and multiplied afterwards.
        groups: what is sent together, in place of buckets of HVD_BACKUP_BUCKET_BYTES: how many groups, or a list of
            lists of parameters. num_groups: its older name.
        sparse_as_dense: sparse gradients are always sent dense and are sparse again when they are applied, so this
            changes nothing; with Horovod's own it does.
        process_set: Horovod's; without backup workers. In place of it give init() a communicator.
        backup_workers: b: an update waits for n - b ranks. An int, a fraction of the number of ranks n, or "auto": N
            is chosen while the run goes on, from how fast the ranks are and how noisy the gradients.
        min_contributors: with "auto": N is never below it; 0: half of the ranks, rounded up.
        policy: "synchronous" (b = 0), "backup" (b > 0) or "auto".
        grace: seconds after the (n - b)-th arrival during which others still count.
        max_misses: a rank that was left out this many times in a row is waited for; 0: never.
        max_staleness: 0.
        late: what becomes of a gradient that came too late: "drop", or "carry": it is added to this rank's next one.
        max_lag: how many updates are kept for ranks that are behind, or "auto".
        on_max_lag: "resync": a rank that is further behind takes over the weights, the optimizer's state and the rest
            (`optimizer.resync_also`) of another one, and nobody waits for it; "wait": the others wait.
        scope: "step": one set of contributors for all gradients; "bucket": one for each bucket.
        arrive: a rank counts as there when its "first" or its "last" bucket is ready.
        nonfinite: "pass"; or "drop": a gradient that holds NaN or Inf counts as late, with b = 0 too: the update is
            made of the others', without waiting for N of them, and this rank applies it; without any of the others
            (all are non-finite) the step ends, and nothing is applied. Arrives "last"; not with a GradScaler.
        gradient_as_bucket_view: p.grad lies in the buffer that is sent: no copy, and zero_grad() never sets None.

    Options left at None come from the environment (HVD_BACKUP_*).

    Without backup workers, what only Horovod can do (other ops, process sets) is done by Horovod's own
    DistributedOptimizer; and parameters on a GPU are its own, too, if Horovod is installed. It knows nothing of what
    this one has beyond Horovod. Otherwise gradients on a GPU go through pinned host memory.

    Returns:
        An object of a class derived from the optimizer's own, with its state.

    Raises:
        UsageError, ValueError: an argument, a parameter or an optimizer that cannot be used.
        NotInitializedError: before init().
    """
    place = context.current()
    checks.check_optimizer(optimizer)
    reduction = checks.reduce_op(op)
    if gradient_predivide_factor != 1.0 and reduction != ReduceOp.AVERAGE:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    rules = Policy.resolve(
        place.config,
        place.size,
        backup_workers=backup_workers,
        min_contributors=min_contributors,
        policy=policy,
        grace=grace,
        max_misses=max_misses,
        max_staleness=max_staleness,
        late=late,
        max_lag=max_lag,
        on_max_lag=on_max_lag,
        scope=scope,
        arrive=arrive,
        nonfinite=nonfinite,
    )
    needed = checks.needs_horovod(optimizer, reduction, process_set)
    only_sums = rules.backup_workers == 0 and rules.nonfinite != "drop"
    if not needed and only_sums and checks.is_on_gpu(optimizer) and HOROVOD.usable():
        needed = "a parameter on a GPU"  # which Horovod's reaches without the detour over the host
    if needed:
        if rules.nonfinite == "drop":
            raise ConfigError(
                f'{needed} cannot be combined with nonfinite="drop", which needs parameters on the CPU or CUDA, op '
                "Average or Sum, and all ranks of init(comm)"
            )
        if rules.backup_workers > 0:
            raise ConfigError(
                f"{needed} cannot be combined with backup_workers={rules.backup_workers}: with backup workers, "
                "parameters are on the CPU or CUDA, op is Average or Sum, and all ranks of init(comm) work together"
            )
        if not HOROVOD.usable():
            raise ConfigError(f"{needed} needs Horovod's own DistributedOptimizer: {HOROVOD.why_not()}")
        return HOROVOD.start().DistributedOptimizer(
            optimizer,
            named_parameters,
            compression=compression,
            backward_passes_per_step=backward_passes_per_step,
            op=int(reduction),
            gradient_predivide_factor=gradient_predivide_factor,
            num_groups=num_groups,
            groups=groups,
            sparse_as_dense=sparse_as_dense,
            **({} if process_set is None else {"process_set": process_set}),
        )
    checks.check_compression(compression, gradient_as_bucket_view)
    passes = checks.positive("backward_passes_per_step", backward_passes_per_step)
    prescale, postscale = checks.scales(reduction, gradient_predivide_factor, place.size)
    named = checks.name_parameters(optimizer, named_parameters)
    options = ExchangeOptions(
        bucket_bytes=place.config.bucket_bytes,
        prescale=prescale,
        postscale=postscale,
        compression=compression,
        groups=checks.group_parameters(num_groups, groups, named),
        bucket_views=gradient_as_bucket_view,
        description=(
            f"optimizer {type(optimizer).__name__} with {len(optimizer.param_groups)} parameter groups",
            f"op {reduction.name.lower()}",
            f"compression {getattr(compression, '__name__', compression)}",
            f"gradient_predivide_factor {gradient_predivide_factor}",
            f"bucket_bytes {place.config.bucket_bytes}",
            f"backward_passes_per_step {passes}",
        ),
    )
    kind: Any = type(type(optimizer).__name__, (DistributedStep, type(optimizer)), {})
    wrapped: DistributedStep = kind.__new__(kind)  # its state is the optimizer's, which is there already
    # `step` is among it when a scheduler was made before; it would lead past our own.
    wrapped.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    wrapped._synchronizes = True
    wrapped._exchange = GradientExchange(place, rules, options, named, wrapped, passes)
    return wrapped
