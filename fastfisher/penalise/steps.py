"""One step, composed of what the options choose: whose rows, which labels, how ∇R is taken, and what is kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.distributed.single import Counts, Share, Single
from fastfisher.engine.fused.forward import fused_forward
from fastfisher.engine.gradients import scaled
from fastfisher.engine.rollback import undone_on_error
from fastfisher.inputs import Call, Inputs, input_tensors, requiring_grad
from fastfisher.model import call_model, chosen_names, taking_gradients, trainable_parameters
from fastfisher.outputs import Output
from fastfisher.penalise.derivative import Differences, DoubleBackprop, Training, Wanted, named_gradients
from fastfisher.penalise.objective import Objective
from fastfisher.penalise.options import Options
from fastfisher.penalise.outcome import DenseGradients, Outcome, add
from fastfisher.penalise.point import Point, Sampling
from fastfisher.penalise.rho import AdaptiveStep
from fastfisher.penalise.shift import Gradients
from fastfisher.penalise.state import Memory
from fastfisher.penalise.watching import WatchedForward, none_counts


@dataclass(frozen=True)
class Weights:
    """How much the parts of a step's gradient weigh.

    Attributes:
        alpha: the coefficient of R.
        scale: what losses are multiplied by before their gradients are taken.
        reuses: whether R's gradient is kept for the steps that follow.
    """

    alpha: float
    scale: float | Tensor = 1.0
    reuses: bool = True


class Steps:
    """The steps of a :class:`fastfisher.FisherPenalty`.

    Args:
        model, options, params, world, memory: what is trained, how, among which processes, and what is remembered.

    Attributes:
        objective: the training loss.
        sampling: of which rows R is taken, and by which forward.
        derivative: how ∇R is taken.
    """

    def __init__(
        self, model: nn.Module, options: Options, params: Iterable[Tensor] | None, world: Single, memory: Memory
    ) -> None:
        self.model, self.settings, self.world, self.memory = model, options.settings, world, memory
        self.params = None if params is None else list(params)
        self.objective = Objective(model, options, world)
        few = 1 if self.settings.first_only else world.part_of(options.examples)
        self.sampling = Sampling(model, self.settings, few, world, mixed=options.mixed, rewind=not options.graphs)
        self.differentiate = DenseGradients(world.differentiate)
        # With parameters in shards, all processes would have to know when one of them looks.
        verifies = options.verify and not world.sharded
        self.derivative = (
            Differences(model, self.settings, world, self.differentiate, options.mixed, verifies)
            if self.settings.differs
            else DoubleBackprop(self.settings, world, self.differentiate)
        )
        self._all_small: set[tuple[torch.Size, ...]] = set()  # inputs of which a forward makes no large tensor

    def plain(self, inputs: Inputs, targets: Any, trainable: Gradients, weights: Weights) -> Outcome:
        """The gradient of scale·(loss + α·(R as it was recomputed last))."""
        shapes = tuple(x.shape for x in input_tensors(inputs))
        with torch.enable_grad():
            with (
                self.objective.seeing() as seen,
                nullcontext() if shapes in self._all_small else fused_forward(self.model) as fused,
            ):
                logits = call_model(self.model, inputs)
            if fused is not None and not fused.met_large:
                self._all_small.add(shapes)
            targets, _ = self.objective.fit(logits, targets)
            loss = self.objective.at(logits, targets, seen)
            self.objective.look_beside(loss, inputs)
        del seen
        weight = self.world.loss_weight(lambda: self.objective.count(logits, targets))
        total = named_gradients(self.differentiate, scaled(scaled(loss, weights.scale), weight), trainable)
        (total,) = self.world.sum_gradients(trainable, total)
        add(total, self.memory.of(trainable), weights.alpha * weights.scale)
        return Outcome(loss.detach(), logits.detach(), self.differentiate.laid_out(total, trainable))

    def penalised(self, inputs: Inputs, targets: Any, trainable: Gradients, weights: Weights) -> Outcome:
        """The gradient of scale·(loss + α·R), with R, and its gradient where it is reused, without the scale."""
        if not self.settings.of_parameters:
            inputs = requiring_grad(inputs)
        with torch.enable_grad():
            with self.objective.seeing() as seen:
                logits, point = self.sampling.forward(inputs, trainable)
            targets, of_rows = self.objective.fit(logits, targets)
            loss = self.objective.at(logits, targets, seen)
            self.objective.look_beside(loss, inputs)
            true = None if of_rows is None else of_rows[: len(point.rows)]
            share = self._draw(point, true, self.objective.counts(logits, targets, point, of_rows, true))
            training = self._training(loss, targets, share, point.rows is logits)
        alpha = weights.alpha * share.fraction
        adaptive = self.world.shares and isinstance(self.settings.step, AdaptiveStep)
        apart = weights.reuses or adaptive
        outcome = Outcome(loss.detach(), logits.detach(), {}, rows=share.rows)
        del loss, logits, seen
        wanted = Wanted(
            trainable,
            self.chosen(trainable),
            alpha=None if apart else alpha,
            scale=weights.scale,
            first=self.memory.value is None,
        )
        taken = self.derivative.take(point, training, wanted)
        total, *penalty = self.world.sum_gradients(
            trainable, taken.total, *([] if taken.penalty is None else [taken.penalty])
        )
        for reused in penalty:
            taken.follow(reused)
            if isinstance(share.fraction, Tensor) or share.fraction != 1.0:
                for g in reused.values():
                    g.mul_(share.fraction)
            add(total, reused, weights.alpha * weights.scale)
            if weights.reuses:
                outcome.reused = self.memory.keep(reused)
        outcome.total = self.differentiate.laid_out(total, trainable)
        outcome.value = taken.value
        return outcome

    def _draw(self, point: Point, true: Tensor | None, counts: Counts) -> Share:
        """Draws the labels of the point's rows, whose targets are ``true``, and weighs their loss by what this process
        has of the batch."""
        kind, likelihood = self.settings.kind, self.settings.likelihood
        kind.check_targets(true, likelihood)
        key = self.memory.next_key(point.logits.device, self.world.rank)
        share = self.world.share(counts, key)
        if share.penalised == 0.0 and true is not None:
            # None of this process's rows counts, and it computes along at weight 0. A mean over no row is NaN.
            true = torch.zeros_like(true)
        with torch.enable_grad():
            point.draw(kind, likelihood, true, key, share.first)
            point.weigh(share.penalised)
        point.examples = share.examples
        return share

    def _training(self, loss: Tensor, targets: Any, share: Share, same_rows: bool) -> Training:
        """The training loss, which with true labels of all rows is the loss that is penalised, too."""

        def again(logits: Tensor) -> Tensor:
            return scaled(self.objective.at(logits, targets), share.loss)

        true = self.settings.labels == "true" and self.objective.loss is None
        return Training(scaled(loss, share.loss), again, true and same_rows and share.loss == share.penalised)

    def retake(
        self, point_at: Callable[[Gradients], Point], targets: Tensor | None, *, due: bool, reuses: bool
    ) -> Gradients:
        """Takes ∇R and R beside a loss of the caller's, who takes the mean over the processes.

        Args:
            point_at: the forward that R is of, at the trainable parameters: :meth:`watched_point`, :meth:`own_point`.
            targets: which of its rows count.
            due: whether to; where no row counts, or it is not due, R and its gradient are those that are kept.
            reuses: whether R's gradient is kept for the steps that follow.

        Returns:
            The trainable parameters.
        """
        self.world.begin_term(self.model)
        trainable = trainable_parameters(self.model)
        if self.world.any_counts(due and not none_counts(targets, self.settings.likelihood)):
            with (
                taking_gradients(self.model),
                undone_on_error(self.model, self.memory.generator),
                self.world.own_reduction(self.model),
            ):
                point = point_at(trainable)
                share = self._draw_watched(point, targets)
                wanted = Wanted(trainable, self.chosen(trainable), first=self.memory.value is None)
                taken = self.derivative.take(point, None, wanted)
                penalty = taken.penalty or {}
                if reuses or isinstance(self.settings.step, AdaptiveStep):
                    (penalty,) = self.world.sum_gradients(trainable, penalty)
                else:  # the caller's mean is the only sum that it takes
                    penalty = self.world.for_mean(penalty)
                taken.follow(penalty)
            self.memory.value, self.memory.rows, self.memory.reused = taken.value, share.rows, penalty
        return trainable

    def _draw_watched(self, point: Point, targets: Tensor | None) -> Share:
        """:meth:`_draw` where the training loss, and what it divides by, is the caller's."""
        if targets is not None:
            targets = self.settings.subject.fit(point.logits, targets, model=self.model)
        true = targets[:1] if self.settings.first_only and targets is not None else targets
        counts = self.objective.counts(point.logits, None, point, None, true)
        return self._draw(point, true, dataclasses.replace(counts, loss=lambda: 0.0))

    def own_point(self, inputs: Inputs, trainable: Gradients) -> Point:
        """A forward that R alone is of."""
        inputs = inputs if self.settings.of_parameters else requiring_grad(inputs)
        return self.sampling.apart(trainable, inputs, self.settings.first_only, None)

    def watched_point(self, forward: WatchedForward, inputs: Call | None, trainable: Gradients) -> Point:
        """The caller's forward; or one of R's own, of other ``inputs``, or where the caller's was in an autocast."""
        gates, first_only = forward.gates, self.settings.first_only
        if inputs is not None:
            return self.own_point(inputs, trainable)
        if forward.without is not None:
            raise forward.without
        assert forward.logits is not None and forward.inputs is not None
        if gates is not None and not self.sampling.learns_of_autocast(gates):
            reading = self.settings.subject.reading
            assert isinstance(reading, Output)
            return Point(reading.laid_out(forward.logits), forward.inputs, first_only, gates, kept=True)
        buffers = forward.buffers if gates is None else gates.buffers
        return self.sampling.apart(trainable, forward.inputs, first_only, buffers)

    def chosen(self, trainable: Gradients) -> frozenset[str]:
        """The names of the parameters in ``params``; one that is frozen meanwhile drops out."""
        kept = None if self.params is None else [p for p in self.params if p.requires_grad]
        return frozenset() if kept == [] else chosen_names(trainable, kept, sharded=self.world.sharded)
