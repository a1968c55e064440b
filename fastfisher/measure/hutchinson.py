"""Tr(H) = E[zᵀHz] for random probes z (Hutchinson, 1990): zᵀHz three ways, and their mean with its error."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.distributed.single import Single
from fastfisher.engine.checkpointing import graph_nodes, refuse_recomputed
from fastfisher.engine.gates import record_gates
from fastfisher.engine.taylor import NoRule, Tape
from fastfisher.engine.twice import differentiable_gradients, second_derivatives
from fastfisher.measure.estimate import TraceEstimate
from fastfisher.measure.mean_loss import BatchLoss, Labelled, check_after, forward
from fastfisher.model import call_copy
from fastfisher.slow_path import warn_slow_path

Distribution = Literal["gaussian", "rademacher"]

DIFFERENCE_STEP = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""ε of the central difference (g(θ + εz) − g(θ − εz))/2ε, by the precision of the parameters.

In float32, on SimpleCNN, VGG-11, a ResNet and a GELU network, at initialisation and after 30 steps, the largest error
of four probes, over their mean size, was 2e-4 to 9e-4 at 1e-5, 3e-5 to 3e-4 at 1e-4, and 7e-4 to 1e-2 at 1e-3. The
error grows with ε² and with the rounding over ε; the other steps are scaled by the cube root of their precision.
"""

QuadraticForm = Callable[[Tensor], Tensor]
"""zᵀHz of one batch's mean loss for the probe z of a key."""


@dataclass
class Hutchinson:
    """The mean over probes of zᵀHz of all data, or of what ``product`` leaves of it.

    Attributes:
        data, parameters, world: of what, in which parameters, together with which processes.
        key: of the probes, which are counted: each batch gets fresh ones.
        probes: how many at a time.
        product: "taylor", "autograd" or "finite_difference"; "reduced", without the terms of mean 0; "split", without
            the Gauss-Newton part, too; "ggn", that part alone.
        used: how many probes were drawn.
        samples: how many examples the data have.
        fallbacks: why another product served than was asked for.
    """

    data: Labelled
    parameters: dict[str, Tensor]
    world: Single
    key: Tensor
    probes: int
    distribution: Distribution
    product: str
    used: int = 0
    samples: int = 0
    fallbacks: dict[str, str] = field(default_factory=dict)

    def estimate(self, tolerance: float | None, fisher: TraceEstimate | None) -> TraceEstimate:
        """The mean, beside Tr(F) where that is given, once its error is at most ``tolerance`` of it."""
        values: list[float] = []
        while True:
            values += self._values()
            found = self._so_far(values, fisher)
            if tolerance is None or found.standard_error <= tolerance * abs(found.value):
                return found

    def _values(self) -> list[float]:
        """The next probes' zᵀHz over the data of all processes.

        Raises:
            ValueError: there are no data, or a value is not finite.
        """
        sums, rows, samples = [0.0] * self.probes, 0.0, 0
        device = next(iter(self.parameters.values())).device
        for loss in self.data.losses(self.parameters):
            quadratic_form = self._quadratic_form(loss)
            for i in range(self.probes):
                key = (self.key + torch.tensor([0, self.used])).to(device)  # kernels read it there
                sums[i] += loss.rows * float(quadratic_form(key))
                self.used += 1
            rows, samples = rows + loss.rows, samples + loss.examples
        mine = torch.tensor([*sums, rows, samples, self.used], dtype=torch.float64, device=device)
        everyone = self.world.gather(mine).view(self.world.size, -1)
        *sums, all_rows, all_samples, _ = everyone.sum(0).tolist()
        self.samples, self.used = int(all_samples), int(everyone[:, -1].max())
        if all_rows == 0:
            raise ValueError("data: expected at least one example, got none")
        values = [value / all_rows for value in sums]
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"model: expected finite second derivatives, got {sum(values)} by hvp={self.product!r} (as of a "
                "square root at zero, or where PyTorch's own second derivative errs); "
                'hvp="finite_difference" needs first ones only'
            )
        return values

    def _quadratic_form(self, loss: BatchLoss) -> QuadraticForm:
        """That of one batch; where an operation has no rule, autograd serves from now on."""
        if self.product == "ggn":
            return gauss_newton(loss, self.distribution)
        if self.product == "finite_difference":
            return by_difference(loss, self.distribution)
        if self.product != "autograd":
            try:
                return by_taylor(loss, self.distribution, self.product)
            except NoRule as reason:
                if self.product == "split":
                    raise
                warn_slow_path(f'hvp="taylor": {reason}; hvp="autograd" serves, at three times the cost or more')
                self.fallbacks, self.product = {"hvp": str(reason)}, "autograd"
        return by_autograd(loss, self.distribution)

    def _so_far(self, values: list[float], fisher: TraceEstimate | None) -> TraceEstimate:
        mean, degrees = statistics.fmean(values), len(values) - 1.0
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        name = f"hutchinson, {self.distribution} probes"
        name = f"reduced {name}" if self.product in ("reduced", "split") else f"{name}, hvp={self.product}"
        name = f"ggn, {self.distribution} probes" if self.product == "ggn" else name
        fallbacks = self.fallbacks
        if fisher is not None:
            mean, error = mean + fisher.value, math.hypot(error, fisher.standard_error)
            degrees = _degrees_of_sum(error, degrees, fisher)
            name, fallbacks = f"{fisher.method} + {name}", dict(fisher.fallbacks)
        return TraceEstimate(mean, error, self.samples, len(values), name, fallbacks=fallbacks, degrees=degrees)


