"""The two ways to ∇R: by differentiating through the gradient, and by the difference of two gradients.

Each takes a point (the forward at θ, with its labels) and consumes it: its graph is gone before another one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfisher.distributed.single import Single
from fastfisher.engine.fused.convolution import saving_memory
from fastfisher.engine.gradients import Differentiate, real, scaled
from fastfisher.engine.twice import differentiable_gradients, second_derivatives
from fastfisher.host import looking_waits
from fastfisher.inputs import count_examples
from fastfisher.lists import zeros
from fastfisher.model import unhooked
from fastfisher.penalise.difference import FiniteDifference, gradient_at
from fastfisher.penalise.norm import norm_of, norms_by_example
from fastfisher.penalise.options import Settings
from fastfisher.penalise.point import Point
from fastfisher.penalise.rho import AdaptiveStep
from fastfisher.penalise.shift import Gradients, moving_inputs
from fastfisher.penalise.trust import judge, verify


@dataclass
class Training:
    """The training loss at θ.

    Attributes:
        loss: its value with the graph, times this process's weight.
        again: the same as a function of the logits, for the mixed gradient.
        penalised: whether the gradient that is penalised is the training gradient, so that one backward serves both.
    """

    loss: Tensor
    again: Callable[[Tensor], Tensor]
    penalised: bool

    def release(self) -> None:
        """Lets go of the graph."""
        del self.loss


@dataclass(frozen=True)
class Wanted:
    """Which gradients are taken at a point: of scale·(the training loss + α·R), or of both apart.

    Attributes:
        trainable: the parameters that they are taken in, by name.
        chosen: those whose gradient R is the norm of.
        alpha: the coefficient of R; None for both apart.
        scale: what the losses are multiplied by before.
        first: whether no penalty was taken yet: on a GPU the host looks at that one alone.
    """

    trainable: Gradients
    chosen: frozenset[str]
    alpha: float | Tensor | None = None
    scale: float | Tensor = 1.0
    first: bool = True


@dataclass
class Taken:
    """What a step has at θ.

    Attributes:
        value: R.
        total: the gradient of scale·(the training loss), with α·R where they were not asked for apart.
        penalty: ∇R, without the scale, where they were.
        follow: what is left to do when ∇R is summed over the processes: an adaptive step follows its relative change.
    """

    value: Tensor
    total: Gradients
    penalty: Gradients | None = None
    follow: Callable[[Gradients], None] = lambda penalty: None


@dataclass
class DoubleBackprop:
    """∇R by differentiating through the gradient: exact, at three to five plain steps."""

    settings: Settings
    world: Single
    differentiate: Differentiate

    def take(self, point: Point, training: Training | None, wanted: Wanted) -> Taken:
        """See :class:`Wanted`."""
        alpha, scale = wanted.alpha, wanted.scale

        def gradients(loss: Tensor, retain_graph: bool = False) -> Gradients:
            return named_gradients(self.differentiate, loss, wanted.trainable, retain_graph)

        with second_derivatives('method="finite_difference"'):
            value, squared_norm = self._squared_norm(point, wanted)
            if training is not None and alpha is not None:
                return Taken(value, gradients((training.loss + alpha * squared_norm) * scale))
            penalty = gradients(squared_norm * scale, retain_graph=True)
            for g in penalty.values() if isinstance(scale, Tensor) or scale != 1.0 else ():
                g.div_(scale)
            return Taken(value, {} if training is None else gradients(training.loss * scale), penalty)

    def _squared_norm(self, point: Point, wanted: Wanted) -> tuple[Tensor, Tensor]:
        """R, and what has the gradient of R: R itself, or this process's part of it; both without the scale."""
        own = squared_parts(point, self.settings, wanted.trainable, wanted.chosen, wanted.scale)
        if not own:  # all of params are frozen meanwhile: R is 0, and so is its gradient
            nothing = 0 * point.loss
            return nothing.detach().double(), nothing
        if not (self.world.shares and self.settings.of_parameters):
            value = value_of(own, point, self.settings)
            return self.world.total(value.detach().double()), value
        of_real = {name: real(p) for name, p in wanted.trainable.items()}
        (summed,) = self.world.sum_gradients(of_real, {name: g.detach() for name, g in own.items()})
        squared, of = torch.stack([g.double().square().sum() for g in summed.values()]).sum(), self.settings.of
        mine = 2 * torch.stack([(g * summed[name]).sum() for name, g in own.items()]).sum()
        if of.squared:
            return squared, mine
        norm = norm_of(squared)
        return of(norm), of.gain(norm).to(mine.dtype) * mine


