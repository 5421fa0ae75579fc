"""DistributedOptimizer: makes any Keras 3 optimizer one that applies the mean of the first gradients to arrive.

The arguments are Horovod's (horovod/keras/__init__.py and horovod/tensorflow/keras/__init__.py, 0.28.1), and then ours.
The given optimizer itself becomes distributed: its class gets a derived one with the methods of DistributedApply in
front. A model that is saved with it can be loaded without hvd_backup.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import keras

from hvd_backup import context
from hvd_backup.applied import AppliedUpdate
from hvd_backup.beside_horovod import is_global
from hvd_backup.errors import ConfigError, UsageError
from hvd_backup.first_n import ReduceOp
from hvd_backup.keras.backend import Compression, Updates
from hvd_backup.keras.updates import KerasUpdates, UpdateOptions
from hvd_backup.policy import Policy
from hvd_backup.training import Training

__all__ = ["DistributedApply", "DistributedOptimizer"]


class DistributedApply:
    """What is put in front of the wrapped optimizer's class. Its own state is in `_exchange` alone."""

    _exchange: KerasUpdates

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Applies the update that these gradients are part of, and before it all that this rank has missed.

        Call it through compile() and fit(), or yourself, with TensorFlow eagerly or inside tf.function.
        """
        if len(grads) == 0:
            return
        this: Any = self
        if trainable_variables is None and not this.built:
            raise UsageError("apply(gradients) before the optimizer was built: give the variables, too")
        variables = list(trainable_variables or this._trainable_variables)
        self._updates_of(variables).exchange(list(grads), variables)

    def _updates_of(self, variables: list[Any]) -> KerasUpdates:
        """What exchanges gradients of these variables, with which the optimizer is built if it was not."""
        this: Any = self
        if not this.built:
            with keras.name_scope(this.name):
                this.build(variables)
        return self._exchange

    def finalize_variable_values(self, var_list: Any) -> None:
        """Called at the end of fit(): the ranks end it at the same update, with equal weights."""
        self.training.check_usable()
        self.training.end_plain_steps("the end of fit()")
        super().finalize_variable_values(var_list)  # type: ignore[misc]  # the wrapped optimizer's

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_scale_factor" and value is None:  # only the constructor of LossScaleOptimizer does this
            raise UsageError(
                "LossScaleOptimizer around a DistributedOptimizer (compile() makes one with mixed_float16): a rank "
                "whose own gradients overflow would not take part. Wrap it the other way round: "
                "hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...)"
            )
        super().__setattr__(name, value)

    # --- beyond Horovod ---

    @property
    def training(self) -> Training:
        """For `follow`."""
        return self._exchange.training

    @property
    def samples(self) -> float:
        """The weight of this rank's gradients in the mean; 1 unless you set it. The next apply() uses it."""
        return self.training.samples

    @samples.setter
    def samples(self, value: float) -> None:
        self.training.samples = value

    def metrics(self, **scalars: Any) -> None:
        """Sends scalars along with the next gradients; `last_update.metrics` then has their means, on every rank.

        Call it before apply(), in a train_step or a loop of your own; with TensorFlow in the same tf.function. The
        names are fixed at the first apply(), and must be equal on all ranks. NaN means that this rank has no number.
        """
        self._exchange.metrics(scalars)

    def on_update(self, fn: Callable[[AppliedUpdate], object]) -> None:
        """Runs fn(update) after every update that this rank applies, also those that it has missed.

        Args:
            fn: must do the same on every rank, given the same update (a moving average of the weights, say). An
                exception in it ends the training. With TensorFlow it is called eagerly from within the graph, so it
                must be there before the first apply().
        """
        self._exchange.on_update(fn)

    @property
    def last_update(self) -> AppliedUpdate:
        """The newest update that this rank has applied, and what became of the gradient of the last apply()."""
        return self.training.last_update

    @property
    def global_step(self) -> int:
        """Updates behind these weights, those before a checkpoint included. Equal weights, equal global step."""
        return self.training.global_step

    @property
    def aligned(self) -> bool:
        """Within `follow(..., align_every=k)`: all ranks meet at this step, and may call full collectives."""
        return self.training.aligned()

    def counters(self) -> dict[str, int]:
        """contributed, dropped: gradients of this rank; caught_up: updates applied without its gradient; resynced:
        updates not applied, but taken over from another rank."""
        return self.training.counters()

    # --- what the updates ask for ---

    def _apply_update(self, gradients: list[Any], variables: list[Any]) -> None:
        super().apply(gradients, variables)  # type: ignore[misc]  # the wrapped optimizer's

    def _learning_rate_variable(self) -> Any:
        this: Any = self
        rate = getattr(this, "inner_optimizer", this)._learning_rate
        return rate if isinstance(rate, keras.Variable) else None

    def _known_variables(self) -> list[Any]:
        this: Any = self
        return list(this._trainable_variables) if this.built else []

    def _own_variables(self) -> list[Any]:
        this: Any = self
        inner = getattr(this, "inner_optimizer", None)
        return [*this.variables, *(inner.variables if inner is not None else ())]


