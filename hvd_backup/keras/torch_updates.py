"""The updates of a Keras optimizer on PyTorch: the gradients of one apply() go out, and what comes is applied.

Buckets and their memory are those of hvd_backup.torch, the rules of a step those of hvd_backup/updates.py; the
arithmetic of an update is the Keras optimizer's own. Gradients are handed over when all are there: Keras calls apply()
after the backward pass, so there is no overlap with it. p.grad is after each call what it was before.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from hvd_backup import faults
from hvd_backup.context import Context
from hvd_backup.errors import UsageError
from hvd_backup.keras.updates import Appliable, KerasUpdates, UpdateOptions, name_of
from hvd_backup.policy import Policy
from hvd_backup.torch import data_plane
from hvd_backup.torch.buckets import Buckets, gradients_kept
from hvd_backup.torch.staging import DTYPES, is_supported
from hvd_backup.training import Training

__all__ = ["TorchUpdates"]


class TorchUpdates(KerasUpdates):
    """See KerasUpdates. Also the Framework of its training."""

    def __init__(self, place: Context, policy: Policy, options: UpdateOptions, optimizer: Appliable) -> None:
        super().__init__(options, weakref.proxy(optimizer))
        self.training = Training(place, policy, self)
        self._place = place
        self._parameters: list[torch.Tensor] = []
        self._buckets: Buckets | None = None

    # --- KerasUpdates ---

    @torch.compiler.disable  # Keras compiles the whole train_step with jit_compile=True; this part runs as it is
    def exchange(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """See KerasUpdates."""
        super().exchange(gradients, variables)

    def _prepare(self, gradient: Any, variable: Any) -> torch.Tensor:
        parameter, name = variable.value, name_of(variable)
        if not is_supported(parameter.device) or parameter.dtype not in DTYPES:
            raise UsageError(
                f"variable {name} is {parameter.dtype} on {parameter.device}: supported are "
                f"{', '.join(DTYPES.values())} on the CPU or CUDA"
            )
        given: torch.Tensor = gradient
        if given.shape != parameter.shape:
            raise UsageError(
                f"the gradient of {name} has shape {tuple(given.shape)}, the variable {tuple(variable.shape)}"
            )
        return given.detach().to(parameter.dtype)

    def _zeros(self, variable: Any) -> torch.Tensor:
        return torch.zeros_like(variable.value.detach())

    def _open(self, variables: list[Any], sent: list[torch.Tensor]) -> None:
        parameters = [variable.value for variable in variables]
        backwards = list(reversed(range(len(parameters))))
        options = self._options
        direct = data_plane.engage(self._place, self.training.policy, parameters)
        buckets = Buckets(
            parameters,
            backwards,
            options.bucket_bytes,
            compression=options.compression,
            prescale=options.prescale,
            direct=direct,
            judged=self.training.policy.nonfinite == "drop",
        )
        told = [(tuple(parameter.shape), DTYPES[parameter.dtype]) for parameter in parameters]
        update_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        self.training.open(self._describe(variables, told), b"", update_bytes, direct)
        self.training.set_layout(buckets.layout(), buckets.result_addresses(), buckets)
        self._variables, self._parameters, self._buckets = variables, parameters, buckets

    def _step(self, sent: list[torch.Tensor]) -> None:
        assert self._buckets is not None
        faults.injected().sleep(self._place.rank, self.training.global_step, self._place.size)
        with self.outside_step():
            for index, gradient in enumerate(sent):
                self._parameters[index].grad = gradient
                self._buckets.pack(index, show=False)
            for packed in self._buckets.take_sent(wait=True):
                self.training.contribute(self._metadata)
                self.training.submit(*packed)
            self._buckets.start_afresh()
            self.training.catch_up()
            self.training.complete()

    def _metadata(self) -> bytes:
        rate = self._rate_to_send()
        return b"" if rate is None else json.dumps({"learning_rate": float(rate)}).encode()

    # --- Framework ---

    def load(self, metadata: bytes, filled: list[bool], settled: bool) -> None:
        """See Framework."""
        assert self._buckets is not None
        if metadata:
            self._optimizer._learning_rate_variable().assign(json.loads(metadata)["learning_rate"])
        self._buckets.show_results(1.0 if settled else self._options.postscale, filled, self.training.loads_own)

    def settle(self) -> None:
        """See Framework."""
        assert self._buckets is not None
        self._buckets.settle_results()
        self._buckets.store_results()

    def apply(self) -> None:
        """See Framework."""
        self._optimizer._apply_update([parameter.grad for parameter in self._parameters], self._variables)

    def applied(self) -> None:
        """See Framework."""
        assert self._buckets is not None
        self._buckets.results_loaded()

    def outside_step(self) -> AbstractContextManager[None]:
        """See Framework."""
        return gradients_kept(self._parameters)
