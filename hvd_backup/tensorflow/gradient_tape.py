"""DistributedGradientTape: a tf.GradientTape whose gradient() is the mean over ranks. Horovod's name and arguments."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_backup import context
from hvd_backup.beside_horovod import is_global
from hvd_backup.errors import ConfigError, UsageError
from hvd_backup.first_n import ReduceOp, contributors_wanted
from hvd_backup.tensorflow.compression import Compression
from hvd_backup.tensorflow.first_n import dense, reduce

__all__ = ["AVERAGED", "DistributedGradientTape"]

AVERAGED = "_hvd_backup_averaged"  # marks the gradients of a tape without optimizer


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
        pairs = zip(tf.nest.flatten(gradients), tf.nest.flatten(sources), strict=True)
        present = [(gradient, source) for gradient, source in pairs if gradient is not None]
        means = iter(self._reduce([gradient for gradient, _ in present], [source for _, source in present]))
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
    optimizer: Any = None,
) -> Any:
    """Makes tape.gradient() return the mean over ranks, eagerly and inside tf.function.

        tape = hvd.DistributedGradientTape(tape)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))

    With backup workers give it the optimizer, too, made by hvd.DistributedOptimizer, which has all the options then:

        optimizer = hvd.DistributedOptimizer(optimizer, backup_workers=1)  # once
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer)      # in each step
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))

    gradient() then is the step: a rank that is late applies all that it has missed, at once, and goes on with the
    newest update; so a rank that is always slow costs the others nothing. gradient() returns the mean of the newest
    update, and has applied it with the optimizer; apply_gradients() sees that, does nothing more, and refuses gradients
    that were changed in between. `hvd.follow(data, optimizer)`, `optimizer.metrics(...)` before gradient(),
    `last_update` and the rest of the optimizer are as without a tape. Where the round is over, nothing is applied, and
    gradient() returns zeros.

    With backup workers, but without the optimizer, the k-th call on each rank is the k-th mean, over the first ranks to
    arrive; a rank that came too late gets it at once, without waiting. The tape knows nothing of what is done with it,
    so it cannot apply what a rank has missed: each rank makes as many calls as the others. That is right for ranks that
    are late at times, and for updates of one's own (weights.assign_sub). A rank that is always slow falls behind; the
    others do not wait for it until HVD_BACKUP_JOURNAL_BYTES are full, but it ends as much later as it is slow, and a
    warning says so.

    Args:
        gradtape: the tape; it is changed in place.
        compression: Compression.none or Compression.fp16.
        sparse_as_dense: tf.IndexedSlices are made dense; otherwise they are refused.
        op: Average or Sum.
        gradient_predivide_factor: with Average: gradients are divided by it before the mean and multiplied afterwards.
        process_set: None.
        device_dense, device_sparse, num_groups, groups, scale_local_gradients: Horovod's; they change nothing.
        backup_workers: b: a mean waits for size - b ranks. None: HVD_BACKUP_BACKUP_WORKERS.
        optimizer: made by hvd.DistributedOptimizer: see above. The other options are then its own, not the tape's.

    Raises:
        UsageError, ConfigError: an argument that cannot be used.
        NotInitializedError: before init().
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
    if optimizer is not None:
        options = {
            "compression": compression is not Compression.none,
            "sparse_as_dense": sparse_as_dense,
            "op": op != ReduceOp.AVERAGE,
            "gradient_predivide_factor": gradient_predivide_factor != 1.0,
            "backup_workers": backup_workers is not None,
        }
        return _reducing(gradtape, _step_of(optimizer, [name for name, given in options.items() if given]))
    required = contributors_wanted(None, backup_workers, here.size, here.default_backup_workers)

    def means(gradients: list[Any], _: list[Any]) -> list[Any]:
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
        results = results if factor == 1.0 else [each * tf.cast(factor, each.dtype) for each in results]
        for result in results:
            setattr(result, AVERAGED, True)
        return results

    return _reducing(gradtape, means)


def _reducing(gradtape: tf.GradientTape, means: Callable[[list[Any], list[Any]], list[Any]]) -> Any:
    """The tape, whose gradient() is from now on means(gradients, sources)."""
    own: Any = gradtape
    own._reduce = means
    kind: Any = type(gradtape)
    own.__class__ = _reducing_kind(kind)
    return own


@functools.cache  # a loop makes a tape in every step
def _reducing_kind(kind: type) -> type:
    return type(kind.__name__, (_ReducingTape, kind), {})


def _step_of(optimizer: Any, options: list[str]) -> Callable[[list[Any], list[Any]], list[Any]]:
    """A step of the optimizer, as a function of gradients and variables that returns the mean gradients.

    options: the names of the tape's options that were given.
    """
    from hvd_backup.keras.tensorflow_updates import GraphUpdates  # which builds on this package

    if not isinstance(getattr(optimizer, "_exchange", None), GraphUpdates):
        raise UsageError(
            f"DistributedGradientTape(optimizer={type(optimizer).__name__}): expected an optimizer made by "
            "hvd.DistributedOptimizer (on Keras's TensorFlow backend): before the loop, "
            "optimizer = hvd.DistributedOptimizer(optimizer, backup_workers=...)"
        )
    if options:
        raise ConfigError(
            f"DistributedGradientTape({'=..., '.join(options)}=..., optimizer=...): with an optimizer its options "
            f"count: hvd.DistributedOptimizer(optimizer, {'=..., '.join(options)}=...)"
        )

    def step(gradients: list[Any], variables: list[Any]) -> list[Any]:
        means: list[Any] = optimizer._updates_of(variables).apply_and_show(gradients, variables)
        return means

    return step


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
                    "that they make. Let it apply at once all that it has missed: before the loop, optimizer = "
                    "hvd.DistributedOptimizer(optimizer, backup_workers=...), and in it "
                    "hvd.DistributedGradientTape(tape, optimizer=optimizer)",
                    stacklevel=2,
                )
        return taken

    taken = tf.reduce_any(tf.equal(contributors, here.rank))
    noted = tf.numpy_function(note, [taken], tf.bool)
    with tf.control_dependencies([noted]):
        return [tf.identity(result) for result in results]
