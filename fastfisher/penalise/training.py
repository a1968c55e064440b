"""What penalties in a training loop have in common: an object that fills ``.grad`` with the gradient of loss + α·R."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastfisher.autocast import autocast_dtype
from fastfisher.checks import check_number
from fastfisher.distributed.local import Local
from fastfisher.distributed.messages import Doing, digest
from fastfisher.distributed.replicated import Replicated
from fastfisher.distributed.sharded import precision_below, whole_state
from fastfisher.distributed.sharing import shared_by
from fastfisher.distributed.single import Single
from fastfisher.engine.rollback import undone_on_error
from fastfisher.inputs import Inputs
from fastfisher.model import chosen_names, taking_gradients, trainable_parameters
from fastfisher.outputs import Output
from fastfisher.penalise.graphs import CudaCapture, cuda_of, places
from fastfisher.penalise.options import Options
from fastfisher.penalise.outcome import Captured, Eager, add_to_grads, settle
from fastfisher.penalise.point import Point
from fastfisher.penalise.rho import AdaptiveStep
from fastfisher.penalise.shift import Gradients
from fastfisher.penalise.state import Memory
from fastfisher.penalise.steps import Steps, Weights
from fastfisher.penalise.watching import term

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_FIXED = ("model", "settings", "mixed", "examples", "generator", "class_dim", "params", "scope", "penalised")
"""Attributes that later steps do not read anew."""


class TrainingPenalty:
    """Fills ``.grad`` with the gradient of loss + α·R. See :class:`fastfisher.FisherPenalty` for the options.

    Args:
        model, params: of what R is, and the parameters whose gradient's norm it is of.
        options: the others.
        process_group, timeout: the processes that share a batch, and how long one waits for the others.

    Attributes:
        logits: the output of the last training forward, detached; None before, and with a loss of the caller's.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        params: Iterable[Tensor] | None,
        process_group: ProcessGroup | None,
        timeout: float,
    ) -> None:
        settings = options.settings
        shared = shared_by(model, process_group, timeout)
        options.check_together(shared.world)
        if settings.differs and not settings.frozen and settings.step == "auto":
            settings = dataclasses.replace(settings, step=AdaptiveStep())
            options = dataclasses.replace(options, settings=settings)
        model, world, self._buffers_follow = shared.module, shared.world, shared.buffers_follow
        if world.sharded and settings.step == "auto" and (low := precision_below(model)) is not None:
            raise ValueError(f"step: expected a number with fully_shard in {low}, which the default does not know of")
        self.params = list(params) if isinstance(params, Iterator | list) else params
        trainable = trainable_parameters(model)
        chosen_names(trainable, self.params, sharded=world.sharded)  # a wrong list is refused now, not at a step
        self.model, self.alpha, self.every, self.start = model, float(options.alpha), options.every, options.start
        self.settings, self.mixed, self.generator = settings, options.mixed, options.generator
        self.scaler, self.scope = options.scaler, options.scope
        self.examples = 1 if settings.first_only else options.examples
        self.logits: Tensor | None = None
        self._options = options
        self._world: Single = Local(world) if options.scope == "local" and isinstance(world, Replicated) else world
        self._memory = Memory(model, options)
        self._runner = Captured(model, CudaCapture(cuda_of(trainable))) if options.graphs else Eager()
        self._steps = Steps(model, options, self.params, self._world, self._memory)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"{name}: expected to stay as it was given; make another {type(self).__name__}")
        super().__setattr__(name, value)

    @property
    def value(self) -> Tensor | None:
        """R at the last recomputation, a float64 scalar tensor; None before."""
        return self._memory.value

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._memory.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._memory.steps = steps

    def backward(self, inputs: Inputs, targets: Any = None, *, weight: float = 1.0) -> Tensor:
        """One forward and the gradients: adds weight·∇(loss + α·R) to ``.grad``, as ``Tensor.backward`` would.

        If anything raises on the way, Ctrl-C and a lack of memory included, the step has not been: ``.grad``, the
        buffers, the random generators and this object are as before. (With ``graphs``, a gradient kept for reuse may
        be the new one already.)

        Args:
            inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first; see
                docs/data.md.
            targets: as the training loss takes them; class indices or probabilities for cross-entropy. By default the
                ``labels`` in a mapping of inputs. Where ``loss`` is given they may be anything, but for
                ``labels="true"``; class indices of −100 for each row of logits are left out of R all the same.
            weight: what the gradient is multiplied by: 1/k for each of k micro-batches that accumulate in ``.grad``.
                Each counts as a step, and R is that of a micro-batch of B/k examples: k times Tr(F)/B in expectation.

        Returns:
            The training loss without the penalty and without the weight, a detached scalar.

        Raises:
            ValueError: ``weight`` is not positive and finite, or not the same in each process (scope "global"), there
                are no inputs, the targets do not fit, the loss is no scalar, a row of logits has no softmax to draw a
                label from, or without ``loss`` the model returns another head, which would not be trained, or makes
                another loss of the labels in a batch.
            TypeError: the inputs are of a type that cannot be any.
            RankFailure: another process raised.
        """
        return self._take(lambda trainable: self._steps.objective.batch(inputs, targets, trainable), weight)

    def _take(self, batch: Callable[[int], tuple[Inputs, Any]], weight: float) -> Tensor:
        """A step on a batch, which is made where other processes know of what it raises."""
        memory, world = self._memory, self._world
        with taking_gradients(self.model), undone_on_error(self.model, self.generator), memory.undone_on_error():
            with world.failing_together(lambda: _doing(self, "backward", weight)):
                check_number("weight", weight, "a finite number > 0")
                world.begin(self.model)
                trainable = trainable_parameters(self.model)
                inputs, targets = batch(len(trainable))
                due = self._due()
                weights = Weights(self.alpha, self._scale(weight, trainable), self.every > 1)
                take = self._steps.penalised if due else self._steps.plain
                step = functools.partial(take, trainable=trainable, weights=weights)
                outcome = self._runner.run(lambda: self._kind(due, weight), step, inputs, targets)
                total = world.at_end(trainable, outcome.total)
                if self._buffers_follow:
                    world.share_buffers(self.model)
            total = add_to_grads(total, trainable)
        settle(total, trainable)
        reading = self.settings.subject.reading
        self.logits = reading.as_given(outcome.logits) if isinstance(reading, Output) else None
        if due and self.scaler is not None and not outcome.finite:  # the scaler waits for the device in any case
            return outcome.loss
        memory.note(outcome)
        return outcome.loss

    def _term(self, point_at: Callable[[Gradients], Point], targets: Tensor | None) -> Tensor:
        """A term of value 0 for a loss of the caller's, with the gradient of α·R at that point; counts as a step."""
        memory, every = self._memory, self.every
        self._world.after_forward(self.model)
        with self._world.failing_together(lambda: _doing(self, "term")), memory.undone_on_error():
            trainable = self._steps.retake(point_at, targets, due=self._due(), reuses=every > 1)
        memory.steps += 1
        reused = memory.of(trainable)
        if every == 1:
            memory.reused = None
        if not reused or self.alpha == 0:
            return next(iter(trainable.values())).new_zeros(())
        return term(reused, self.alpha, trainable)

    def state_dict(self, whole: bool = False) -> dict[str, Any]:
        """What a resumed run needs to be the same run: the step count, the key of the labels, the reused gradient, and
        the adaptive step. ``whole``: what is in shards gathered, by all processes together, for a file of one."""
        state = self._memory.state_dict(self.every > 1)
        return whole_state(state) if whole else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            ValueError: a key is missing or unknown, or a gradient does not fit the model; nothing is restored then.
        """
        self._memory.load_state_dict(state)

    # ---- the steps ---------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether the next step recomputes R."""
        since = self.steps - self.start
        return since >= 0 and self.alpha > 0 and since % self.every == 0

    def _scale(self, weight: float, trainable: Gradients) -> float | Tensor:
        """What the losses are multiplied by before their gradients are taken; of a scaler, a float64 scalar tensor."""
        if self.scaler is None:
            return weight
        device = next(iter(trainable.values())).device
        scale: Tensor = self.scaler.scale(torch.full((), weight, dtype=torch.float64, device=device))
        return scale

    def _kind(self, due: bool, weight: float) -> Any:
        """What a captured step depends on beside its batch and the modules' modes."""
        return due, weight, self.alpha, tuple(self._memory.reused or ()), places(self._memory.places)


