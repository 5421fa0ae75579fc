"""DistributedGradientTape: a tf.GradientTape whose gradient() is the mean over ranks. Horovod's name and arguments."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import tensorflow as tf

from hvd_backup import context
from hvd_backup.beside_horovod import is_global
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
    too late gets it at once, without waiting. A tape knows nothing of what is done with its gradients, so it cannot
    apply what a rank has missed: each rank makes as many calls as the others. That is right for ranks that are late at
    times. A rank that is always slow falls behind; the others do not wait for it until HVD_BACKUP_JOURNAL_BYTES are
    full, but it ends as much later as it is slow, and a warning says so. For that leave the tape as it is and use
    DistributedOptimizer, which applies all that was missed within one apply_gradients(), and goes on with the newest.

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
    if not is_global(process_set):
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
        results, contributors = reduce("gradient_tape", compressed, required, None, ReduceOp.AVERAGE)
        if required < here.size:
            results = _watched(here, results, contributors)
        results = [compression.decompress(each, what) for each, what in zip(results, told, strict=True)]
        factor = here.size if op == ReduceOp.SUM else gradient_predivide_factor
        return results if factor == 1.0 else [each * tf.cast(factor, each.dtype) for each in results]

    own: Any = gradtape
    own._reduce = means
    kind: Any = type(gradtape)
    own.__class__ = _reducing(kind)
    return own


LEFT_OUT = 50  # so often in a row a rank is not late at times, but slow

_left_out: weakref.WeakKeyDictionary[context.Context, int] = weakref.WeakKeyDictionary()  # in a row


def _watched(here: context.Context, results: list[Any], contributors: Any) -> list[Any]:
    """The results, and a warning when this rank is always left out."""
    place = weakref.ref(here)

    def note(taken: Any) -> Any:
        now = place()
        if now is not None:
            _left_out[now] = 0 if taken else _left_out.get(now, 0) + 1
            if _left_out[now] == LEFT_OUT:
                warnings.warn(
                    f"rank {now.rank}: the gradients of this rank came too late for the last {LEFT_OUT} calls of "
                    "DistributedGradientTape.gradient(). It falls behind the others, since it has to make every call "
                    "that they make. Use a plain tf.GradientTape and hvd.DistributedOptimizer(optimizer, "
                    "backup_workers=...): its apply_gradients() applies at once all that a rank has missed",
                    stacklevel=2,
                )
        return taken

    taken = tf.reduce_any(tf.equal(contributors, here.rank))
    noted = tf.numpy_function(note, [taken], tf.bool)
    with tf.control_dependencies([noted]):
        return [tf.identity(result) for result in results]


@functools.cache  # a loop makes a tape in every step
def _reducing(kind: type) -> type:
    return type(kind.__name__, (_ReducingTape, kind), {})