def DistributedOptimizer(  # noqa: N802
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = ReduceOp.AVERAGE,
    *,
    num_groups: int = 0,
    groups: Any = None,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    backup_workers: int | float | str | None = None,
    min_contributors: int | None = None,
    policy: str | None = None,
    grace: float | None = None,
    max_misses: int | None = None,
    max_staleness: int | None = None,
    max_lag: int | str | None = None,
    on_max_lag: str | None = None,
    scope: str | None = None,
    arrive: str | None = None,
    nonfinite: str | None = None,
) -> Any:
    """Makes a Keras optimizer apply the mean gradient over the first ranks to arrive.

    Make it on all ranks, with the same arguments, after init(), and give it to compile() or call its apply(). All ranks
    must begin with the same weights (`callbacks.BroadcastGlobalVariablesCallback`, `broadcast_variables`).

    Args:
        optimizer: any keras.optimizers.Optimizer; a LossScaleOptimizer, too. It is changed in place. With the global
            dtype policy mixed_float16 it is put into a LossScaleOptimizer first, as compile() would do.
        compression: Compression.none; Compression.fp16 sends float16.
        sparse_as_dense: sends gradients of embeddings (tf.IndexedSlices) as dense tensors; otherwise they are refused.
            With PyTorch they are dense.
        gradient_predivide_factor: with Average: gradients are divided by it before the mean and multiplied afterwards.
        op: Average; or Sum: the mean times the number of ranks, so that who is late does not change the scale.
        backward_passes_per_step: 1; Keras accumulates gradients itself: optimizer(gradient_accumulation_steps=k).
        name, device_dense, device_sparse, average_aggregated_gradients, num_groups, groups, scale_local_gradients:
            Horovod's; they change nothing here.
        process_set: None; in place of it give init() a communicator.
        backup_workers, min_contributors, policy, grace, max_misses, max_staleness, max_lag, on_max_lag, scope, arrive,
            nonfinite: see hvd_backup.torch.DistributedOptimizer. Left at None they come from the environment
            (HVD_BACKUP_*). nonfinite="drop" not with a LossScaleOptimizer.

    Returns:
        The given optimizer, or the LossScaleOptimizer around it.

    Raises:
        UsageError, ConfigError: an argument or an optimizer that cannot be used.
        NotInitializedError: before init().
    """
    place = context.current()
    _check(optimizer, op, backward_passes_per_step, process_set)
    factor = float(gradient_predivide_factor)
    if not 0 < factor < float("inf") or (factor != 1.0 and op != ReduceOp.AVERAGE):
        raise ConfigError(
            f"gradient_predivide_factor={gradient_predivide_factor!r}: expected a number above 0, and op=Average"
        )
    rules = Policy.resolve(
        place.config,
        place.size,
        backup_workers=backup_workers,
        min_contributors=min_contributors,
        policy=policy,
        grace=grace,
        max_misses=max_misses,
        max_staleness=max_staleness,
        max_lag=max_lag,
        on_max_lag=on_max_lag,
        scope=scope,
        arrive=arrive,
        nonfinite=nonfinite,
    )
    if rules.late != "drop":
        raise ConfigError(f'late="{rules.late}" is not there for Keras optimizers: leave it at "drop"')
    scaled = keras.optimizers.LossScaleOptimizer
    if keras.config.dtype_policy().name == "mixed_float16" and not isinstance(optimizer, scaled):
        optimizer = scaled(optimizer)
    if rules.nonfinite == "drop" and isinstance(optimizer, scaled):
        raise ConfigError(
            'nonfinite="drop" with a LossScaleOptimizer (mixed_float16 makes one): it lowers its scale when it finds '
            "Inf in a mean gradient, but a gradient with Inf is left out of the mean, so the scale would only grow. "
            "Leave nonfinite out: an update that holds Inf is then skipped on every rank; or use mixed_bfloat16"
        )
    own = type(optimizer)
    options = UpdateOptions(
        bucket_bytes=place.config.bucket_bytes,
        prescale=1.0 / factor,
        postscale=float(place.size) if op == ReduceOp.SUM else factor,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        description=(
            f"optimizer {own.__name__} {_settings(optimizer)}",
            f"op {ReduceOp(op).name.lower()}",
            f"compression {getattr(compression, '__name__', compression)}",
            f"gradient_predivide_factor {factor}",
            f"bucket_bytes {place.config.bucket_bytes}",
        ),
    )
    optimizer.__class__ = type(own.__name__, (DistributedApply, own), {"__module__": own.__module__})
    optimizer.__dict__["_exchange"] = Updates(place, rules, options, optimizer)
    optimizer.training.global_step = int(optimizer.iterations)
    return optimizer


def _check(optimizer: Any, op: Any, backward_passes_per_step: int, process_set: Any) -> None:
    """Raises unless these can be used."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UsageError(f"DistributedOptimizer({type(optimizer).__name__}): expected a keras.optimizers.Optimizer")
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, DistributedApply) or isinstance(inner, DistributedApply):
        raise UsageError("DistributedOptimizer was given an optimizer that is one already: wrap a plain one, once")
    if op not in (ReduceOp.AVERAGE, ReduceOp.SUM):
        raise ConfigError(f"op={op!r}: expected hvd.Average or hvd.Sum")
    if not is_global(process_set):
        raise ConfigError("process_set: give init() a communicator of the ranks that work together in place of it")
    if backward_passes_per_step != 1:
        raise ConfigError(
            f"backward_passes_per_step={backward_passes_per_step}: Keras accumulates gradients itself: give the "
            f"optimizer gradient_accumulation_steps={backward_passes_per_step}"
        )


def _settings(optimizer: Any) -> str:
    """The hyperparameters that must be equal on all ranks: all but the name, and a learning rate that travels."""
    config = optimizer.get_config()
    config.pop("name", None)
    inner = config.pop("inner_optimizer", None)
    for settings in (config, inner["config"] if inner else {}):
        settings.pop("name", None)
        if isinstance(settings.get("learning_rate"), (int, float)):
            settings.pop("learning_rate")
    return json.dumps([config, inner and inner["config"]], sort_keys=True, default=str)
