"""Callbacks for Lightning: the penalty in a ``LightningModule``'s training step, and Tr(F) to the trainer's loggers.

They work with ``pytorch_lightning``, or with ``lightning.pytorch`` where the program has imported it before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.regularizer import FisherPenalty
from fastfisher.traces import trace_fisher


def _callback_class() -> Any:
    names = ["pytorch_lightning", "lightning.pytorch"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):  # it is there, and something that it needs is not
                raise
    raise ModuleNotFoundError("fastfisher.integrations.lightning needs Lightning: pip install fastfisher[lightning]")


_Callback: Any = _callback_class()


def _network(module: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        return module
    network = getattr(module, name, None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: expected the name of a submodule of {type(module).__name__}, got {name!r}")
    return network


def _second_of_pair(batch: Any) -> Tensor | None:
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return batch[1] if pair else None


class FisherPenaltyCallback(_Callback):  # type: ignore[misc]
    """Adds the gradient of α·R, R = ‖(1/B) Σ_i ∇_θ ℓ(x_i, ŷ_i)‖² (eq. 3 and 5 of the paper), to each training step.

    The training step's own forward is shared, and the loss that it returns and logs keeps its value. The penalty is a
    term of that loss for autograd alone, so gradient accumulation, clipping, precision and optimisers apply to it as to
    the loss; with accumulation it is the mean of R over the micro-batches. Its state is in the checkpoints.

    Example:
        >>> Trainer(callbacks=[FisherPenaltyCallback(alpha=0.1, network="model")]).fit(module, loader)

    Args:
        alpha: the coefficient α ≥ 0.
        network: the name of the submodule that makes the logits, called once in a training step; None: the
            LightningModule itself, by its ``forward``.
        targets: the targets of a batch; otherwise the second of a pair. For ``labels="true"``, and padding (−100).
        options: as in :class:`fastfisher.FisherPenalty`, but for ``mixed``, ``examples``, ``graphs`` and
            ``wrt="inputs"``, which need a forward of their own.

    Attributes:
        penalty: the :class:`fastfisher.FisherPenalty` once training has started; None before.

    Raises:
        ValueError: at the start of the training: an option is out of range, the optimisation is manual, there are
            several processes, or the network is not called exactly once; it is named.
    """

    def __init__(
        self,
        alpha: float,
        *,
        network: str | None = None,
        targets: Callable[[Any], Tensor | None] = _second_of_pair,
        **options: Any,
    ) -> None:
        self.alpha, self.network, self.targets, self.options = alpha, network, targets, options
        self.penalty: FisherPenalty | None = None
        self._state: dict[str, Any] | None = None
        self._module: nn.Module | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes its place around the training step."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "pl_module: expected automatic optimization; where it is manual, call FisherPenalty.backward"
            )
        if trainer.world_size != 1:
            raise ValueError(f"trainer: expected one process, got {trainer.world_size}")
        penalty = FisherPenalty(_network(pl_module, self.network), self.alpha, **self.options)
        with penalty.watching():  # refuses an option now, not at the first step
            pass
        if self._state is not None:
            penalty.load_state_dict(self._state)
            self._state = None
        self.penalty, self._module, training_step = penalty, pl_module, pl_module.training_step

        def penalised(batch: Any, *args: Any, **kwargs: Any) -> Any:
            with penalty.watching() as forward:
                output = training_step(batch, *args, **kwargs)
            if output is None:  # the step is left out
                return None
            if forward.calls != 1:
                name = "the module itself" if self.network is None else self.network
                raise ValueError(
                    f"network: expected training_step to call {name} once, it did {forward.calls} times; give the name "
                    "of the submodule that makes the logits"
                )
            term = penalty.term(forward, self.targets(batch))
            if isinstance(output, Tensor):
                return output + term
            return {**output, "loss": output["loss"] + term}

        pl_module.training_step = penalised

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives the training step back."""
        if self._module is not None:
            del self._module.training_step
            self._module = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Gives the training step back."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """That of the penalty."""
        return {} if self.penalty is None else self.penalty.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until the training starts and the parameters are where they belong."""
        self._state = state_dict or None


class FisherTraceMonitor(_Callback):  # type: ignore[misc]
    """Logs Tr(F) = E_x E_ŷ ‖∇_θ ℓ(x, ŷ)‖² (eq. 2 of the paper) to every logger of the trainer.

    The metrics are ``fisher_trace`` and ``fisher_trace_error``, its standard error. The draws come from a generator of
    their own: the training's random numbers stay as they are.

    Example:
        >>> monitor = FisherTraceMonitor(every_n_steps=100, network="model")
        >>> Trainer(callbacks=[monitor], logger=TensorBoardLogger("runs")).fit(module, loader)

    Args:
        every_n_steps: so many optimiser steps from one measurement to the next.
        data: as in :func:`fastfisher.trace_fisher`; None: the batch of that step.
        network: as in :class:`FisherPenaltyCallback`.
        options: further options of :func:`fastfisher.trace_fisher`.

    Raises:
        ValueError: ``every_n_steps`` is not an integer ≥ 1.
    """

    def __init__(self, every_n_steps: int, data: Any = None, *, network: str | None = None, **options: Any) -> None:
        if not (isinstance(every_n_steps, int) and every_n_steps >= 1):
            raise ValueError(f"every_n_steps: expected an integer >= 1, got {every_n_steps!r}")
        self.every_n_steps, self.data, self.network = every_n_steps, data, network
        self.options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), **options}
        self._measured = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures where it is time."""
        step = trainer.global_step
        if step == self._measured or step % self.every_n_steps:  # or the same step, which gathers micro-batches
            return
        self._measured = step
        data = self.data if self.data is not None else tuple(batch) if isinstance(batch, list) else batch
        trace = trace_fisher(_network(pl_module, self.network), data, **self.options)
        metrics = {"fisher_trace": trace.value, "fisher_trace_error": trace.standard_error}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
