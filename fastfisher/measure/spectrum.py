"""The largest eigenvalues of the Hessian, by Lanczos' method on Hessian-vector products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.checks import check_choice, check_count, check_number
from fastfisher.engine.layers import chunks
from fastfisher.engine.random_state import RandomState
from fastfisher.engine.rollback import undoing
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, subject_of
from fastfisher.measure.mean_loss import BatchLoss, Labelled, measuring
from fastfisher.ops.sampled import new_key
from fastfisher.outputs import OwnLossFunction
from fastfisher.placement import whole


@dataclass(frozen=True)
class TopEigenvalues:
    """The largest eigenvalues of a symmetric matrix over the parameters.

    Attributes:
        values: the eigenvalues, in descending order; fewer than asked for where there are fewer parameters.
        error_bounds: for each value λ the norm ‖Hv − λv‖ for its unit vector v: an eigenvalue of H is as near as that,
            apart from rounding.
        converged: whether every bound is within the tolerance.
        iterations: how many products with H were taken, each over all examples.
        samples: how many examples H is the mean over.
    """

    values: tuple[float, ...]
    error_bounds: tuple[float, ...]
    converged: bool
    iterations: int
    samples: int

    def __float__(self) -> float:
        return self.values[0]


@undoing
def top_eigenvalues(
    model: nn.Module,
    data: Any,
    targets: Tensor | None = None,
    *,
    k: int = 1,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    batch_size: int | None = None,
    mode: Literal["eval", "keep"] = "eval",
    likelihood: LikelihoodName | Likelihood = "categorical",
    loss: OwnLossFunction | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
) -> TopEigenvalues:
    """The k largest (algebraic) eigenvalues of the Hessian of L(θ), the mean loss: cross-entropy, or another.

    Lanczos' method from a random start, every vector orthogonalised against all earlier ones. A product with H costs
    two to three plain steps; where all examples are one batch, its graph is made once. Memory, beside the graph of a
    batch: at most max(2k + 10, 30) vectors as long as the parameters, for the method then starts anew from the best
    directions it has found. An eigenvalue that occurs more than once may be counted once only.

    Example:
        >>> float(fastfisher.top_eigenvalues(model, x, y)) < 2 / learning_rate  # else gradient descent is unstable

    Args:
        data, targets, mode: as in :func:`fastfisher.trace_hessian`. All batches are kept.
        k: how many eigenvalues.
        tolerance: go on until the error bound of each value is at most this fraction of it, or rounding.
        max_iterations: at most so many products with H; a warning says where they did not suffice.
        generator: where the start comes from; torch's default generator otherwise.
        loss: in the place of a likelihood, a function of (output, targets) to a scalar, the mean over the examples it
            gets, or to one value per example (N,); see docs/likelihoods.md.
        model, params, likelihood, logits_of, batch_size, class_dim: see docs/traces.md, "Arguments in common".

    Returns:
        The eigenvalues with their error bounds; NaN where products with H are not finite.

    Raises:
        ValueError, TypeError, NotImplementedError: as there.
    """
    check_count("k", k)
    check_count("max_iterations", max_iterations)
    check_number("tolerance", tolerance)
    check_choice("mode", mode, ("eval", "keep"))
    subject = subject_of(likelihood, class_dim, logits_of, loss)
    model = whole(model, "the eigenvalues of the Hessian")
    key = new_key(generator, torch.device("cpu"))
    labelled = Labelled.of(model, data, targets, batch_size, subject)
    with measuring(model, params, mode) as parameters:
        hessian = _Hessian(parameters, labelled)
        values, bounds, converged, iterations = _lanczos(hessian, key, k, tolerance, max_iterations)
    if not converged and math.isfinite(values[0]):
        warnings.warn(
            f"top_eigenvalues: not converged after {iterations} products; raise max_iterations or tolerance",
            stacklevel=3,
        )
    return TopEigenvalues(values, bounds, converged, iterations, hessian.samples)


class _Hessian:
    """z ↦ Hz for flat vectors z. Each product sees the same batches and, in train mode, the same dropout."""

    def __init__(self, parameters: dict[str, Tensor], labelled: Labelled) -> None:
        self.parameters, self.losses = parameters, list(labelled.losses(parameters))
        if not self.losses:
            raise ValueError("data: expected at least one example, got none")
        self.rows, self.samples = sum(loss.rows for loss in self.losses), sum(loss.examples for loss in self.losses)
        self.sizes = [p.numel() for p in parameters.values()]
        leaves = list(parameters.values())
        double = any(p.dtype == torch.float64 for p in leaves)
        self.vector = torch.empty(0, dtype=torch.float64 if double else torch.float32, device=leaves[0].device)
        self.random = RandomState.current(frozenset(p.device.index for p in leaves if p.device.type == "cuda"))
        self.only = self._product(self.losses[0]) if len(self.losses) == 1 else None

    def _product(self, loss: BatchLoss) -> Callable[[Sequence[Tensor]], Sequence[Tensor | None]]:
        return loss.hessian_product(way_out="params= with the parameters of the layers after it")

    def __call__(self, z: Tensor) -> Tensor:
        """Hz."""
        parts = zip(torch.split(z, self.sizes), self.parameters.values(), strict=True)
        direction = [part.view_as(p).to(p.dtype) for part, p in parts]
        total = torch.zeros_like(z)
        self.random.restore()
        for loss in self.losses:
            product = self.only or self._product(loss)
            for part, image in zip(torch.split(total, self.sizes), product(direction), strict=True):
                if image is not None:
                    part.add_(image.reshape(-1), alpha=loss.rows / self.rows)
        return total


def _lanczos(
    hessian: _Hessian, key: Tensor, k: int, tolerance: float, max_iterations: int
) -> tuple[tuple[float, ...], tuple[float, ...], bool, int]:
    """Thick-restart Lanczos (Wu and Simon, 2000): values, error bounds, whether they converged, products taken.

    ``basis[:count]`` are orthonormal vectors V with H V = V T + r eᵀ, e the last unit vector and r orthogonal to V. An
    eigenpair (λ, y) of T gives the error bound ‖H V y − λ V y‖ = ‖r‖ |e·y|.
    """
    size = sum(hessian.sizes)
    wanted = min(k, size)
    limit = min(size, max(2 * k + 10, 30))
    basis = hessian.vector.new_empty(limit, size)
    projected = torch.zeros(limit, limit, dtype=torch.float64)  # T
    rounding = 100 * torch.finfo(basis.dtype).eps
    drawn = count = 0
    exhausted = False

    def draw() -> Tensor:
        nonlocal drawn
        z = basis.new_empty(size)
        ops.perturb([z], [], (key + torch.tensor([0, drawn])).to(z.device), 1.0, "gaussian")
        drawn += 1
        _orthogonalise(z, basis[:count])
        return z.div_(torch.linalg.vector_norm(z))

    basis[0] = draw()
    for iteration in range(1, max_iterations + 1):
        rest = hessian(basis[count])
        column = _orthogonalise(rest, basis[: count + 1]).cpu()
        length = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
        if not (math.isfinite(length) and bool(column.isfinite().all())):
            return (math.nan,) * wanted, (math.inf,) * wanted, False, iteration
        projected[: count + 1, count] = projected[count, : count + 1] = column
        count += 1
        ascending, vectors = torch.linalg.eigh(projected[:count, :count])
        ritz, vectors = ascending.flip(0), vectors.flip(1)
        scale = float(ritz.abs().max())
        if count == size:
            length = 0.0  # of a whole basis nothing but rounding is left
        bounds = length * vectors[-1].abs()
        # Where the space that a start leads to is exhausted, other directions may hide eigenvalues: a full basis looks.
        invariant = length <= rounding * scale
        exhausted = exhausted or invariant
        enough = count == limit if exhausted else count >= wanted
        allowed = (tolerance * ritz.abs()).clamp(min=rounding * scale)
        converged = enough and bool((bounds <= allowed)[:wanted].all())
        if converged:
            break
        if count == limit:
            count = wanted + (limit - wanted) // 3
            for part in chunks(size, limit):
                mixed = vectors[:, :count].mT.to(basis.device) @ basis[:, part].double()
                basis[:count, part] = mixed.to(basis.dtype)
            projected.zero_()
            projected.diagonal()[:count] = ritz[:count]
        basis[count] = draw() if invariant else rest / length
    return tuple(ritz[:wanted].tolist()), tuple(bounds[:wanted].tolist()), converged, iteration


def _orthogonalise(vector: Tensor, basis: Tensor) -> Tensor:
    """Takes the parts along orthonormal ``basis`` out of ``vector``, in place; returns their lengths, float64."""
    lengths = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for _ in range(2):  # the second pass takes out what the rounding of the first has left
        found = torch.zeros_like(lengths)
        for part in chunks(len(vector), len(basis)):
            found += basis[:, part].double() @ vector[part].double()
        for part in chunks(len(vector), len(basis)):
            vector[part] -= (found @ basis[:, part].double()).to(vector.dtype)
        lengths += found
    return lengths
