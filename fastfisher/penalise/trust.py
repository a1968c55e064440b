"""Whether a finite difference can be trusted: what is looked at once for a kind of batch, and after each step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.engine.gradients import real
from fastfisher.engine.recording import AccuracyWarning
from fastfisher.engine.repeatable import check_repeatable, is_new_kind, look_at
from fastfisher.inputs import Call
from fastfisher.penalise.difference import FiniteDifference
from fastfisher.penalise.rho import CEILING, AdaptiveStep

STRAIGHT = 0.05
"""How much ∇R may change where the step is halved, relative to it; the error of the whole step is about twice that."""

DERIVATIVE = 0.1
"""How much faster or slower the loss may change along the gradient than that says, relative to it."""

FITTED = 4
"""Below so many roundings of a probability, the step's change of 1 - p of a fitted example says little: ∇R was off by
0.05 at 11 of them, and by 0.6 at 1.5 (an MLP that fits 8 examples)."""

PROBES = 8
"""How many random vectors ∇R is compared along."""


def verify(difference: FiniteDifference) -> None:
    """Checks what each step relies on, once for a kind of batch and of step: that the forward can be repeated, and that
    half of the step gives the same ∇R.

    Raises:
        ValueError: a step of length 0 does not give the logits at θ; the module that differs first is named.
    """
    settings = difference.settings
    adaptive = isinstance(settings.step, AdaptiveStep)
    of = difference.inputs.kind if isinstance(difference.inputs, Call) else None
    how = of, settings.frozen, settings.difference, settings.wrt, "adaptive" if adaptive else settings.step
    if not is_new_kind(difference.model, difference.inputs, *how, difference.gates.full_precision):
        return
    check_repeatable(difference.model, lambda: _logits(difference), difference.expected, difference.precision)
    if settings.frozen and not adaptive:
        _check_straight(difference)


def judge(difference: FiniteDifference, relative_change: Tensor) -> None:
    """Warns where the step was too short to measure anything, or caused what is no curvature; the host waits."""
    settings, change = difference.settings, float(relative_change)
    changed = f"{float(difference.rho()):.1e} changed the gradient by {change:.1e} of its norm"
    if not isinstance(settings.step, AdaptiveStep) and not settings.frozen and change < 0.05:
        _warn(
            f"step: with free gates a step of {float(difference.rho()):.1e} changed the gradient by only {change:.1e} "
            "of its norm; so short a step measures the noise of single kinks and can destroy training. Use "
            'step="auto", or gates="frozen", which is right for short steps.'
        )
    floor = min(0.1, 50 * torch.finfo(difference.precision).eps)
    if change < floor:
        _warn(
            f"step: {changed}, less than {floor:.0e}, where the rounding of {difference.precision} shows; use a longer "
            "step or a higher precision"
        )
    elif _is_fitted(difference, change):
        _warn(
            f"step: {changed}, which the rounding of the softmax hides: the loss is {float(difference.level):.1e}, "
            "and the gradient 1 - p of a fitted example moves in steps of that rounding. The data are fitted; use "
            'float64, or fastfisher.penalty with method="double_backprop"'
        )
    if settings.default_step and change > CEILING:
        _warn(
            f"step: {changed}. So short a step with frozen gates changes it little, unless the gradient almost "
            "vanishes: the model may have kinks that cannot be replayed. fastfisher.penalty with "
            'method="double_backprop" is exact'
        )


def _is_fitted(difference: FiniteDifference, change: float) -> bool:
    """Whether the change of the gradient is of the size of the rounding of a probability."""
    drawn = isinstance(difference.labels, Tensor)
    return drawn and change * float(difference.level) < FITTED * difference.spacing


def _check_straight(difference: FiniteDifference) -> None:
    """Warns where half of the step gives another ∇R: kinks that were not replayed, a curvature that changes over the
    step, or rounding. The two are compared by their products with a few random vectors, which takes no memory."""
    with difference.at_finite_loss() as found:
        if found is None:
            return
        rho, ahead = found[0], found[1].detach().double()
        del found
    _check_derivative(difference, rho, ahead)
    whole, half = _sketch(difference, rho), _sketch(difference, 0.5 * rho)
    size = torch.linalg.vector_norm(whole)
    some = (size != 0) & difference.norm.isfinite()  # a gradient that is not finite has nothing that is next to it
    away = torch.where(some, torch.linalg.vector_norm(2 * half - whole) / size, 0.0)

    def look(bend: float) -> None:
        if not bend <= STRAIGHT:  # or it is not finite on one side
            _warn(
                f"step: half of the step {float(rho):.1e} gives a gradient of R that differs by about "
                f"{100 * bend:.0f} %, so that neither can be trusted. The model may have kinks that cannot be "
                "replayed, or curve within the step (log, sqrt or a power next to 0), or its rounding shows: try a "
                'shorter step or a longer one, float64, or fastfisher.penalty with method="double_backprop"'
            )

    look_at(difference.model, away, look)


def _check_derivative(difference: FiniteDifference, rho: Tensor, ahead: Tensor) -> None:
    """Warns where the gradient is not the derivative of the loss, so that its differences are no second derivative: a
    custom ``autograd.Function`` whose backward is not that of its forward (a reversed gradient).

    The loss at both ends of the step (``ahead`` at θ + ρd) says how fast it really changes; rounding of the logits is
    allowed for.
    """
    d = difference
    by = d.gradient if d.settings.of_parameters else d.unweighed
    products = [(real(x).double() * real(by[name]).double()).sum() for name, x in d.direction.items() if name in by]
    slope = torch.stack(products).sum() / torch.where(d.norm > 0, d.norm, torch.nan)
    with d.shifted(-rho) as (loss, _):
        behind = loss.detach().double()
        del loss, _
    speed = (ahead - behind) / (2 * rho)
    rounding = 32 * torch.finfo(d.precision).eps * d.expected.abs().amax().double() * d.scale / rho
    away = (speed / slope - 1).abs() - (rounding / slope).abs()

    def look(away: float) -> None:
        if away > DERIVATIVE:
            _warn(
                f"model: along its gradient the loss changes by {100 * away:.0f} % more or less than the gradient "
                "says, so that differences of it are no second derivative: an autograd.Function within the model "
                "may have a backward that is not the derivative of its forward (a reversed or straight-through "
                'gradient). Use method="double_backprop"'
            )

    look_at(d.model, away, look)


def _logits(difference: FiniteDifference) -> Tensor:
    """The logits of a step of length 0."""
    found: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        found.append(logits.detach())
        return logits.sum()

    with difference.shifted(None, None, keep):
        return found[0]


def _sketch(difference: FiniteDifference, rho: Tensor) -> Tensor:
    """The products of the difference of gradients over ρ with random vectors, float64."""

    def products(gradients: Iterable[Tensor]) -> Tensor:
        flat = [real(g).contiguous() for g in gradients]
        key = torch.zeros(2, dtype=torch.int64, device=difference.device)
        return torch.stack([ops.probe_dot(flat, key + i, "rademacher") for i in range(PROBES)])

    def there(rho: Tensor) -> Tensor:
        with difference.shifted(rho) as (loss, leaves), difference.gates.arithmetic():
            return products(difference.shift.gradients(loss, leaves).values())

    if difference.settings.difference == "central":
        return (there(rho) - there(-rho)) / 2
    return there(rho) - products(difference.gradient.values())


def _warn(message: str) -> None:
    warnings.warn(message, AccuracyWarning, stacklevel=3)
