"""The penalty in a training loop: an object that fills ``.grad`` with the gradient of loss + α·R."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastfisher.autocast import autocast_dtype
from fastfisher.checks import check_callable, check_count, check_number
from fastfisher.distributed.local import Local
from fastfisher.distributed.messages import TIMEOUT, Doing, digest
from fastfisher.distributed.replicated import Replicated
from fastfisher.distributed.sharded import precision_below, whole_state
from fastfisher.distributed.sharing import shared_by
from fastfisher.distributed.single import Single
from fastfisher.engine.rollback import undone_on_error
from fastfisher.inputs import Inputs, as_call
from fastfisher.model import as_given, chosen_names, taking_gradients, trainable_parameters
from fastfisher.penalise.graphs import CudaCapture, cuda_of, places
from fastfisher.penalise.options import Method, Options, Settings
from fastfisher.penalise.outcome import Captured, Eager, add_to_grads, settle
from fastfisher.penalise.rho import AdaptiveStep, Difference, Step
from fastfisher.penalise.shift import Gradients
from fastfisher.penalise.state import Memory
from fastfisher.penalise.steps import Steps, Weights
from fastfisher.penalise.watching import WatchedForward, term, watched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_FIXED = ("model", "settings", "mixed", "examples", "generator", "class_dim", "params", "scope")
"""Attributes that later steps do not read anew."""


class FisherPenalty:
    """Fills ``.grad`` with the gradient of loss + α·R, R = ‖(1/B) Σ_i ∇_θ ℓ(x_i, ŷ_i)‖² (eq. 3 and 5 of the paper).

    Example:
        >>> penalty = fastfisher.FisherPenalty(model, alpha=0.1)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     loss = penalty.backward(inputs, targets)  # instead of loss.backward()
        ...     optimizer.step()

    The optimiser, scheduler, clipping and checkpoints stay the caller's: this object only makes gradients. The forward
    of the training loss is shared with the penalty, R's gradient is recomputed every ``every`` steps and reused in
    between (eq. 5). With finite differences a recomputing step costs two forwards and three backwards (2.67 plain
    steps), with ``mixed=True`` or true labels two and two (2.0).

    Args:
        model: any module from inputs to logits (..., C), or to an object with ``.logits``. Positions whose target is
            −100 (padding) have no part in loss or R; R is of the mean over the others. Of a model that
            ``torch.compile`` compiled, the steps that recompute R with frozen gates or by double backprop run
            uncompiled, with a :class:`SlowPathWarning`; all others, and free gates, compiled.
        alpha: the coefficient α ≥ 0.
        every: recompute the penalty's gradient every this many steps.
        start: the first step (counted from 0) with the penalty; plain steps before (figure 3).
        labels, wrt, method, gates, reduction, step, difference, params: as in :func:`fastfisher.penalty`.
            ``step="auto"`` with free gates keeps an :class:`AdaptiveStep` over the steps.
        mixed: take the training gradient at θ + ρd too, in the same backward: one backward fewer, at a bias of ρ H d in
            the training gradient (tiny at the default step of frozen gates). Needs ``every=1`` and
            "finite_difference", with a "forward" difference.
        examples: take R on the first so many examples, with the coefficient α·examples/B, which keeps the expected
            penalty (Tr(F)/B) and lowers the cost. None: on all.
        graphs: capture the steps as CUDA graphs once each kind has come three times (see :mod:`.graphs`), and
            launch them by replay. Values of tensors may change from step to step, and what is hashed with a captured
            step: shapes, dtypes, train and eval mode, ``alpha``, which parameters require a gradient, and where
            parameters and buffers are in memory. Anything else that the model's Python code decides stays as it was at
            the capture. A forward that reads a value, or puts another tensor in the place of a buffer, is refused.
            ``.grad`` and ``logits`` are overwritten by the next step. Dropout repeats its masks; of other random
            functions none may be met.
        scaler: the ``torch.amp.GradScaler`` of the loop, for autocast in float16: gradients are taken of scaled losses,
            and ``.grad`` is left scaled, as ``scaler.scale(loss).backward()`` leaves it. Unscale, clip, step and update
            are the caller's as ever. A recomputing step that overflowed is not kept: ``value`` and what is reused stay
            as they were, and the step does not count, so that the next one takes the penalty again.
        loss: the training loss as a callable of (logits, targets), both as they are; mean cross-entropy otherwise. R is
            always taken of the cross-entropy at ``labels``.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.
        generator: where the key of the drawn labels comes from, at the first penalty; torch's default generator
            otherwise. Each further penalty advances the key, on the device.
        scope: where several processes share a batch, which gradient is penalised: "global", that of the batch of all
            (the same update as of one process, for any number of them), or "local", of each process its own. See
            docs/distributed.md.
        process_group: the processes that share a batch; by default those of ``DistributedDataParallel`` or
            ``fully_shard``, and none of any other model.
        timeout: seconds that a process waits for the others to get as far as it did.
        verify: with finite differences, look once for each kind of batch (shapes, dtypes, modes) whether a step of
            length 0 gives the same logits, and refuse a model that gives others: one with random numbers that are not
            torch's, or with a state outside of its buffers; and whether half of the step gives the same gradient, and
            warn where it does not. Costs four forwards and two backwards, once; not done with ``fully_shard``.

    Precision. Under autocast in bfloat16 or float16 the difference of two gradients would drown in rounding. With
    ``step="auto"`` and frozen gates R is therefore taken by two forwards and backwards in the precision of the
    parameters, of its own; the training loss keeps the autocast. A recomputing step then costs a plain step and two
    thirds of three in that precision; a number as ``step`` keeps the autocast everywhere.

    Hooks on parameters act as in ``Tensor.backward``: those of ``register_hook`` once, on what is added to ``.grad``;
    those of ``register_post_accumulate_grad_hook`` when ``.grad`` is there.

    Several processes. All of them construct the penalty, around the model that DistributedDataParallel or
    ``fully_shard`` made, and call :meth:`backward` on their parts of the batch; ``.grad`` is then the same on each, and
    no other reduction may follow. ``value`` is that of all, the loss and ``logits`` are each process's own. If one
    raises, all others raise a :class:`fastfisher.RankFailure` in the same step. docs/distributed.md says what is sent.

    Attributes:
        value: R at the last recomputation, a float64 scalar tensor; None before.
        logits: the logits of the last training forward, detached; None before.
        steps: how many steps were taken.

    Raises:
        ValueError: an argument is out of range or does not go with another; it is named.
        TypeError: ``model`` is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float,
        *,
        every: int = 10,
        start: int = 0,
        labels: Literal["sampled", "true", "uniform", "rademacher"] = "sampled",
        wrt: Literal["parameters", "inputs"] = "parameters",
        reduction: Literal["batch", "first"] = "batch",
        method: Method = "finite_difference",
        gates: Literal["frozen", "free"] = "frozen",
        step: Step = "auto",
        difference: Difference = "forward",
        mixed: bool = False,
        examples: int | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        params: Iterable[Tensor] | None = None,
        graphs: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        class_dim: int | None = None,
        scope: Literal["global", "local"] = "global",
        process_group: ProcessGroup | None = None,
        timeout: float = TIMEOUT,
        verify: bool = True,
    ) -> None:
        settings = Settings(labels, method, gates, wrt, reduction, step, difference)
        options = Options(
            settings, alpha, every, start, mixed, examples, loss, generator, graphs, scaler, class_dim, scope, verify
        )
        shared = shared_by(model, process_group, timeout)
        options.check_together(shared.world)
        if settings.differs and not settings.frozen and step == "auto":
            settings = dataclasses.replace(settings, step=AdaptiveStep())
            options = dataclasses.replace(options, settings=settings)
        model, world, self._buffers_follow = shared.module, shared.world, shared.buffers_follow
        if world.sharded and step == "auto" and (low := precision_below(model)) is not None:
            raise ValueError(f"step: expected a number with fully_shard in {low}, which the default does not know of")
        self.params = list(params) if isinstance(params, Iterator | list) else params
        trainable = trainable_parameters(model)
        chosen_names(trainable, self.params, sharded=world.sharded)  # a wrong list is refused now, not at a step
        self.model, self.alpha, self.every, self.start = model, float(alpha), every, start
        self.settings, self.mixed, self.generator = settings, mixed, generator
        self.scaler, self.class_dim, self.scope = scaler, class_dim, scope
        self.examples = 1 if settings.first_only else examples
        self.logits: Tensor | None = None
        self._options = options
        self._world: Single = Local(world) if scope == "local" and isinstance(world, Replicated) else world
        self._memory = Memory(model, options)
        self._runner = Captured(model, CudaCapture(cuda_of(trainable))) if graphs else Eager()
        self._steps = Steps(model, options, self.params, self._world, self._memory)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"{name}: expected to stay as it was given; make another FisherPenalty")
        super().__setattr__(name, value)

    @property
    def loss(self) -> Callable[[Any, Any], Tensor] | None:
        """The training loss, which may be set to another one between steps; None: mean cross-entropy."""
        return self._steps.objective.loss

    @loss.setter
    def loss(self, loss: Callable[[Any, Any], Tensor] | None) -> None:
        check_callable("loss", loss)
        self._steps.objective.loss = loss

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

    @property
    def trace_estimate(self) -> Tensor | None:
        """B·‖g‖², whose expectation is Tr(F) (eq. 2), exactly: E_ŷ[g_i] = 0 for each example, so cross terms vanish.

        Of logits (B, T, C) it is Tr(F) per position that counts; ``trace_fisher`` sums over an example's positions.

        None before the first penalty, and where R is not of sampled labels and all parameters. Not unbiased with
        BatchNorm in train mode, which couples the examples.
        """
        sampled = self.settings.labels in ("sampled", "rademacher") and self.settings.of_parameters
        if not sampled or self.params is not None or self.value is None or self._memory.rows is None:
            return None
        return self.value * self._memory.rows

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
        memory, world = self._memory, self._world
        with taking_gradients(self.model), undone_on_error(self.model, self.generator), memory.undone_on_error():
            with world.failing_together(lambda: _doing(self, "FisherPenalty.backward", weight)):
                check_number("weight", weight, "a finite number > 0")
                world.begin(self.model)
                trainable = trainable_parameters(self.model)
                inputs, targets = self._steps.objective.batch(inputs, targets, len(trainable))
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
        self.logits = as_given(outcome.logits, self.class_dim)
        if due and self.scaler is not None and not outcome.finite:  # the scaler waits for the device in any case
            return outcome.loss
        memory.note(outcome)
        return outcome.loss

    def watching(self, call: int | None = None) -> AbstractContextManager[WatchedForward]:
        """Watches the one forward of the model that the caller runs within, for :meth:`term` to share.

        For loops that make the loss themselves, such as those of a framework.

        Example:
            >>> with penalty.watching() as forward:
            ...     loss = F.cross_entropy(model(inputs), targets)
            >>> (loss + penalty.term(forward, targets)).backward()

        Args:
            call: which call of the model R is taken of, from 0, where it is called several times, as for two views of
                each example; None: it is called once. Calls without gradients do not count.

        Raises:
            ValueError: an option of the penalty needs a forward of its own: ``mixed``, ``examples``, ``graphs``,
                ``loss``, ``wrt="inputs"``, ``scaler``; or ``call`` is no integer ≥ 0.
        """
        check_count("call", call, 0, optional=True)
        dataclasses.replace(self._options, loss=self.loss, scaler=self.scaler).check_watched()
        return watched(self.model, self._steps.sampling, self.class_dim, self._due(), self._world, call)

    def term(self, forward: WatchedForward, targets: Tensor | None = None, *, inputs: Any = None) -> Tensor:
        """A term for the caller's loss: its value is 0, its gradient that of α·R. Counts as a step.

        The loss keeps its value, and whatever scales it (a gradient scaler, accumulation, an average over processes)
        scales the penalty too. R's gradient is taken at once: the graph of the forward must still be there. Where no
        row counts, R is of nothing, and the step has the gradient that was kept, if any.

        Args:
            forward: what :meth:`watching` saw.
            targets: where ``labels="true"``, and where some are −100 (padding).
            inputs: what to call the model with for R, in a forward of its own, where that of the caller returned no
                logits, as a fused head does; as in :meth:`backward`.

        Several processes. Each calls this once for each of its forwards, and the loop's own backward takes the mean of
        the gradients over them, as DistributedDataParallel's and ``fully_shard``'s do. That mean is then the gradient
        of α·R of the batch of all (scope "global"), or the mean of those of each (scope "local").

        Raises:
            ValueError: the model was not called exactly once, or targets are missing.
            TypeError: what the model returned has no logits.
            RankFailure: another process raised, here or within its :meth:`watching`.
        """
        memory, every = self._memory, self.every
        self._world.after_forward(self.model)
        with self._world.failing_together(lambda: _doing(self, "FisherPenalty.term")):
            call = None if inputs is None else as_call(self.model, inputs, self.class_dim)
            with memory.undone_on_error():
                trainable = self._steps.retake(forward, call, targets, due=self._due(), reuses=every > 1)
        self.logits = None if forward.logits is None else forward.logits.detach()
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


