"""∇R by the difference of two gradients: that at θ, and the one a step ρ along it.

∇R ≈ (2‖g‖/ρ)·(∇ℓ_ŷ(θ + ρd) − g), d = g/‖g‖, or centrally (‖g‖/ρ)·(∇ℓ_ŷ(θ + ρd) − ∇ℓ_ŷ(θ − ρd)).

What is computed here are float64 scalars on the device, ρ, R and the relative change of the gradient among them: on a
GPU nothing waits.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.autocast import autocast_dtype, autocast_of
from fastfisher.distributed.single import Single
from fastfisher.engine.fused.forward import fused_forward
from fastfisher.engine.gradients import Differentiate, dense, real, real_dtype, scaled, sum_squares
from fastfisher.engine.recording import AccuracyWarning
from fastfisher.host import looking_waits
from fastfisher.inputs import count_examples
from fastfisher.lists import add_
from fastfisher.penalise.norm import norms_by_example
from fastfisher.penalise.options import Settings
from fastfisher.penalise.point import Point
from fastfisher.penalise.rho import FROZEN_STEP, INPUTS_STEP, REACH, AdaptiveStep, coarsest, lower_precision
from fastfisher.penalise.shift import Gradients, moving_inputs, named_inputs, shift_of, shifted_inputs

TRIES = 4
"""How often a step is shortened before the penalty is left out."""

SAMPLE = 1 << 20
"""Of so many logits it is seen how far they moved."""


def gradient_at(
    point: Point,
    settings: Settings,
    trainable: Gradients,
    chosen: frozenset[str],
    differentiate: Differentiate,
    *,
    scale: float | Tensor = 1.0,
    retain_graph: bool,
) -> tuple[Gradients, Gradients]:
    """scale·∇_θ of the penalised loss by name, unused parameters left out, and the direction of the shift: those of
    the ``chosen`` parameters, or the gradients in the inputs, which are named by position."""
    inputs = {} if settings.of_parameters else moving_inputs(point.inputs)
    sources = [*trainable.values(), *inputs.values()]
    found = dense(differentiate(scaled(point.loss, scale), sources, retain_graph))
    gradient = {n: g for n, g in zip(trainable, found[: len(trainable)], strict=True) if g is not None}
    if settings.of_parameters:
        return gradient, {name: g for name, g in gradient.items() if name in chosen}
    by_input = zip(inputs, found[len(trainable) :], strict=True)
    return gradient, {name: g for name, g in by_input if g is not None}


class FiniteDifference:
    """The gradient at θ of the penalised loss, and what it takes to have it again at θ + ρd.

    Args:
        model, point, settings, world: as they are.
        gradient: ∇_θ of the penalised loss, by name; a parameter that is not used is absent.
        direction: what the norm is taken of; see :func:`gradient_at`. Of several processes that share parameters, the
            sum over them.
        scale: what the loss was multiplied by before ``gradient`` and ``direction`` were taken of it, against underflow
            in float16. The shifted loss is too, and so is what is added; R is without it.

    Attributes:
        factor: R = factor·‖direction‖² (1; the number of examples for inputs, where R = mean_i ‖∂ℓ_i/∂x_i‖²).
        value: R.
        gain: what makes the gradient of another function of the norm of that of its square; see :mod:`.norm`.
        unweighed: the gradient that ``direction`` was before each example got a gain of its own.
        norm: ‖direction‖.
        size: ‖gradient‖.
        shorter: what has become of the step where it was too long.
        level, spacing: the mean loss in the last shifted forward, and the rounding of the probabilities behind it.
        moved: the root mean square of how far the logits were from those at θ in the last shifted forward.

    Raises:
        NotImplementedError: the forward changes a parameter, or a hook within the model a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        point: Point,
        settings: Settings,
        gradient: Gradients,
        direction: Gradients,
        *,
        world: Single,
        scale: float | Tensor = 1.0,
    ) -> None:
        self.model, self.settings, self.world = model, settings, world
        self.gradient, self.direction, self.scale = gradient, direction, scale
        self.inputs, self.first_only, self.gates = point.inputs, point.first_only, point.gates
        self.likelihood, self.labels = point.likelihood, point.labels
        self.share, self.expected = point.share, point.values
        self.factor = 1.0 if settings.of_parameters else float(point.examples)
        self._check_forward()
        self.shift = shift_of(model, self.gates, world)
        self.device = next(iter(self.shift.parameters.values())).device
        self.autocast = self.gates.without_autocast if self.gates.full_precision else autocast_of(self.device)
        self.shorter, self.spacing = 1.0, 0.0
        self.moved: Tensor | None = None
        self.level = torch.full((), math.inf)
        self.norm = self._norm(direction)
        self.unweighed = direction
        self.gain: Tensor | float = 1.0
        if settings.of.squared:
            self.value = (self.norm * (math.sqrt(self.factor) / scale)).square()
        elif settings.of_parameters:
            self.value, self.gain = settings.of(self.norm / scale), settings.of.gain(self.norm / scale)
        else:
            self._weigh_examples()
        whole = settings.of_parameters and len(direction) == len(gradient)
        own = world.sharded or self.share == 1.0  # of several processes each has another gradient, the direction is all
        self.size = self.norm if whole and own else self._norm_of_parts(gradient)

    def _check_forward(self) -> None:
        changed = sorted(self.gates.changed & self.gradient.keys())
        if changed:
            raise NotImplementedError(
                f"model: its forward changes the parameter {changed[0]!r}, in which it has a gradient (as an embedding "
                "with max_norm does): a forward with another value of it would change that, too. Use "
                'method="double_backprop", or change parameters outside of the forward'
            )
        if self.gates.hook is not None:
            raise NotImplementedError(
                f"model: the hook {self.gates.hook} changes a gradient within the model. What it gives is not the "
                "derivative of the loss, and differences of it are not the derivative of its norm. Use "
                'method="double_backprop", or hooks on parameters, which act on the whole gradient'
            )

    # ---- norms -------------------------------------------------------------------------------------------------------

    def _weigh_examples(self) -> None:
        """R is a mean over examples of a function of each one's norm: each has its own gain in the direction."""
        examples, of = count_examples(self.inputs), self.settings.of
        norms = norms_by_example(self.direction, examples).double() * (self.factor / self.scale)
        self.value = self.world.total(of(norms).sum()) / self.factor
        gains = of.gain(norms)
        self.direction = {n: g * gains.to(g.dtype).view(-1, *(1,) * (g.dim() - 1)) for n, g in self.direction.items()}
        self.norm = self._norm(self.direction)

    def _norm(self, named: Gradients) -> Tensor:
        """‖named‖, of tensors as in ``direction``, which several processes may have parts of."""
        squared = sum_squares([self.shift.part(x) for x in named.values()], self.device)
        return self.world.squared_norm(squared, self.settings.of_parameters).sqrt()

    def _norm_of_parts(self, gradient: Gradients) -> Tensor:
        return self.shift.total(sum_squares([self.shift.part(x) for x in gradient.values()], self.device)).sqrt()

    def _shifted_norm(self) -> Tensor:
        """The norm of what is shifted."""
        named = self.shift.parameters if self.settings.of_parameters else named_inputs(self.inputs)
        return self._norm({name: named[name].detach() for name in self.direction})

    def relative_change(self, reached: Gradients, gradient: Gradients) -> Tensor:
        """The relative change of ``gradient``, scaled, that led to ∇R = ``reached``, not scaled, each summed over all
        processes."""
        length, size = (sum_squares(named.values(), self.device).sqrt() for named in (reached, gradient))
        changed = length * self.scale**2 * self.rho() / (2 * self.factor * self.norm * self.gain).abs()
        return torch.where(self.norm > 0, changed / size, math.nan)

    # ---- the step ----------------------------------------------------------------------------------------------------

    def rho(self) -> Tensor:
        """The length of the step: as given, or the default for the gates and the precision."""
        step = self.settings.step
        if isinstance(step, AdaptiveStep):
            return step.current(self._shifted_norm, self.device) * self.shorter
        if step == "auto":
            step = FROZEN_STEP[self.precision][self.settings.difference]
            if not self.settings.of_parameters:
                return self._inputs_step * (self.shorter * step)
        return torch.full((), self.shorter * float(step), dtype=torch.float64, device=self.device)

    @functools.cached_property
    def _inputs_step(self) -> Tensor:
        """What the default step is multiplied by for inputs; where all are 0 each example has the size 1."""
        size = self._shifted_norm()
        return torch.where(size > 0, INPUTS_STEP * size, math.sqrt(self.factor))

    def coefficient(self, rho: Tensor) -> Tensor:
        """scale·∇R = coefficient·(the difference of the gradients of scaled losses)."""
        sides = 2.0 if self.settings.difference == "forward" else 1.0
        return self.norm * (self.gain * sides * self.factor / self.scale) / rho

    @functools.cached_property
    def precision(self) -> torch.dtype:
        """The coarsest dtype that the forward at θ computed in."""
        met = [self.gates.precision] if self.gates.precision is not None else []
        if not met:  # with free gates nothing was recorded
            met = [p.dtype for p in self.shift.parameters.values()]
            with self.autocast():
                met += [dtype for dtype in (autocast_dtype(self.device.type), self.gates.autocast) if dtype is not None]
        found = coarsest(real_dtype(dtype) for dtype in met)
        lower = lower_precision(self.device) if found == torch.float32 else None
        return found if lower is None else lower

    def adapt(self, change: Tensor) -> None:
        """Has an adaptive step follow the relative change that it caused."""
        if isinstance(self.settings.step, AdaptiveStep):
            self.settings.step.update(change)

    # ---- the loss at θ + ρd ------------------------------------------------------------------------------------------

    @contextmanager
    def shifted(
        self, rho: Tensor | None, weight: Tensor | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Gradients]]:
        """Within, scale·(weight·(the penalised loss) + loss(logits)) at θ + ρd, or at θ where ``rho`` is None, and the
        leaves that its gradient is taken in, by name."""
        length = None if rho is None else (rho / self.norm).masked_fill(self.norm == 0, 0.0)
        inputs, direction = self.inputs, self.direction
        if not self.settings.of_parameters:  # before the replay, which takes what it sees for the forward's
            inputs, direction = shifted_inputs(inputs, direction, length), {}
        with self.shift.at(direction, length, list(self.gradient)) as (forward, leaves):
            with torch.enable_grad(), self.autocast():
                free = nullcontext() if self.gates.frozen else fused_forward(self.model)
                with self.gates.replay(), free:
                    logits = forward(inputs)
                total = self._loss(logits, weight, loss)
            del logits, forward
            yield total, leaves

    def _loss(self, logits: Tensor, weight: Tensor | None, loss: Callable[[Tensor], Tensor] | None) -> Tensor:
        self.moved = self._movement(logits.detach())
        total = self.likelihood.loss(logits[:1] if self.first_only else logits, self.labels)
        self.level, self.spacing = total.detach(), torch.finfo(real_dtype(logits.dtype)).eps
        if self.share != 1.0:
            total = self.share * total
        if weight is not None:
            total = weight.to(total.dtype) * total
        if loss is not None:
            total = total + loss(logits)
        return scaled(total, self.scale)

    def _movement(self, logits: Tensor) -> Tensor | None:
        """See ``moved``; None where it would have to be waited for, or the step is not chosen by it."""
        if not (self.settings.default_step and self.likelihood.bends) or looking_waits(logits):
            return None
        rows = max(1, SAMPLE // max(1, logits[0].numel()))
        away = logits[:rows].double() - self.expected[:rows].double()
        return torch.where(away.isfinite(), away, 0.0).square().mean().sqrt()

    @contextmanager
    def at_finite_loss(
        self, weight: Callable[[Tensor], Tensor] | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Gradients] | None]:
        """Within, ρ, and :meth:`shifted` there with the weight that goes with it; None where no step is short enough.

        A guard such as ``clamp(min=eps).log()`` stays on its side when its gates are replayed; what it guards may then
        leave its domain. On a GPU the host would wait for a look: see :meth:`_accumulate`.
        """
        start = rho = self.rho()
        for _ in range(TRIES):
            with self.shifted(rho, None if weight is None else weight(rho), loss) as (total, leaves):
                shorter = self._shortening(total)
                if shorter == 1.0:
                    yield rho, total, leaves
                    return
                del total, leaves
            self.shorter *= shorter
            rho = self.rho()
        warnings.warn(
            f"step: the loss at θ + ρd is not finite for ρ from {float(start):.1e} to {float(rho):.1e}: this step has "
            "no penalty. A guard (clamp, relu(x) + eps) before log, sqrt or a power leaves its domain "
            'there; fastfisher takes it whole with method="double_backprop"',
            AccuracyWarning,
            stacklevel=2,
        )
        yield None

    def _shortening(self, loss: Tensor) -> float:
        """What the step has to be multiplied by: 1 where it is short enough, or where nobody can look without waiting.

        The logits of a default step may move by :data:`REACH` in the root mean square, or the difference is no longer
        linear in the step: the curvature of a softmax changes over a distance of 1.
        """
        if not self.shift.looks or looking_waits(loss) or not bool(self.norm.isfinite()):
            return 1.0  # without a finite norm no loss there would be finite
        if not bool(loss.isfinite()):
            return 0.1
        if self.moved is not None and float(self.moved) > REACH[self.settings.difference]:
            return 0.8 * REACH[self.settings.difference] / float(self.moved)
        return 1.0

    # ---- ∇R ----------------------------------------------------------------------------------------------------------

    def add_to(self, out: Gradients, weight: float | Tensor) -> Tensor:
        """out += weight·scale·∇R, in place, for the parameters in ``gradient``.

        ``out`` may be ``gradient`` itself with a forward difference, which reads each of its tensors once. Where the
        loss at θ + ρd is not finite, a shorter step is taken; where none gives a finite one, nothing is added.
        Returns the relative change of the gradient that the step caused; NaN where there was nothing to change.
        """
        with self.at_finite_loss() as found:
            if found is None:
                return torch.full_like(self.norm, math.nan)
            rho, loss, leaves = found
            scale = weight * self.coefficient(rho)
            squared = self._accumulate(out, loss, leaves, scale)
            del found, loss, leaves
        if self.settings.difference == "central":
            self._add_other_side(out, rho, scale)
        return (squared.sqrt() / self.size).masked_fill(self.norm == 0, math.nan)

    def _add_other_side(self, out: Gradients, rho: Tensor, scale: Tensor) -> None:
        with self.shifted(-rho) as (loss, leaves):
            blind = not self.shift.looks or looking_waits(loss)
            both = blind or bool(loss.isfinite()) or not bool(self.norm.isfinite())
            if both:
                self._accumulate(out, loss, leaves, -scale)
            del loss, leaves
        if not both:  # on one side only: twice the forward difference
            with self.shifted(rho) as (loss, leaves):
                self._accumulate(out, loss, leaves, scale)
                del loss, leaves

    def mixed_gradient(self, weight: float, loss: Callable[[Tensor], Tensor]) -> Gradients:
        """scale·(∇L(θ + ρd) + weight·∇R), one backward for both; ``loss`` is L as a function of the logits."""
        with self.at_finite_loss(lambda rho: weight * self.coefficient(rho), loss) as found:
            if found is not None:
                rho, combined, leaves = found
                with self.gates.arithmetic():
                    total = self.shift.gradients(combined, leaves)
                del combined, leaves
        if found is None:
            with self.shifted(None, torch.zeros_like(self.norm), loss) as (combined, leaves), self.gates.arithmetic():
                return self.shift.gradients(combined, leaves)
        mine, here = ([self.shift.part(named[name]) for name in self.gradient] for named in (total, self.gradient))
        add_(mine, -weight * self.coefficient(rho), here)
        return total

    def _accumulate(self, out: Gradients, loss: Tensor, leaves: Gradients, scale: Tensor) -> Tensor:
        """out += scale·(the gradient of the shifted ``loss`` − ∇ℓ(θ)); returns the squared norm of the difference.

        Raises:
            ValueError: the gradient is not finite although the loss is (on a CPU, where that is seen at once).
        """
        squares: list[Tensor] = []
        waits, level, part = looking_waits(loss), loss.detach(), self.shift.part
        if waits and self.shift.looks:  # nobody looked: a step that left its domain counts as one that changed nothing
            scale = scale * (level - level == 0)

        def add(there: Gradients) -> None:
            to, here = ([real(part(named[name])) for name in there] for named in (out, self.gradient))
            squares.append(ops.axpy_diff(to, [real(part(g)) for g in there.values()], here, scale))

        with self.gates.arithmetic():
            self.shift.backward(loss, leaves, add)
        squared = self.shift.total(torch.stack(squares).sum() if squares else torch.zeros_like(self.norm))
        if self.shift.looks and not waits and not squared.isfinite() and self.size.isfinite():
            raise ValueError(
                f"step: the gradient at θ + ρd is not finite with ρ = {float(self.rho()):.1e}, although the loss is; "
                'take a shorter step, or method="double_backprop"'
            )
        return squared
