"""The penalty in the ``Trainer`` of Transformers, and Tr(F) in its log."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfisher.alignment import Alignments, labels_in
from fastfisher.integrations._tracing import TraceAtSteps
from fastfisher.penalise.regularizer import FisherPenalty
from fastfisher.penalise.watching import WatchedForward

try:
    from transformers import Trainer, TrainerCallback
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
    R over the micro-batches. The log has ``fisher_penalty``, R, and ``fisher_trace_estimate``, that of Tr(F) per
    position that comes with it. The state is in the checkpoints.

    Positions that the loss leaves out (−100, padding, prompts) have no part in R. Whether labels are those of the next
    position is asked of the loss, at the first batch of each kind (:func:`fastfisher.alignment.alignment_of`).

    Example:
        >>> FisherPenaltyTrainer(model=model, args=arguments, train_dataset=data, alpha=0.1).train()

    Args:
        alpha: the coefficient α ≥ 0.
        penalty_options: those of :class:`fastfisher.FisherPenalty`, but for ``mixed``, ``examples``, ``graphs``,
            ``loss`` and ``wrt="inputs"``, which need a forward of their own.

    Attributes:
        penalty: the :class:`fastfisher.FisherPenalty`.

    Raises:
        ValueError: an option is out of range, there are several processes or GPUs, or an argument of the Trainer does
            not go with the penalty (``fp16``, ``torch_compile``, FSDP, DeepSpeed); it is named. In training: the loss
            is no cross-entropy of the model's logits, or a ``compute_loss`` does not use that of this class.
    """

    def __init__(self, *args: Any, alpha: float, penalty_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self
        _check_arguments(own)
        self._alpha, self._penalty_options = alpha, penalty_options or {}
        self._alignments = Alignments(self._penalty_options.get("class_dim"))
        self._asked = self._asked_before = self._terms = self._reached = 0
        self.penalty = self._penalty_of(own.model)
        with self.penalty.watching():  # refuses an option now, not at the first step
            pass
        own.add_callback(_PenaltyIsTrained(self))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss with the penalty as a term of value 0; without it where nothing is trained.

        A class of your own that overrides this has to make its loss of the one that this returns.
        """
        own: Any = super()
        if not (model.training and torch.is_grad_enabled()):
            return own.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._follow_model()
        stated, labels = self.penalty_targets(inputs), labels_in(inputs)
        with self.penalty.watching() as forward:
            loss, outputs = own.compute_loss(model, inputs, True, num_items_in_batch)
        term = self.penalty.term(forward, self._targets(forward, loss, labels) if stated is None else stated)
        self._asked += 1
        if term.requires_grad:
            self._terms += 1
            term.register_hook(self._reach)  # type: ignore[no-untyped-call]
        if self._is_scaled(num_items_in_batch):
            term = term / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (loss + term, outputs) if return_outputs else loss + term

    def penalty_targets(self, inputs: dict[str, Any]) -> Tensor | None:
        """The targets of the logits, −100 where a position does not count; None: those that the loss has.

        To override where the loss is none that tells: one of several terms in the logits, or with weights of zero.
        """
        return None

    def compute_loss_context_manager(self) -> Any:
        """That of the Trainer; at its end, before any gradient, the loss has to have been made with the penalty."""
        own: Any = self
        stack: contextlib.ExitStack = super().compute_loss_context_manager()  # type: ignore[misc]
        before = self._asked

        def check(kind: Any, error: BaseException | None, traceback: Any) -> None:
            if error is None:
                self._check_asked(before)

        if own.model.training and torch.is_grad_enabled():
            stack.push(check)
        return stack

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs R and the estimate of Tr(F) beside the training loss."""
        if "loss" in logs and self.penalty.value is not None:
            logs["fisher_penalty"] = float(self.penalty.value)
            if self.penalty.trace_estimate is not None:
                logs["fisher_trace_estimate"] = float(self.penalty.trace_estimate)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _penalty_of(self, model: Any) -> FisherPenalty:
        penalty = FisherPenalty(model, self._alpha, **self._penalty_options)
        self._penalised, self._watched = model, penalty.model
        return penalty

    def _follow_model(self) -> None:
        """``model_init`` makes another model when the training starts."""
        own: Any = self
        if own.model is not self._penalised:
            self.penalty = self._penalty_of(own.model)
        if self.penalty.model is not self._watched:
            raise ValueError("penalty: expected one of the model that this Trainer trains, got another model's")

    def _targets(self, forward: WatchedForward, loss: Tensor, labels: Tensor | None) -> Tensor | None:
        if forward.calls != 1 or forward.logits is None:  # which FisherPenalty.term refuses
            return None
        try:
            return self._alignments.targets(loss, forward.logits, labels)
        except ValueError as error:
            raise ValueError(f"{error}: override penalty_targets in a class of your own") from None

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is a share of the accumulated batch already; otherwise the Trainer divides it."""
        own: Any = self
        given = getattr(own, "loss_is_scaled_for_ga", None)
        if given is not None:
            return bool(given)
        by_model = own.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or own.compute_loss_func is not None)

    def _reach(self, grad: Tensor) -> None:
        self._reached += 1

    def _begin_step(self) -> None:
        self._terms = self._reached = 0
        self._asked_before = self._asked

    def _end_step(self) -> None:
        self._check_asked(self._asked_before)
        if self._reached < self._terms:
            raise ValueError(
                f"compute_loss: expected the loss that {type(self).__name__} trains to be made of the one that "
                f"FisherPenaltyMixin.compute_loss returns; {self._terms - self._reached} of the {self._terms} "
                "penalties of this step have no part in its gradient"
            )

    def _check_asked(self, before: int) -> None:
        if self._asked == before:
            raise ValueError(
                f"compute_loss: expected that of FisherPenaltyMixin to make the loss, but {type(self).__name__} never "
                "calls it, so nothing would be penalised; call super().compute_loss(...) and return a loss made of "
                "what it returns, with the mixin before the Trainer's class"
            )

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
        self._follow_model()
        self.penalty.load_state_dict(torch.load(file, weights_only=True))


def _check_arguments(trainer: Any) -> None:
    """Raises ValueError where an argument of the Trainer does not go with a penalty."""
    args = trainer.args
    if args.world_size != 1 or args.n_gpu > 1:
        raise ValueError(
            f"args: expected one process and at most one GPU, got {args.world_size} processes and {args.n_gpu} GPUs; "
            "for several processes, call FisherPenalty.backward in a loop of your own"
        )
    for name, asked in (("deepspeed", trainer.is_deepspeed_enabled), ("fsdp", trainer.is_fsdp_enabled)):
        if asked:
            raise ValueError(f"args.{name}: expected none, whose engine takes the gradients itself")
    if args.fp16:
        raise ValueError(
            "args.fp16: expected False: gradients in float16 have to be scaled before the norm is taken of them; use "
            "bf16=True, or FisherPenalty(scaler=...).backward in a loop of your own"
        )
    if args.torch_compile:
        raise ValueError(
            "args.torch_compile: expected False, since compiled code hides the calls of the layers; pass "
            "model=torch.compile(model) with remove_unused_columns=False: the steps that do not recompute the penalty "
            "run compiled"
        )


class FisherPenaltyTrainer(FisherPenaltyMixin, Trainer):  # type: ignore[misc]
    """A ``Trainer`` with the penalty; see :class:`FisherPenaltyMixin`."""


class _PenaltyIsTrained(TrainerCallback):  # type: ignore[misc]
    """Before an optimiser's step: the penalties of its micro-batches have to be in the gradient."""

    def __init__(self, trainer: FisherPenaltyMixin) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_step()


class FisherTraceCallback(TrainerCallback):  # type: ignore[misc]
    """Logs Tr(F) (eq. 2 of the paper), summed over the positions of an example, by the Trainer's own ``log``.

    So it is in ``log_history`` and in all that the Trainer reports to (TensorBoard, Weights & Biases, …), as
    ``fisher_trace`` and ``fisher_trace_error``, its standard error. The draws depend on the step alone: the training's
    random numbers stay as they are, and a resumed run has the draws of an uninterrupted one.

    Args:
        every_n_steps: so many optimiser steps from one measurement to the next; the first is before training.
        data: as in :func:`fastfisher.trace_fisher`, with inputs as a tensor or as a dict of the model's arguments.
        options: further options of :func:`fastfisher.trace_fisher`.

    Raises:
        ValueError: ``every_n_steps`` is not an integer ≥ 1.
        TypeError: an option is none of ``trace_fisher``.
    """

    def __init__(self, every_n_steps: int, data: Any, **options: Any) -> None:
        self.data, self._trace = data, TraceAtSteps(every_n_steps, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Measures, where the training is not a resumed one."""
        if state.global_step == 0:
            self._measure(state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Measures where it is time."""
        if self._trace.due(state.global_step):
            self._measure(state, control, model)

    def _measure(self, state: Any, control: Any, model: Any) -> None:
        entry = self._trace.measure(model, self.data, state.global_step)
        to_come = control.should_log  # which a log puts back
        _calling_trainer().log(entry)
        control.should_log = to_come


def _calling_trainer() -> Any:
    """The Trainer whose event this is: callbacks are not told, and its ``log`` is the only way to all that it reports
    to, which it calls before the callbacks of the user."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError("FisherTraceCallback: expected to be called by a Trainer of Transformers")
