"""The Fisher penalty in a training loop: the penalty whose gradient is at labels that are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastfisher.checks import check_callable, check_count
from fastfisher.distributed.messages import TIMEOUT
from fastfisher.inputs import as_call
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, subject_of
from fastfisher.outputs import Output, OwnLossFunction
from fastfisher.penalise.norm import OfNorm
from fastfisher.penalise.options import Method, Options, Settings
from fastfisher.penalise.point import Point
from fastfisher.penalise.rho import Difference, Step
from fastfisher.penalise.shift import Gradients
from fastfisher.penalise.training import TrainingPenalty
from fastfisher.penalise.watching import WatchedForward, watched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FisherPenalty(TrainingPenalty):
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
        loss: the training loss as a callable of (what the model returns, targets), both as they are; the mean loss of
            the likelihood otherwise. R is always taken of the latter at ``labels``.
        likelihood: the distribution that the output stands for, whose labels R is at, and whose loss is trained where
            ``loss`` is not given: "categorical", "bernoulli", "gaussian", "poisson", or an object; see
            docs/likelihoods.md.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.
        logits_of: finds the output of the distribution in what the model returns.
        of: the function of the norm that R is, instead of its square; as in :func:`fastfisher.penalty`.
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
        likelihood: LikelihoodName | Likelihood = "categorical",
        loss: OwnLossFunction | None = None,
        generator: torch.Generator | None = None,
        params: Iterable[Tensor] | None = None,
        graphs: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        class_dim: int | None = None,
        logits_of: Callable[[Any], Tensor] | None = None,
        of: Literal["squared_norm", "norm"] | Callable[[Tensor], Tensor] = "squared_norm",
        scope: Literal["global", "local"] = "global",
        process_group: ProcessGroup | None = None,
        timeout: float = TIMEOUT,
        verify: bool = True,
    ) -> None:
        subject = subject_of(likelihood, class_dim, logits_of)
        settings = Settings(labels, method, gates, wrt, reduction, step, difference, subject, OfNorm(of))
        options = Options(
            settings, alpha, every, start, mixed, examples, loss, generator, graphs, scaler, scope, verify
        )
        self.class_dim = class_dim
        super().__init__(model, options, params, process_group, timeout)

    @property
    def loss(self) -> Callable[[Any, Any], Tensor] | None:
        """The training loss, which may be set to another one between steps; None: mean cross-entropy."""
        return self._steps.objective.loss

    @loss.setter
    def loss(self, loss: Callable[[Any, Any], Tensor] | None) -> None:
        check_callable("loss", loss)
        self._steps.objective.loss = loss

    @property
    def trace_estimate(self) -> Tensor | None:
        """B·‖g‖², whose expectation is Tr(F) (eq. 2), exactly: E_ŷ[g_i] = 0 for each example, so cross terms vanish.

        Of logits (B, T, C) it is Tr(F) per position that counts; ``trace_fisher`` sums over an example's positions.

        None before the first penalty, and where R is not of sampled labels and all parameters. Not unbiased with
        BatchNorm in train mode, which couples the examples.
        """
        settings = self.settings
        sampled = settings.labels in ("sampled", "rademacher") and settings.of_parameters and settings.of.squared
        if not sampled or self.params is not None or self.value is None or self._memory.rows is None:
            return None
        return self.value * self._memory.rows

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
        reading = self.settings.subject.reading
        assert isinstance(reading, Output)
        return watched(self.model, self._steps.sampling, reading, self._due(), self._world, call)

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
        steps = self._steps

        def point_at(trainable: Gradients) -> Point:
            forward.check()
            reading = self.settings.subject.reading
            call = None if inputs is None else as_call(self.model, inputs, reading)
            return steps.watched_point(forward, call, trainable)

        made = self._term(point_at, targets)
        self.logits = None if forward.logits is None else forward.logits.detach()
        return made
