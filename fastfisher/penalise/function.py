"""The Fisher penalty R(θ) = ‖g‖², g = ∇_θ mean_i ℓ(x_i, ŷ_i), as a scalar that backpropagates (eq. 3, 5 and 6)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfisher.checks import check_flags
from fastfisher.data import paired
from fastfisher.distributed.single import Single
from fastfisher.engine.gates import Gates
from fastfisher.engine.gradients import autograd_gradients, real_dtype
from fastfisher.engine.rollback import undoing
from fastfisher.engine.twice import second_derivatives
from fastfisher.inputs import Call, Inputs, check_examples, differentiable, map_inputs, requiring_grad, take_rows
from fastfisher.labels import Given, Labels, labels_of
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, subject_of
from fastfisher.model import chosen_names, couples_examples, trainable_parameters
from fastfisher.ops.sampled import new_key
from fastfisher.outputs import Output, OwnLossFunction
from fastfisher.penalise.derivative import squared_parts, value_of
from fastfisher.penalise.difference import FiniteDifference, gradient_at
from fastfisher.penalise.norm import OfNorm
from fastfisher.penalise.options import EACH, Method, Settings
from fastfisher.penalise.point import IN_FULL_PRECISION, Point, forward_of_copy
from fastfisher.penalise.rho import AdaptiveStep, Difference, Step
from fastfisher.penalise.trust import judge
from fastfisher.penalise.trust import verify as verify_difference
from fastfisher.placement import whole
from fastfisher.slow_path import warn_slow_path
from fastfisher.targets import check_counted


@undoing
def penalty(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor | None = None,
    *,
    labels: Literal["sampled", "true", "uniform", "rademacher"] | Tensor = "sampled",
    method: Method = "double_backprop",
    gates: Literal["frozen", "free"] | Gates = "frozen",
    wrt: Literal["parameters", "inputs"] = "parameters",
    logits: Tensor | None = None,
    reduction: Literal["batch", "first"] = "batch",
    step: Step = "auto",
    difference: Difference = "forward",
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    verify: bool = True,
    likelihood: LikelihoodName | Likelihood = "categorical",
    loss: OwnLossFunction | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    of: Literal["squared_norm", "norm"] | Callable[[Tensor], Tensor] = "squared_norm",
) -> Tensor:
    """The gradient-norm penalty R as a scalar that backpropagates into the model's parameters.

    ``reduction="batch"``: R = ‖(1/B) Σ_i ∇_θ ℓ(x_i, ŷ_i)‖² (eq. 3); ``"first"``: R = ‖∇_θ ℓ(x_1, ŷ_1)‖² (eq. 6);
    ``wrt="inputs"``: R = (1/B) Σ_i ‖∂ℓ(x_i, y_i)/∂x_i‖². Names of the paper: FP is ``labels="sampled"``, GP ``"true"``,
    GP_r ``"uniform"``, GP_x ``wrt="inputs", labels="true"``. With ``of=`` it is another function φ of the norm, and
    with ``labels="true", loss=`` the norm is that of the gradient of a loss of your own.

    Example:
        >>> loss = F.cross_entropy(model(x), y) + 0.1 * fastfisher.penalty(model, x)
        >>> loss.backward()

    In a training loop :class:`fastfisher.FisherPenalty` costs less: it shares the forward with the training loss.

    Args:
        model: any module from ``inputs`` to logits (..., C), or to an object with ``.logits``. Its parameters and
            buffers are not touched: running statistics of BatchNorm do not move, whichever forward this function runs
            itself.
        inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first; see
            docs/data.md.
        targets: class indices, or class probabilities, where ``labels="true"``; by default the ``labels`` in a mapping
            of inputs. Positions with the index −100 (padding) have no part in R, whichever the labels.
        labels: whose gradient is penalised: ŷ drawn from the model, the targets, uniform labels, or a given tensor of
            labels. Labels are held fixed when R is differentiated, as in the paper. "rademacher" is not the paper's:
            the gradient of 2⟨√p, ε⟩ with random signs ε in place of a drawn label, whose penalty has the same
            expectation and, once the data are fitted, a far smaller variance.
        method: "double_backprop" (exact) or "finite_difference" (cheaper: the gradient once more at θ + ρd, when the
            backward reaches R).
        gates: with finite differences, "frozen" replays the ReLU masks, max-pool indices and their like of the forward
            at θ, and short steps converge to double backprop; "free" takes a long step across the kinks, a
            regulariser of its own. A :class:`fastfisher.Gates` recorded by ``record_gates`` around the caller's
            forward goes with ``logits``.
        wrt: what the gradient is taken with respect to.
        logits: the logits of a forward of the caller's on these inputs, to be shared. With finite differences pass the
            ``gates`` recorded in it too; without them the forward is run again, and a SlowPathWarning says so.
        step: ρ, the length of the shift; "auto" takes ``FROZEN_STEP`` for frozen gates, and for free gates searches
            the step that changes the gradient by about half of its norm, which may cost further passes (an
            :class:`AdaptiveStep` kept between calls costs none).
        difference: "forward", or "central" (one more forward and backward, an error of ρ² instead of ρ).
        generator: where the labels are drawn; torch's default generator otherwise.
        params: the parameters whose gradient's norm is penalised; all trainable ones otherwise.
        verify: with finite differences, look once for each kind of batch (shapes, dtypes, modes) whether a step of
            length 0 gives the same logits, and refuse a model that gives others; and whether half of the step gives the
            same gradient, and warn where it does not. Costs four forwards and two backwards, once.
        likelihood: the distribution that the output stands for: "categorical", "bernoulli", "gaussian", "poisson", or
            an object; see docs/likelihoods.md.
        loss: with ``labels="true"``, in the place of a likelihood: a function of (what the model returns, targets) to a
            scalar; or to one value for each example (B,), of which the mean is taken, as ``wrt="inputs"`` and
            ``reduction="first"`` need it.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.
        logits_of: finds the output of the distribution in what the model returns.
        of: φ, the function of the norm ‖g‖: "squared_norm", "norm", or a function of a tensor of norms, element by
            element. R = φ(‖g‖), or with ``wrt="inputs"`` (1/B) Σ_i φ(‖∂ℓ_i/∂x_i‖): ``lambda n: (n - 1) ** 2`` is the
            penalty of WGAN-GP.

    Under autocast in bfloat16 or float16 a finite difference with ``step="auto"`` takes its forwards in the precision
    of the parameters: rounding in 8 bits would hide the difference. With a number as ``step`` it keeps the autocast.

    Returns:
        R, a scalar. Differentiable once ("finite_difference") or as often as the model is ("double_backprop").

    Raises:
        ValueError: an argument is none of the above, or targets are missing or do not fit; the argument is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    each = EACH if wrt == "inputs" or reduction == "first" else None
    subject = subject_of(likelihood, class_dim, logits_of, loss, each=each)
    settings = Settings(labels, method, gates, wrt, reduction, step, difference, subject, OfNorm(of))
    model = whole(model, "R (FisherPenalty has that of the batch of all)")
    check_flags(verify=verify)
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    call, true = paired(model, inputs, targets, subject.reading)
    call = map_inputs(call, differentiable)
    true = None if subject.is_loss else true  # the call has them
    true = differentiable(true) if isinstance(true, Tensor) else true
    kind = labels_of(differentiable(labels) if isinstance(labels, Tensor) else labels)
    kind.check_targets(true, settings.likelihood)
    check_examples(call)
    logits, settings = _shared(logits, settings)
    alone = not couples_examples(model) and not subject.is_loss  # which may compare it with the others
    if settings.first_only and logits is None and alone:
        call, kind, true = take_rows(call, slice(1)), kind.of_first(), None if true is None else true[:1]
    point = _point(model, settings, trainable, call, logits)
    _draw(point, settings, kind, true, generator, model)
    if not settings.differs:
        with second_derivatives('method="finite_difference"'):
            own = squared_parts(point, settings, trainable, chosen)
        return value_of(own, point, settings) if own else point.loss.detach() * 0
    with point.gates.arithmetic():
        gradient, direction = gradient_at(
            point, settings, trainable, chosen, autograd_gradients, retain_graph=point.kept
        )
    if not gradient:
        return point.loss.detach() * 0
    finite = FiniteDifference(model, point, settings, gradient, direction, world=Single())
    point.release()
    if verify:
        verify_difference(finite)
    return _Penalty.apply(finite, list(gradient), *(trainable[name] for name in gradient))  # type: ignore[no-any-return, no-untyped-call]


