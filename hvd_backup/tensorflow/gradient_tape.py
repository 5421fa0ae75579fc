"""DistributedGradientTape: a tf.GradientTape whose gradient() is the mean over ranks. Horovod's name and arguments."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from hvd_backup import context
from hvd_backup.errors import ConfigError, UsageError
from hvd_backup.first_n import ReduceOp, contributors_wanted
from hvd_backup.tensorflow.compression import Compression
from hvd_backup.tensorflow.first_n import dense, reduce

__all__ = ["DistributedGradientTape"]


class _ReducingTape:
    """What is put in front of the tape's class."""

    _reduce: Any

    def gradient(
        self, target: Any, sources: Any, output_gradients: Any = None, unconnected_gradients: Any = None
    ) -> Any:
        """As tf.GradientTape's, averaged over ranks."""
        unconnected = unconnected_gradients or tf.UnconnectedGradients.NONE
        own: Any = super()
        gradients = own.gradient(target, sources, output_gradients, unconnected)
        present = [each for each in tf.nest.flatten(gradients) if each is not None]
        means = iter(self._reduce(present))
        return tf.nest.map_structure(lambda each: None if each is None else next(means), gradients)


def DistributedGradientTape(  # noqa: N802
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: int = ReduceOp.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    *,
    backup_workers: int | None = None,
) -> Any:
    """Makes tape.gradient() return the mean over ranks, eagerly and inside tf.function.

        tape = hvd.DistributedGradientTape(tape)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))

    With backup workers the k-th call on each rank is the k-th mean, over the first ranks to arrive; a rank that came
    too late gets it, too, one for each call. So all ranks need equally many calls, and a rank that is always slow falls
    behind until the others wait for it (HVD_BACKUP_JOURNAL_BYTES bounds how far): for that use DistributedOptimizer,
    which applies all that was missed at once.

    Args:
        gradtape: the tape; it is changed in place.
        compression: Compression.none or Compression.fp16.
        sparse_as_dense: tf.IndexedSlices are made dense; otherwise they are refused.
        op: Average or Sum.
        gradient_predivide_factor: with Average: gradients are divided by it before the mean and multiplied afterwards.
        process_set: None.
        device_dense, device_sparse, num_groups, groups, scale_local_gradients: Horovod's; they change nothing.
        backup_workers: b: a mean waits for size - b ranks. None: HVD_BACKUP_BACKUP_WORKERS.
    """
    if not isinstance(gradtape, tf.GradientTape):
        raise UsageError(f"DistributedGradientTape({type(gradtape).__name__}): expected a tf.GradientTape")
    if op not in (ReduceOp.AVERAGE, ReduceOp.SUM) or (gradient_predivide_factor != 1.0 and op != ReduceOp.AVERAGE):
        raise ConfigError(
            f"op={op!r} with gradient_predivide_factor={gradient_predivide_factor}: expected hvd.Average "
            "or hvd.Sum, and the factor with hvd.Average alone"
        )
    if process_set is not None and getattr(process_set, "process_set_id", None) != 0:
        raise ConfigError("process_set: give init() a communicator of the ranks that work together in place of it")
    here = context.current()
    required = contributors_wanted(None, backup_workers, here.size, here.default_backup_workers)

    def means(gradients: list[Any]) -> list[Any]:
        given = [dense("DistributedGradientTape", each, sparse_as_dense) for each in gradients]
        if not given:
            return []
        if gradient_predivide_factor != 1.0:
            given = [each / tf.cast(gradient_predivide_factor, each.dtype) for each in given]
        compressed, told = zip(*(compression.compress(each) for each in given), strict=True)
        results, _ = reduce("gradient_tape", compressed, required, None, ReduceOp.AVERAGE)
        results = [compression.decompress(each, what) for each, what in zip(results, told, strict=True)]
        factor = here.size if op == ReduceOp.SUM else gradient_predivide_factor
        return results if factor == 1.0 else [each * tf.cast(factor, each.dtype) for each in results]

    own: Any = gradtape
    own._reduce = means
    kind: Any = type(gradtape)
    own.__class__ = _reducing(kind)
    return own


@functools.cache  # a loop makes a tape in every step
def _reducing(kind: type) -> type:
    return type(kind.__name__, (_ReducingTape, kind), {})
