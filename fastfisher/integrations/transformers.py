"""The penalty in the ``Trainer`` of Transformers, and Tr(F) in its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.labels import IGNORED
from fastfisher.regularizer import FisherPenalty
from fastfisher.traces import trace_fisher

try:
    from transformers import Trainer, TrainerCallback
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "fastfisher.integrations.transformers needs Transformers: pip install fastfisher[transformers]"
    ) from error

STATE_FILE = "fisher_penalty.pt"
"""Where a checkpoint holds the state of the penalty."""


class FisherPenaltyMixin:
    """Adds the gradient of α·R (eq. 3 and 5 of the paper) to a ``Trainer``'s; put it before the Trainer's class.

    The forward of the loss is shared. The loss keeps its value, in the log too, and the penalty is a term of it for
    autograd alone: what scales, accumulates and clips the gradient does so to both. With accumulation it is the mean of
    R over the micro-batches. Positions whose label is −100 have no part. The log has ``fisher_penalty``, R, and
    ``fisher_trace_estimate``, that of Tr(F) per position that comes with it. The state is in the checkpoints.

    Example:
        >>> FisherPenaltyTrainer(model=model, args=arguments, train_dataset=data, alpha=0.1).train()

    Args:
        alpha: the coefficient α ≥ 0.
        penalty_options: those of :class:`fastfisher.FisherPenalty`, but for ``mixed``, ``examples``, ``graphs`` and
            ``wrt="inputs"``, which need a forward of their own.

    Attributes:
        penalty: the :class:`fastfisher.FisherPenalty`.

    Raises:
        ValueError: an option is out of range, or there are several processes or GPUs; it is named.
    """

    def __init__(self, *args: Any, alpha: float, penalty_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self
        if own.args.world_size != 1 or own.args.n_gpu > 1:
            raise ValueError(f"args: expected one process and at most one GPU, got {own.args.world_size} processes")
        self.penalty = FisherPenalty(own.model, alpha, **(penalty_options or {}))
        with self.penalty.watching():  # refuses an option now, not at the first step
            pass

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss with the penalty as a term of value 0; without it where nothing is trained."""
        own: Any = super()
        if not (model.training and torch.is_grad_enabled()):
            return own.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = self.penalty_targets(inputs)
        with self.penalty.watching() as forward:
            loss, outputs = own.compute_loss(model, inputs, True, num_items_in_batch)
        term = self.penalty.term(forward, targets)
        if self._is_scaled(num_items_in_batch):
            term = term / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (loss + term, outputs) if return_outputs else loss + term

    def penalty_targets(self, inputs: dict[str, Any]) -> Tensor | None:
        """The targets of the logits: the labels, of a causal language model those of the next position."""
        labels: Tensor | None = inputs.get("labels")
        causal = type(self.penalty.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if causal and labels is not None else labels

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is a share of the accumulated batch already; otherwise the Trainer divides it."""
        own: Any = self
        given = getattr(own, "loss_is_scaled_for_ga", None)
        if given is not None:
            return bool(given)
        by_model = own.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or own.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs R and the estimate of Tr(F) beside the training loss."""
        if "loss" in logs and self.penalty.value is not None:
            logs["fisher_penalty"] = float(self.penalty.value)
            if self.penalty.trace_estimate is not None:
                logs["fisher_trace_estimate"] = float(self.penalty.trace_estimate)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        torch.save(self.penalty.state_dict(), Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        file = Path(checkpoint) / STATE_FILE
        if not file.exists():
            raise ValueError(f"resume_from_checkpoint: expected the state of the penalty in {file}, found no such file")
        self.penalty.load_state_dict(torch.load(file, weights_only=True))


class FisherPenaltyTrainer(FisherPenaltyMixin, Trainer):  # type: ignore[misc]
    """A ``Trainer`` with the penalty; see :class:`FisherPenaltyMixin`."""


class FisherTraceCallback(TrainerCallback):  # type: ignore[misc]
    """Notes Tr(F) (eq. 2 of the paper), summed over the positions of an example, in the Trainer's ``log_history``.

    The entries are ``fisher_trace`` and ``fisher_trace_error``, its standard error. The draws come from a generator of
    their own: the training's random numbers stay as they are.

    Args:
        every_n_steps: so many optimiser steps from one measurement to the next; the first is before training.
        data: as in :func:`fastfisher.trace_fisher`, with inputs as a tensor or as a dict of the model's arguments.
        options: further options of :func:`fastfisher.trace_fisher`.

    Raises:
        ValueError: ``every_n_steps`` is not an integer ≥ 1.
    """

    def __init__(self, every_n_steps: int, data: Any, **options: Any) -> None:
        if not (isinstance(every_n_steps, int) and every_n_steps >= 1):
            raise ValueError(f"every_n_steps: expected an integer >= 1, got {every_n_steps!r}")
        self.every_n_steps, self.data = every_n_steps, data
        self.options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), **options}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Measures, where the training is not a resumed one."""
        if state.global_step == 0:
            self._measure(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Measures where it is time."""
        if state.global_step % self.every_n_steps == 0:
            self._measure(state, model)

    def _measure(self, state: Any, model: Any) -> None:
        trace = trace_fisher(model, self.data, **self.options)
        entry = {"fisher_trace": trace.value, "fisher_trace_error": trace.standard_error}
        state.log_history.append({"step": state.global_step, **entry})
