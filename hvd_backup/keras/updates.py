"""The updates of one Keras optimizer, as far as they do not depend on Keras's backend: what is accepted, and agreed on.

Each backend has a class that sends and applies: tensorflow_updates.py within TensorFlow's graph, torch_updates.py with
PyTorch's tensors. What it is not: the optimizer's face (optimizer.py), rounds (hvd_backup/training.py).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np

from hvd_backup.applied import AppliedUpdate
from hvd_backup.errors import UsageError
from hvd_backup.resync import NumpyArrays, PackedState, pack, unpack
from hvd_backup.training import Training

__all__ = ["Appliable", "KerasUpdates", "UpdateOptions", "name_of"]


@dataclass(frozen=True)
class UpdateOptions:
    """How gradients are sent.

    Attributes:
        bucket_bytes: a bucket is closed before it exceeds this.
        prescale, postscale: factors before and after the mean.
        compression: Horovod's interface: compress(tensor) -> (tensor, context), decompress(tensor, context) -> tensor.
        sparse_as_dense: tf.IndexedSlices are sent dense; otherwise refused.
        description: lines that must be equal on all ranks.
    """

    bucket_bytes: int
    prescale: float
    postscale: float
    compression: Any
    sparse_as_dense: bool
    description: tuple[str, ...]


class Appliable(Protocol):
    """The optimizer."""

    def _apply_update(self, gradients: list[Any], variables: list[Any]) -> None:
        """Applies gradients to the variables, as the wrapped optimizer does."""

    def _learning_rate_variable(self) -> Any:
        """The variable whose value travels with updates; None: the learning rate follows from the iterations."""

    def _known_variables(self) -> list[Any]:
        """The trainable variables that it was built with; empty before."""

    def _own_variables(self) -> list[Any]:
        """Its state: momenta, iterations, the learning rate."""


class KerasUpdates(ABC):
    """Owned by its optimizer.

    Attributes:
        training: the optimizer's updates and rounds.
    """

    training: Training

    def __init__(self, options: UpdateOptions, optimizer: Appliable) -> None:
        self._options = options
        self._optimizer = optimizer
        self._variables: list[Any] = []
        self._model: Callable[[], Any] = lambda: None

    def exchange(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Sends the gradients, and applies this update and those missed before.

        Args:
            gradients: one for each variable, or None where there is none.
            variables: the same, in the same order, at every call and on every rank.

        Returns:
            What the backend's `_step` does.
        """
        self.training.check_usable()
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if not pairs:
            raise UsageError("apply(): there is no gradient for any variable: is the loss computed from the model?")
        present = [variable for _, variable in pairs]
        sent = [self._prepare(gradient, variable) for gradient, variable in pairs]
        if not self._variables:
            self._open(present, sent)
        elif [id(variable) for variable in present] != [id(variable) for variable in self._variables]:
            raise UsageError(
                f"apply() with gradients for {_names(present)}, but the first call had {_names(self._variables)}: "
                "every update has the same variables; use one DistributedOptimizer for each set of variables"
            )
        self.training.gradient_begins()
        return self._step(sent)

    def metrics(self, scalars: dict[str, Any]) -> None:
        """Sends scalars along with the next gradients."""
        self.training.metrics(scalars)

    def on_update(self, function: Callable[[AppliedUpdate], object]) -> None:
        """Runs it after every update that this rank applies."""
        self.training.after_update.append(function)

    def open(self) -> None:
        """A round ends before the first step: this rank has no gradient, but knows the variables."""
        variables = self._optimizer._known_variables()
        if not variables:
            raise UsageError(
                "this rank has not computed a single gradient, and its optimizer was not built, so it does not know "
                "what the others send: optimizer.build(model.trainable_variables) before the loop"
            )
        self._open(variables, [self._prepare(self._zeros(variable), variable) for variable in variables])

    def gradient_started(self) -> bool:
        """Between the gradient and its update; not from outside, as both are one call."""
        return False

    # --- ranks beyond the journal ---

    def belongs_to(self, model: Any) -> None:
        """The optimizer's model, whose other weights (BatchNorm) are part of what such a rank takes over."""
        self._model = weakref.ref(model)

    def state(self, own: dict[str, Any]) -> PackedState:
        """See hvd_backup.updates.Framework."""
        values = [np.asarray(keras.ops.convert_to_numpy(variable)) for variable in self._all_variables()]
        return pack({"own": own, "values": values}, NumpyArrays())

    def load_state(self, memory: memoryview) -> dict[str, Any]:
        """See hvd_backup.updates.Framework."""
        state = unpack(memory, NumpyArrays())
        for variable, value in zip(self._all_variables(), state["values"], strict=True):
            variable.assign(value.copy())  # TensorFlow goes on to use what it is given
        own: dict[str, Any] = state["own"]
        return own

    def _all_variables(self) -> list[Any]:
        """What updates change, and the model's other weights, each once; the same on all ranks."""
        model = self._model()
        others = [] if model is None else model.non_trainable_weights
        variables = [*(self._variables or self._optimizer._known_variables()), *self._optimizer._own_variables()]
        return list({id(variable): variable for variable in [*variables, *others]}.values())

    def _describe(self, variables: list[Any], sent: list[tuple[tuple[int, ...], str]]) -> list[str]:
        """Lines that must be equal on all ranks; sent: shape and dtype for each variable.

        Without the names of layers, which Keras numbers: a rank may have made more of them than the others.
        """
        return [
            *self._options.description,
            *(
                f"variable {number}: {name_of(variable).rpartition('/')[2]} {shape} {dtype}"
                for number, (variable, (shape, dtype)) in enumerate(zip(variables, sent, strict=True))
            ),
        ]

    def _rate_to_send(self) -> Any:
        """The learning rate's variable, when it travels with updates."""
        return self._optimizer._learning_rate_variable() if self.training.policy.may_leave_out else None

    @abstractmethod
    def _prepare(self, gradient: Any, variable: Any) -> Any:
        """The gradient as `_open` and `_step` take it.

        Raises:
            UsageError: it cannot be used for this variable.
        """

    @abstractmethod
    def _zeros(self, variable: Any) -> Any:
        """A gradient of zeros."""

    @abstractmethod
    def _open(self, variables: list[Any], sent: list[Any]) -> None:
        """Agrees with all ranks on what is sent, and notes `variables`."""

    @abstractmethod
    def _step(self, sent: list[Any]) -> Any:
        """Sends, and applies all updates that come."""


def name_of(variable: Any) -> str:
    """For messages."""
    return str(getattr(variable, "path", None) or variable.name)


def _names(variables: list[Any]) -> str:
    return ", ".join(name_of(variable) for variable in variables)
