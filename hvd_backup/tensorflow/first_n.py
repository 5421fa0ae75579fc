"""first_n_allreduce on TensorFlow tensors, one or a list, eagerly and inside tf.function, with gradients.

Each name and signature is a channel of the engine, opened when it is first called eagerly or traced. Inside a
tf.function a collective without a name is one of its own: two of them may run at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_backup import _core, context
from hvd_backup.context import Context
from hvd_backup.errors import UsageError
from hvd_backup.first_n import DTYPE_BYTES, ReduceOp, contributors_wanted
from hvd_backup.policy import journal_depth
from hvd_backup.tensorflow.library import ops, refuse_xla
from hvd_backup.tensorflow.streams import Stream

__all__ = ["FirstN", "dense", "first_n_allreduce", "reduce"]


class FirstN(NamedTuple):
    """Outcome of a first-N allreduce: the result (a tensor, or a list), and the ranks whose tensors it holds."""

    result: Any
    contributors: Any


def first_n_allreduce(
    tensor: Any,
    n: int | None = None,
    name: str | None = None,
    op: ReduceOp = ReduceOp.AVERAGE,
    *,
    backup_workers: int | None = None,
    sparse_as_dense: bool = False,
) -> FirstN:
    """Mean or sum over the first `n` ranks to arrive, the same on all ranks; nobody waits for the others.

    The k-th call under a name on each rank is the k-th collective. A rank that comes too late gets the result that the
    others have already computed, without its own tensor. The gradient is the same reduction of the gradients, zero on
    ranks that came too late.

    Args:
        tensor: float16, bfloat16, float32, float64, int32 or int64, or a list of such: one decision for all of them.
            Shapes and dtypes are equal on all ranks, and inside tf.function known when it is traced.
        n: how many contributors to wait for, 1 to size.
        name: of the collective; without one, calls are matched by their order in the program.
        op: Average (over the contributors; integers: floor of the exact mean) or Sum.
        backup_workers: in place of n: size - n. Without both, HVD_BACKUP_BACKUP_WORKERS counts; without that, n = size.
        sparse_as_dense: a tf.IndexedSlices is made dense; otherwise it is refused.

    Returns:
        result: as `tensor`; contributors: int32 tensor [contributors], ascending.

    Raises:
        UsageError: a dtype, shape, n or op that cannot be used.
        HvdBackupError: ranks differ in what they call; or the engine has failed.
    """
    here = context.current()
    wanted = contributors_wanted(n, backup_workers, here.size, here.default_backup_workers)
    several = isinstance(tensor, (list, tuple))
    given = [dense("first_n_allreduce", each, sparse_as_dense) for each in (tensor if several else [tensor])]
    results, contributors = reduce("first_n_allreduce", given, wanted, name, op)
    return FirstN(results if several else results[0], contributors)


def dense(operation: str, tensor: Any, sparse_as_dense: bool) -> Any:
    """`tensor` as a dense one."""
    if isinstance(tensor, tf.IndexedSlices) and not sparse_as_dense:
        raise UsageError(
            f"{operation} of a tf.IndexedSlices (the gradient of an embedding, say): give sparse_as_dense=True, or "
            "make it dense with tf.convert_to_tensor"
        )
    return tf.convert_to_tensor(tensor)


def reduce(
    operation: str, tensors: Sequence[Any], required: int, name: str | None, op: ReduceOp
) -> tuple[list[Any], Any]:
    """Results and contributors; see `first_n_allreduce`."""
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{operation}: name={name!r}, expected a str")
    if op not in (ReduceOp.AVERAGE, ReduceOp.SUM):
        raise UsageError(f"{operation}: op={op!r} is not supported, only Average and Sum")
    refuse_xla()
    line = _collectives_of(context.current()).line(operation, tensors, required, name, ReduceOp(op))
    results, contributors = ops().hvd_backup_first_n(list(tensors), stream=line.stream.number)
    if op == ReduceOp.AVERAGE:  # the engine sums integers exactly
        count = tf.size(contributors)
        results = [
            tf.math.floordiv(result, tf.cast(count, result.dtype)) if result.dtype.is_integer else result
            for result in results
        ]
    return list(results), contributors


@dataclass
class _Line:
    """One channel and its stream."""

    operation: str
    required: int
    op: ReduceOp
    name: str | None
    channel: _core.Channel
    stream: Stream


@dataclass
class _Collectives:
    """The collectives of one init()."""

    place: weakref.ref[Context]
    lines: dict[tuple[Any, ...], _Line] = field(default_factory=dict)
    by_number: dict[int, _Line] = field(default_factory=dict)
    traced: int = 0

    def line(self, operation: str, tensors: Sequence[Any], required: int, name: str | None, op: ReduceOp) -> _Line:
        """That of an eager call, or of an op that is being traced."""
        signature = tuple((each.dtype.name, _shape(operation, each)) for each in tensors)
        for dtype, shape in signature:
            if dtype not in DTYPE_BYTES:
                known = ", ".join(DTYPE_BYTES)
                raise UsageError(f"{operation}: dtype {dtype} is not supported, only {known}: convert the tensor")
            if 0 in shape:
                raise UsageError(f"{operation}: a tensor of shape {shape} has no element")
        own = ""
        if name is None and not tf.executing_eagerly():
            self.traced += 1
            own = f"[traced {self.traced}]"
        key = (operation, name, own, signature, required, op)
        if key not in self.lines:
            self.lines[key] = self._open(key)
            self.by_number[self.lines[key].stream.number] = self.lines[key]
        return self.lines[key]

    def _open(self, key: tuple[Any, ...]) -> _Line:
        operation, name, own, signature, required, op = key
        place = self.place()
        assert place is not None
        index = sum(1 for known in self.lines if known[:3] == (operation, name, own))
        sizes = [int(tf.TensorShape(shape).num_elements() or 1) for _, shape in signature]
        nbytes = [size * DTYPE_BYTES[dtype] for size, (dtype, _) in zip(sizes, signature, strict=True)]
        told = "\n".join(f"dtype {dtype} shape {shape}" for dtype, shape in signature)
        channel = place.engine.open(
            name=f"tensorflow.{operation}{own}[{index}]" + ("" if name is None else f":{name}"),
            kind="collective",
            description=f"{told}\nn {required}\nop {op.name.lower()}",
            proposal=b"",
            required=required,
            max_lag=journal_depth(sum(nbytes), place.size, place.config.journal_bytes),
            average=op is ReduceOp.AVERAGE,
        )
        channel.set_layout(
            [(size, dtype) for size, (dtype, _) in zip(sizes, signature, strict=True)], [0] * len(signature)
        )
        return _Line(operation, required, op, name, channel, Stream(place, channel, [(size, 0, 0) for size in nbytes]))


_all: weakref.WeakKeyDictionary[Context, _Collectives] = weakref.WeakKeyDictionary()


def _collectives_of(place: Context) -> _Collectives:
    if place not in _all:
        _all[place] = _Collectives(weakref.ref(place))
    return _all[place]


def _shape(operation: str, tensor: Any) -> tuple[int, ...]:
    if not tensor.shape.is_fully_defined():
        raise UsageError(
            f"{operation}: a tensor has shape {tensor.shape} when the function is traced, but all ranks have to know "
            "it: say it with tf.ensure_shape(tensor, shape), or call outside of tf.function"
        )
    return tuple(tensor.shape)


@tf.RegisterGradient("HvdBackupFirstN")
def _gradient(operation: Any, *gradients: Any) -> list[Any]:
    """The same reduction of the gradients; zero where this rank did not contribute."""
    here = context.current()
    line = _collectives_of(here).by_number[operation.get_attr("stream")]
    given = [
        tf.zeros_like(tensor) if gradient is None else tf.convert_to_tensor(gradient)
        for tensor, gradient in zip(operation.inputs, gradients[:-1], strict=True)
    ]
    name = None if line.name is None else f"{line.name}.gradient"
    results, _ = reduce(f"gradient of {line.operation}", given, line.required, name, line.op)
    if line.required == here.size:
        return results
    contributed = tf.reduce_any(tf.equal(operation.outputs[-1], here.rank))
    return [tf.where(contributed, result, tf.zeros_like(result)) for result in results]