def _doing(penalty: TrainingPenalty, call: str, weight: float | None = None) -> Doing:
    """What this step is, which has to be the same in each process; ``weight``: None where ``.grad`` is the caller's."""
    due, trainable, shares = penalty._due(), trainable_parameters(penalty.model), penalty._world.shares
    settings = {field.name: getattr(penalty.settings, field.name) for field in dataclasses.fields(penalty.settings)}
    settings["likelihood"] = type(settings.pop("subject").likelihood).__name__
    settings["of"] = of if isinstance(of := settings["of"].of, str) else "a function"
    if isinstance(step := penalty.settings.step, AdaptiveStep):  # at scope "local" each process adapts its own
        settings["step"] = step.target, step.rho if due and shares else None
    return Doing.of(
        trainable,
        penalty._world.sharded,
        compared=due,  # when the host waits for the device in any case
        accumulates=weight is not None,
        call=f"{type(penalty).__name__}.{call}",
        steps=penalty.steps,
        alpha=penalty.alpha,
        every=penalty.every,
        start=penalty.start,
        scope=penalty.scope,
        mixed=penalty.mixed,
        examples=penalty.examples,
        loss=penalty._steps.objective.loss is not None,
        weight=weight if shares else None,
        params=digest(sorted(penalty._steps.chosen(trainable))),
        reused=penalty._memory.reused is not None,
        training=digest(name for name, module in penalty.model.named_modules() if module.training),
        autocast=[autocast_dtype(kind) for kind in ("cpu", "cuda")],
        **settings,
    )