def _degrees_of_sum(error: float, degrees: float, fisher: TraceEstimate) -> float:
    """The degrees of freedom of the ``error`` of a sum of Tr(F) and of a part of its own ``degrees``, independent of
    it, by Satterthwaite's rule."""
    if fisher.standard_error == 0:
        return degrees
    rest = math.sqrt(max(0.0, error**2 - fisher.standard_error**2))
    if not rest:
        return min(degrees, fisher.degrees)
    return error**4 / (rest**4 / max(degrees, 1e-9) + fisher.standard_error**4 / fisher.degrees)


# ---- zᵀHz of one batch -----------------------------------------------------------------------------------------------


def by_taylor(loss: BatchLoss, distribution: str, terms: str) -> QuadraticForm:
    """All of zᵀHz ("taylor"), without what has mean 0 ("reduced"), and without the Gauss-Newton part too ("split")."""
    tape = Tape(loss.parameters)
    logits = forward(loss.model, loss.inputs, tape)
    targets = loss.fitting(logits.detach())
    with torch.enable_grad():
        with tape:
            value = loss.at(logits, targets)
        tape.finish(value, reduced=terms != "taylor", until=logits if terms == "split" else None)
    z = _like(loss.parameters)

    def quadratic_form(key: Tensor) -> Tensor:
        if tape.nodes:  # else every direction gives the same
            ops.perturb(z, [], key, 1.0, distribution)
        return tape.curvature(z)

    return quadratic_form


def by_autograd(loss: BatchLoss, distribution: str) -> QuadraticForm:
    """z times the derivative of gᵀz."""
    product, z = loss.hessian_product(way_out='hvp="finite_difference"'), _like(loss.parameters)

    def quadratic_form(key: Tensor) -> Tensor:
        ops.perturb(z, [], key, 1.0, distribution)
        terms = [(h.double() * x).sum() for h, x in zip(product(z), z, strict=True) if h is not None]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)

    return quadratic_form


def gauss_newton(loss: BatchLoss, distribution: str) -> QuadraticForm:
    """zᵀJᵀ(∇²ℓ)Jz: J the Jacobian of what the model returns, ∇²ℓ the Hessian of the loss in that (Schraudolph, 2002).

    Jz by a second backward through the first, which is linear in its cotangent.
    """
    leaves, way_out = list(loss.parameters.values()), 'method="auto"'
    with torch.enable_grad(), second_derivatives(way_out):
        outputs, logits = loss.outputs()
        slopes = differentiable_gradients(loss.at(logits, loss.fitting(logits)), outputs, way_out=way_out)
        if not any(slope is not None and slope.requires_grad for slope in slopes):
            warnings.warn(
                "loss: it is linear in what the model returns, so that its Gauss-Newton matrix is 0. Where the model "
                "makes the loss itself (output.loss), make it of the output in its place: loss=lambda output, targets: "
                "F.cross_entropy(output.logits, targets)",
                stacklevel=2,
            )
        cotangents = [torch.zeros_like(x, requires_grad=True) for x in outputs]
        joined = torch.stack([(x * u).sum() for x, u in zip(outputs, cotangents, strict=True)]).sum()
        pulled = differentiable_gradients(joined, leaves, way_out=way_out)
    z = _like(loss.parameters)

    def products(gradients: Sequence[Tensor | None], directions: Sequence[Tensor], sources: list[Tensor]) -> Any:
        """Σ ⟨g, d⟩ as a function of the sources, differentiated there."""
        terms = [(g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None and g.requires_grad]
        if not terms:
            return [torch.zeros_like(x) for x in sources]
        with second_derivatives(way_out):
            return torch.autograd.grad(torch.stack(terms).sum(), sources, retain_graph=True, materialize_grads=True)

    def quadratic_form(key: Tensor) -> Tensor:
        ops.perturb(z, [], key, 1.0, distribution)
        moved = products(pulled, z, cotangents)
        curved = products(slopes, moved, outputs)
        return torch.stack([(h.double() * v).sum() for h, v in zip(curved, moved, strict=True)]).sum()

    return quadratic_form


def by_difference(loss: BatchLoss, distribution: str) -> QuadraticForm:
    """A central difference of gradients, with the gates of the forward at θ replayed."""
    model, parameters = loss.model, loss.parameters
    check = check_after(model)
    with torch.enable_grad(), record_gates(model) as gates:  # as in the replays: without, some modules take other paths
        logits = call_copy(model, {}, loss.inputs)
    list(map(refuse_recomputed, graph_nodes(logits)))
    targets = loss.fitting(check(logits))
    del logits  # with its graph
    shifted = _like(parameters)
    coarsest = max((p.dtype for p in parameters.values()), key=lambda dtype: torch.finfo(dtype).eps)
    step = DIFFERENCE_STEP[coarsest]

    def slope(key: Tensor, step: float) -> Tensor:
        leaves = [x.detach() for x in shifted]
        ops.perturb(leaves, [p.detach() for p in parameters.values()], key, step, distribution)
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            with gates.replay():
                logits = call_copy(model, dict(zip(parameters, leaves, strict=True)), loss.inputs)
            value = loss.at(logits, targets)
        found = torch.autograd.grad(value, leaves, materialize_grads=True)
        return ops.probe_dot(list(found), key, distribution)

    return lambda key: (slope(key, step) - slope(key, -step)) / (2 * step)


def _like(parameters: dict[str, Tensor]) -> list[Tensor]:
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters.values()]