def _shared(logits: Tensor | None, settings: Settings) -> tuple[Tensor | None, Settings]:
    """The logits of the caller's forward, the classes last, where it can be shared: else None, and gates of its own.

    Raises:
        ValueError: they are no logits with a graph, or gates came without them.
    """
    gates = settings.gates
    if logits is None:
        if isinstance(gates, Gates):
            raise ValueError("logits: expected the logits of the forward in which gates= was recorded, got None")
        return None, settings
    reading = settings.subject.reading
    if not isinstance(reading, Output):
        raise ValueError("logits: expected None with loss=, which is a part of the forward that is taken again")
    if not (isinstance(logits, Tensor) and logits.dim() > 0):
        raise ValueError("logits: expected those of a forward, (..., C)")
    if isinstance(gates, Gates) and settings.default_step and gates.autocast is not None:
        warn_slow_path(f"penalty runs the forward again: {IN_FULL_PRECISION.format(gates.autocast)}")
        return None, dataclasses.replace(settings, gates="frozen")
    if settings.differs and not isinstance(gates, Gates):
        warn_slow_path(
            "penalty runs the forward again: finite differences repeat the random draws and gates of the forward that "
            "gave the logits. Run it within fastfisher.record_gates and pass gates= beside logits=."
        )
        return None, settings
    if not logits.requires_grad:
        raise ValueError("logits: expected those of a forward with their graph, got some that require no gradient")
    return reading.laid_out(logits), settings