def squared_parts(
    point: Point, settings: Settings, trainable: Gradients, chosen: frozenset[str], scale: float | Tensor = 1.0
) -> Gradients:
    """The gradients whose squared norm R is, by name, differentiable; without the scale."""
    sources = {name: p for name, p in trainable.items() if name in chosen}
    if not settings.of_parameters:
        sources = moving_inputs(point.inputs)
    if not sources:
        return {}
    with unhooked(sources.values()):
        found = differentiable_gradients(scaled(point.loss, scale), list(sources.values()))
    return {name: real(g) / scale for name, g in zip(sources, found, strict=True) if g is not None}


def value_of(own: Gradients, point: Point, settings: Settings) -> Tensor:
    """R, differentiable, or this process's part of it: φ(‖g‖), or the mean over examples of φ of each one's norm."""
    if settings.of.squared or settings.of_parameters:
        squared = torch.stack([g.square().sum() for g in own.values()]).sum()
        if settings.of_parameters:
            return squared if settings.of.squared else settings.of(norm_of(squared))
        return float(point.examples) * squared
    norms = norms_by_example(own, count_examples(point.inputs)) * float(point.examples)
    return settings.of(norms).sum() / float(point.examples)


@dataclass
class Differences:
    """∇R by the difference of two gradients: two forwards and two backwards beside that of the training loss.

    Attributes:
        model, settings, world, differentiate: what gradients are taken of, how, and among which processes.
        mixed: whether the training gradient is taken at θ + ρd, too, in the same backward.
        verifies: whether what each step relies on is looked at once for each kind of batch.
    """

    model: nn.Module
    settings: Settings
    world: Single
    differentiate: Differentiate
    mixed: bool
    verifies: bool

    def take(self, point: Point, training: Training | None, wanted: Wanted) -> Taken:
        """See :class:`Wanted`."""
        trainable, alpha, scale, first = wanted.trainable, wanted.alpha, wanted.scale, wanted.first
        apart = training is not None and not (training.penalised or self.mixed)
        # All activations are kept over this backward: the peak of the whole step.
        with saving_memory() if apart else nullcontext(), point.gates.arithmetic():
            gradient, direction = gradient_at(
                point, self.settings, trainable, wanted.chosen, self.differentiate,
                scale=scale, retain_graph=apart or point.kept,
            )  # fmt: skip
        if not gradient:
            raise ValueError("loss: expected one that depends on parameters of the model, got one that depends on none")
        total = gradient if training is not None and not apart else {}
        if apart and training is not None:
            total = named_gradients(self.differentiate, scaled(training.loss, scale), trainable)
        point.release()
        if training is not None:
            training.release()
        adaptive = isinstance(self.settings.step, AdaptiveStep) and alpha is None
        summed: Gradients = {}
        if self.settings.of_parameters or adaptive:  # an adaptive step follows the change of the gradient of all
            (summed,) = self.world.sum_gradients(trainable, gradient if adaptive else direction)
        if self.settings.of_parameters:
            direction = {name: g for name, g in summed.items() if name in wanted.chosen}
        difference = FiniteDifference(
            self.model, point, self.settings, gradient, direction, world=self.world, scale=scale
        )
        if self.verifies:
            verify(difference)
        if self.mixed and training is not None and isinstance(alpha, float):
            return Taken(difference.value, difference.mixed_gradient(alpha, training.again))
        if alpha is not None:
            if total is gradient and self.settings.difference == "central":
                total = {name: g.clone() for name, g in gradient.items()}
            for name in gradient.keys() - total.keys():
                total[name] = torch.zeros_like(gradient[name])
            self._follow(difference, difference.add_to(total, alpha), first)
            return Taken(difference.value, total)
        penalty = dict(zip(gradient, zeros(gradient.values()), strict=True))
        change = difference.add_to(penalty, 1.0 / scale)

        def follow(penalty: Gradients) -> None:
            together = adaptive and self.world.shares and not self.world.sharded
            self._follow(difference, difference.relative_change(penalty, summed) if together else change, first)

        return Taken(difference.value, total, penalty, follow)

    def _follow(self, difference: FiniteDifference, change: Tensor, first: bool) -> None:
        """Adapts the step, and warns of a bad one; on a GPU, where the host would wait, of the first one only."""
        difference.adapt(change)
        if first or not looking_waits(change):
            judge(difference, change)


def named_gradients(
    differentiate: Differentiate, loss: Tensor, trainable: Gradients, retain_graph: bool = False
) -> Gradients:
    """∇_θ loss by name; a parameter that is not used is absent."""
    found = differentiate(loss, list(trainable.values()), retain_graph)
    return {name: g for name, g in zip(trainable, found, strict=True) if g is not None}
