"""The penalty in the ``Trainer`` of Transformers, and Tr(F) in its log."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastfisher.alignment import Alignments, labels_in
from fastfisher.integrations._tracing import TraceAtSteps
from fastfisher.penalise.regularizer import FisherPenalty
from fastfisher.penalise.watching import WatchedForward
from fastfisher.placement import check_reduced_as_mean, is_initialised, is_sharded

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

    Several processes, with ``DistributedDataParallel`` or FSDP2: R is of the batch of all (``scope="global"``), and the
    update that of one process with this batch; docs/distributed.md says what is sent.

    It goes before any Trainer's class, one with a ``compute_loss`` of its own included: that is called with what this
    class was called with, its loss needs no outputs beside it, and calls of a reference model do not count. The model
    has to be called once with gradients; :meth:`penalty_call` is for one that returns no logits.

    Example:
        >>> FisherPenaltyTrainer(model=model, args=arguments, train_dataset=data, alpha=0.1).train()

    Args:
        alpha: the coefficient α ≥ 0.
        penalty_options: those of :class:`fastfisher.FisherPenalty`, but for ``mixed``, ``examples``, ``graphs``,
            ``loss`` and ``wrt="inputs"``, which need a forward of their own.
        penalty_of_call: which call of the model in ``compute_loss`` R is of, from 0, where there are several, as for
            two views of each example; None: there is one.

    Attributes:
        penalty: the :class:`fastfisher.FisherPenalty`.

    Raises:
        ValueError: an option is out of range, there are several GPUs in one process, or an argument of the Trainer does
            not go with the penalty (``fp16``, ``torch_compile``, FSDP1, DeepSpeed, parts of a model or a sequence in
            each process); it is named. In training: the loss is no cross-entropy of the model's logits, or a
            ``compute_loss`` does not use that of this class.
        TypeError: in training: the model returns no logits, as one that answers questions by two heads does.
    """

    def __init__(
        self,
        *args: Any,
        alpha: float,
        penalty_options: dict[str, Any] | None = None,
        penalty_of_call: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self
        _check_arguments(own)
        self._alpha, self._penalty_options, self._of_call = alpha, penalty_options or {}, penalty_of_call
        self._alignments = Alignments(self._penalty_options.get("class_dim"))
        self._asked = self._asked_before = self._terms = self._reached = 0
        self._wrapped: Any = None
        self.penalty = self._penalty_of(own.model)
        with self.penalty.watching(self._of_call):  # refuses an option now, not at the first step
            pass
        own.add_callback(_PenaltyIsTrained(self))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's loss with the penalty as a term of value 0; without it where nothing is trained.

        A class of your own that overrides this has to make its loss of the one that this returns, or to come after the
        mixin among the bases.
        """
        own: Any = super()
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch, **kwargs}
        if not (model.training and torch.is_grad_enabled()):
            return own.compute_loss(model, inputs, **given)
        self._follow_model(model)
        with self.penalty.watching(self._of_call) as forward:
            targets, labels = self.penalty_targets(inputs), labels_in(inputs)
            result = own.compute_loss(model, inputs, **given)
            loss, outputs = result if isinstance(result, tuple) else (result, None)
            other: dict[str, Any] = {}
            if forward.is_finished and forward.without is not None:
                arguments, stated = self.penalty_call(self._arguments(forward))
                other, targets = {"inputs": arguments}, stated if targets is None else targets
            elif forward.is_finished and targets is None:
                targets = self._targets(forward, loss, labels)
        term = self.penalty.term(forward, targets, **other)
        self._asked += 1
        if term.requires_grad:
            self._terms += 1
            term.register_hook(self._reach)  # type: ignore[no-untyped-call]
        if self._is_scaled(num_items_in_batch):
            term = term / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (loss + term, outputs) if isinstance(result, tuple) else loss + term

    def penalty_targets(self, inputs: dict[str, Any]) -> Tensor | None:
        """The targets of the logits, −100 where a position does not count; None: those that the loss has.

        To override where the loss is none that tells: one of several terms in the logits, or with weights of zero.
        """
        return None

    def penalty_call(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """For a model that returned no logits: the arguments with which it returns them, and their targets.

        To override where the loss is made within the model, as by TRL's fused heads. R then has a forward of its own.

        Args:
            arguments: those of the call, by name.

        Returns:
            Others, and the targets of the logits that come of them, −100 where a position does not count; None: all do.
        """
        raise TypeError(
            f"model: expected logits in what it returns, got none when called with {sorted(arguments)}; override "
            "penalty_call in a class of your own, to say with which arguments it returns them. A model with several "
            "heads of classes (the beginning and the end of an answer) has no single distribution to draw labels from"
        )

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
        own: Any = self
        sharded = is_sharded(model)
        alone = own.args.world_size == 1 or sharded  # fully_shard says itself which processes share the model
        group = {} if alone else {"process_group": dist.group.WORLD}
        penalty = FisherPenalty(model, self._alpha, **{**group, **self._penalty_options})
        self._penalised, self._watched, self._sharded = model, penalty.model, sharded
        return penalty

    def _follow_model(self, wrapped: Any = None) -> None:
        """``model_init`` makes another model when the training starts, and FSDP2 takes the parameters into shards.

        ``wrapped``: what is called in the place of the model, which ``DistributedDataParallel`` may be around.
        """
        own: Any = self
        if own.model is not self._penalised or is_sharded(own.model) != self._sharded:
            self.penalty = self._penalty_of(own.model)
        if self.penalty.model is not self._watched:
            raise ValueError("penalty: expected one of the model that this Trainer trains, got another model's")
        if wrapped is not None and wrapped is not self._wrapped:
            check_reduced_as_mean(wrapped)
            self._wrapped = wrapped

    def _arguments(self, forward: WatchedForward) -> dict[str, Any]:
        """Those of a call, by name."""
        assert forward.inputs is not None
        args, kwargs = forward.inputs.args, forward.inputs.kwargs
        return {**inspect.signature(self._watched.forward).bind_partial(*args).arguments, **kwargs}

    def _targets(self, forward: WatchedForward, loss: Tensor, labels: Tensor | None) -> Tensor | None:
        assert forward.logits is not None
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
        own: Any = self
        state = self.penalty.state_dict(whole=True)  # by all processes together
        if own.args.should_save or self.penalty.scope == "local":
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # whichever process comes first
            torch.save(state, Path(output_dir) / self._state_file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        self._follow_model()
        file = Path(checkpoint) / self._state_file
        if file.exists():
            self.penalty.load_state_dict(torch.load(file, weights_only=True))
            return
        warnings.warn(
            f"resume_from_checkpoint: the checkpoint has no state of a penalty ({file}), as that of a training without "
            "one has none; the penalty begins anew, with its first step",
            stacklevel=2,
        )

    @property
    def _state_file(self) -> str:
        """At scope "local" each process has a state of its own."""
        own: Any = self
        if self.penalty.scope == "local" and own.args.world_size > 1:
            return f"{Path(STATE_FILE).stem}_{own.args.process_index}.pt"
        return STATE_FILE


def _check_arguments(trainer: Any) -> None:
    """Raises ValueError where an argument of the Trainer does not go with a penalty."""
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"args: expected at most one GPU for each process, got {args.n_gpu} GPUs in one, which DataParallel would "
            "share; start a process for each by torchrun"
        )
    if args.world_size > 1 and not (is_initialised() and dist.get_world_size() == args.world_size):
        raise ValueError(
            f"args: expected the processes of torch.distributed, got {args.world_size} of another kind; call "
            "FisherPenalty.backward in a loop of your own"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("args.deepspeed: expected none, whose engine takes the gradients itself; use DDP or FSDP2")
    accelerator = getattr(trainer, "accelerator", None)
    if trainer.is_fsdp_enabled and not getattr(accelerator, "is_fsdp2", False):
        raise ValueError(
            "args.fsdp: expected FSDP2 (fsdp_config={'version': 2}), got FSDP1, whose parameters are views of flat ones"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ValueError(
            "args.parallelism_config: expected whole sequences and models in each process, got parts of them "
            f"(tensor, context or sequence parallelism of {parallel.non_data_parallel_size} processes)"
        )
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