def _point(
    model: nn.Module, settings: Settings, trainable: dict[str, Tensor], call: Call, logits: Tensor | None
) -> Point:
    """The forward at θ: the caller's, or one of its own."""
    if logits is not None:
        gates = settings.gates if isinstance(settings.gates, Gates) else Gates(None, frozen=False)
        return Point(logits, call, settings.first_only, gates, kept=True)
    inputs = call if settings.of_parameters else requiring_grad(call)
    return forward_of_copy(
        model, settings, trainable, inputs, settings.first_only, full_precision=settings.default_step
    )


def _draw(
    point: Point,
    settings: Settings,
    kind: Labels,
    targets: Any,
    generator: torch.Generator | None,
    model: nn.Module,
) -> None:
    """Draws the labels of the point; those that are given have to fit its logits, and so have the targets."""
    subject = settings.subject
    kind = kind.fitted(subject.likelihood, point.logits, class_dim=subject.reading.class_dim, model=model)
    targets = None if targets is None else subject.fit(point.logits, targets, model=model)
    if settings.first_only:
        kind, targets = kind.of_first(), None if targets is None else targets[:1]
    if targets is not None:
        check_counted(targets)
    if isinstance(kind, Given):
        check_counted(kind.given, "labels")
    with torch.enable_grad():
        point.draw(kind, settings.likelihood, targets, new_key(generator, point.values.device) if kind.drawn else None)


class _Penalty(torch.autograd.Function):
    """R as a value whose gradient is taken by finite differences, when and if the backward comes."""

    @staticmethod
    def forward(ctx: Any, difference: FiniteDifference, names: list[str], *parameters: Tensor) -> Tensor:
        ctx.difference, ctx.names = difference, names
        ctx.save_for_backward(*parameters)  # autograd then raises if one was changed in between
        return difference.value.to(real_dtype(parameters[0].dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        parameters = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        out = {name: torch.zeros_like(parameters[name]) for name in ctx.difference.gradient}
        difference: FiniteDifference = ctx.difference
        if difference.settings.step != "auto" or difference.settings.frozen:
            change = difference.add_to(out, grad.double())
            difference.adapt(change)
            judge(difference, change)
        else:  # nothing is known of the step yet: retake it until the gradient's change is near its target
            step = AdaptiveStep()
            difference.settings = dataclasses.replace(difference.settings, step=step)
            for _ in range(8):
                relative = difference.add_to(out, grad.double())
                difference.adapt(relative)
                if math.isnan(relative) or 0.5 * step.target <= float(relative) <= 2 * step.target:
                    break
                for tensor in out.values():
                    tensor.zero_()
        return (None, None, *(out.get(name) for name in ctx.names))