def _doing(penalty: FisherPenalty, call: str, weight: float | None = None) -> Doing:
    """What this step is, which has to be the same in each process; ``weight``: None where ``.grad`` is the caller's."""
    due, trainable, shares = penalty._due(), trainable_parameters(penalty.model), penalty._world.shares
    settings = {field.name: getattr(penalty.settings, field.name) for field in dataclasses.fields(penalty.settings)}
    if isinstance(step := penalty.settings.step, AdaptiveStep):  # at scope "local" each process adapts its own
        settings["step"] = step.target, step.rho if due and shares else None
    return Doing.of(
        trainable,
        penalty._world.sharded,
        compared=due,  # when the host waits for the device in any case
        accumulates=weight is not None,
        call=call,
        steps=penalty.steps,
        alpha=penalty.alpha,
        every=penalty.every,
        start=penalty.start,
        scope=penalty.scope,
        mixed=penalty.mixed,
        examples=penalty.examples,
        loss=penalty.loss is not None,
        weight=weight if shares else None,
        params=digest(sorted(penalty._steps.chosen(trainable))),
        reused=penalty._memory.reused is not None,
        training=digest(name for name, module in penalty.model.named_modules() if module.training),
        autocast=[autocast_dtype(kind) for kind in ("cpu", "cuda")],
        **settings,
    )
