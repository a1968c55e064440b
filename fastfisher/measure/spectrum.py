"""Leading curvature: the largest eigenvalues of the Hessian, and the covariance of gradients.

The Hessian H by Lanczos' method on Hessian-vector products. The covariance K by its Gram matrix: with gradients g_i as
the rows of A, centred, K = AᵀA/n has the non-zero eigenvalues of AAᵀ/n, which is as large as there are gradients.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.checks import check_flags, is_count, is_number
from fastfisher.data import Batches, Pair
from fastfisher.engine.gates import RandomState
from fastfisher.engine.layers import chunks, computing, flat_rows
from fastfisher.engine.rollback import undoing
from fastfisher.labels import KINDS, Labels, Rows, labels_of
from fastfisher.likelihoods import CATEGORICAL
from fastfisher.measure.hessian import Pairs, hessian_product, labelled, measuring
from fastfisher.measure.traces import Side, one_backward, parameter_names
from fastfisher.model import Call, call_model, count_examples, eval_mode, trainable_parameters
from fastfisher.ops.sampled import new_key
from fastfisher.placement import whole

EXAMPLES_AT_ONCE = 128
"""How many examples of tensors go through the model at once for per-example gradients."""

GRADIENT_ELEMENTS = 1 << 26
"""How many elements of mini-batch gradients may exist at once on each side of the Gram matrix: 256 MiB in float32."""

# ---- the largest eigenvalues of the Hessian --------------------------------------------------------------------------


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
    class_dim: int | None = None,
) -> TopEigenvalues:
    """The k largest (algebraic) eigenvalues of the Hessian of L(θ) = mean over examples of −log softmax(model(x))[y].

    Lanczos' method from a random start, every vector orthogonalised against all earlier ones. A product with H costs
    two to three plain steps; where all examples are one batch, its graph is made once. Memory, beside the graph of a
    batch: at most max(2k + 10, 30) vectors as long as the parameters, for the method then starts anew from the best
    directions it has found. The vectors have the parameters' precision, at least float32, since
    products with H are no better than that; inner products are summed in float64.

    An eigenvalue that occurs more than once may be counted once only.

    Example:
        >>> float(fastfisher.top_eigenvalues(model, x, y)) < 2 / learning_rate  # else gradient descent is unstable

    Args:
        model, data, targets, params, mode, class_dim: as in :func:`fastfisher.trace_hessian`. All batches are kept.
        k: how many eigenvalues.
        tolerance: go on until the error bound of each value is at most this fraction of it, or rounding.
        max_iterations: at most so many products with H; a warning says where they did not suffice.
        generator: where the start comes from; torch's default generator otherwise.
        batch_size: how many examples go through the model at once where tensors are given; all by default.

    Returns:
        The eigenvalues with their error bounds; NaN where products with H are not finite.

    Raises:
        ValueError: an unknown option, no examples, targets that do not fit, a parameter that is not the model's, or
            logits that are NaN or +inf.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
        NotImplementedError: a parameter is complex, the forward changes parameters, or something has no second
            derivative, as for ``hvp="autograd"`` in :func:`fastfisher.trace_hessian`.

    The model is as before afterwards, also after an exception.
    """
    for name, number in (("k", k), ("max_iterations", max_iterations), ("batch_size", batch_size)):
        if not (is_count(number) or (name == "batch_size" and number is None)):
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")
    if not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")
    if not (isinstance(mode, str) and mode in ("eval", "keep")):
        raise ValueError(f'mode: expected "eval" or "keep", got {mode!r}')
    model = whole(model, "the eigenvalues of the Hessian")
    key = new_key(generator, torch.device("cpu"))
    device = next(iter(trainable_parameters(model).values())).device
    batches = labelled(model, data, targets, batch_size, device, class_dim)
    with measuring(model, params, mode) as parameters:
        hessian = _Hessian(model, parameters, batches)
        values, bounds, converged, iterations = _lanczos(hessian, key, k, tolerance, max_iterations)
    if not converged and math.isfinite(values[0]):
        warnings.warn(
            f"top_eigenvalues: not converged after {iterations} products; raise max_iterations or tolerance",
            stacklevel=3,
        )
    return TopEigenvalues(values, bounds, converged, iterations, hessian.samples)


class _Hessian:
    """z ↦ Hz for flat vectors z. Each product sees the same batches and, in train mode, the same dropout."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], batches: Pairs) -> None:
        self.model, self.parameters = model, parameters
        self.batches: list[tuple[int, Call, Tensor]] = []
        self.samples = 0
        for inputs, targets in batches:
            count = CATEGORICAL.counted_targets(targets, inputs.class_dim)
            if count:
                self.batches.append((count, inputs, targets))
                self.samples += len(targets)
        if not self.batches:
            raise ValueError("data: expected at least one example, got none")
        self.rows = sum(count for count, _, _ in self.batches)
        self.sizes = [p.numel() for p in parameters.values()]
        leaves = list(parameters.values())
        double = any(p.dtype == torch.float64 for p in leaves)
        self.vector = torch.empty(0, dtype=torch.float64 if double else torch.float32, device=leaves[0].device)
        self.random = RandomState.current(frozenset(p.device.index for p in leaves if p.device.type == "cuda"))
        self.only = self._product(*self.batches[0][1:]) if len(self.batches) == 1 else None

    def _product(self, inputs: Call, targets: Tensor) -> Callable[[Sequence[Tensor]], Sequence[Tensor | None]]:
        way_out = "params= with the parameters of the layers after it"
        return hessian_product(self.model, self.parameters, inputs, targets, way_out=way_out)

    def __call__(self, z: Tensor) -> Tensor:
        """Hz."""
        parts = zip(torch.split(z, self.sizes), self.parameters.values(), strict=True)
        direction = [part.view_as(p).to(p.dtype) for part, p in parts]
        total = torch.zeros_like(z)
        self.random.restore()
        for count, inputs, targets in self.batches:
            product = self.only or self._product(inputs, targets)
            for part, image in zip(torch.split(total, self.sizes), product(direction), strict=True):
                if image is not None:
                    part.add_(image.reshape(-1), alpha=count / self.rows)
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


# ---- the covariance of gradients -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientCovariance:
    """K = (1/n) Σ_i (g_i − ḡ)(g_i − ḡ)ᵀ of n gradients, which has at most n − 1 non-zero eigenvalues.

    Attributes:
        trace: Tr(K) = (1/n) Σ_i ‖g_i − ḡ‖².
        eigenvalues: the non-zero ones, in descending order. One counts as zero up to max(10 n ε₆₄, (10 ε)²) times the
            mean of ‖g_i‖²: the rounding of the Gram matrix in float64, and of gradients of precision ε.
        gradients: n.
        batch_size: of how many examples each g_i is the mean.
        fallbacks: which parameters went a slower way, and why, by name.
    """

    trace: float
    eigenvalues: tuple[float, ...]
    gradients: int
    batch_size: int
    fallbacks: dict[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        """λ¹_K, 0 where K is."""
        return self.eigenvalues[0] if self.eigenvalues else 0.0

    @property
    def smallest_nonzero(self) -> float:
        """λ*_K; NaN where there is none. Over the first of :func:`top_eigenvalues` it is λ*_K / λ¹_H."""
        return self.eigenvalues[-1] if self.eigenvalues else math.nan

    @property
    def conditioning(self) -> float:
        """λ*_K / λ¹_K: 1 where the gradients vary alike in all directions; NaN where they do not vary."""
        return self.smallest_nonzero / self.largest if self.eigenvalues else math.nan


@undoing
def gradient_covariance(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int | None = None,
    labels: Literal["true", "sampled"] = "true",
    samples: int | None = None,
    params: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    verify: bool = True,
) -> GradientCovariance:
    """The covariance K of the gradients of single examples, or of mini-batches; eval mode meanwhile.

    Nothing as large as examples x parameters is made. Per example, the inner products ⟨g_i, g_j⟩ come layer by layer
    from two batches at a time: what their layers saw is kept, and a layer's gradients are made for a few examples at
    once where they have to be made. Of mini-batches, at most two groups of gradients of GRADIENT_ELEMENTS elements each
    (or of one gradient) exist at once. In both cases what does not fit is made again: b batches or groups take
    b (b + 1)/2 forwards and backwards of one. The Gram matrix is summed in float64.

    Example:
        >>> covariance = fastfisher.gradient_covariance(model, (x, y), samples=25 * 128, batch_size=128)
        >>> covariance.trace, covariance.largest, covariance.conditioning

    Args:
        model: any module from inputs to logits (N, …, C).
        data: a batch or an iterable of batches, as in :func:`fastfisher.trace_fisher`; its batches are kept. Targets
            are class indices (an example with −100 has gradient 0) or class probabilities. Inputs alone where labels
            are sampled.
        batch_size: None or 1 for the gradients of single examples; B for those of the mean loss of B examples, which
            are the batches of an iterable. What is left at the end and too few is left out.
        labels: "true" takes the targets; "sampled" draws ŷ ~ p(y|x), once for each example.
        samples: at most so many examples: a random choice of a pair's, the first of an iterable's.
        params: the parameters whose gradient is meant; all trainable ones otherwise.
        generator: where examples and labels are drawn; torch's default generator otherwise.
        class_dim: as in :func:`fastfisher.trace_fisher`.
        verify: as in :func:`fastfisher.per_example_grad_norms`.

    Returns:
        Trace and eigenvalues; NaN where a gradient is not finite.

    Raises:
        ValueError: an argument is none of the above, or there is no example; it is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    kind = labels_of(labels, ("true", "sampled"), given=False)
    if not (batch_size is None or is_count(batch_size)):
        raise ValueError(f"batch_size: expected an integer >= 1 or None, got {batch_size!r}")
    check_flags(verify=verify)
    model = whole(model, "the covariance of gradients")
    names = parameter_names(model, params)
    together = batch_size if batch_size is not None and batch_size != 1 else None
    source = Batches(
        model,
        data,
        next(model.parameters()).device,
        class_dim=class_dim,
        samples=samples,
        batch_size=EXAMPLES_AT_ONCE if together is None else together,
        generator=generator,
    )
    fallbacks: dict[str, str] = {}
    with eval_mode(model):
        batches = [_labels(model, pair, kind, generator) for pair in source]
        if together is not None:
            batches = _complete(batches, together)
        if not batches:
            raise ValueError("data: expected at least one example, got none")

        def seen(pair: Pair) -> Side:
            side = one_backward(model, pair[0], names, KINDS["true"], CATEGORICAL, pair[1], verify=verify)
            fallbacks.update(side.capture.fallbacks)
            return side

        if together is None:
            gram = _gram(batches, seen, Side.gram)
        else:
            found = dict(model.named_parameters())
            elements = sum(found[name].numel() for name in names)
            groups = [batches[rows] for rows in chunks(len(batches), elements, GRADIENT_ELEMENTS)]
            gram = _gram(groups, lambda group: torch.stack([_mean(seen(pair), names) for pair in group]), _products)
        precision = max(torch.finfo(p.dtype).eps for name, p in model.named_parameters() if name in names)
    trace, eigenvalues = _spectrum(gram, precision)
    return GradientCovariance(trace, eigenvalues, len(gram), together or 1, fallbacks)


def _labels(model: nn.Module, pair: Pair, labels: Labels, generator: torch.Generator | None) -> Pair:
    """The batch with the labels of its gradients, drawn here once so that gradients can be taken again."""
    inputs, targets = pair
    if labels.drawn:
        with torch.no_grad():
            logits = call_model(model, inputs)
            if targets is not None:  # those of -100 are left out
                targets = CATEGORICAL.fit(logits, targets, class_dim=inputs.class_dim, model=model)
            CATEGORICAL.check(logits)
            drawn = labels.choose(Rows(CATEGORICAL, logits, targets, new_key(generator, logits.device)))
        assert isinstance(drawn, Tensor)
        if inputs.class_dim is None:  # it was certain for these logits; the shape of drawn labels says nothing
            inputs = dataclasses.replace(inputs, class_dim=-1)
        targets = drawn
    elif targets is None:
        raise ValueError('data: expected targets beside the inputs with labels="true", got none')
    return inputs, targets


def _complete(batches: list[Pair], size: int) -> list[Pair]:
    """The batches without an incomplete last one."""
    sizes = [count_examples(inputs) for inputs, _ in batches]
    if sizes and sizes[-1] < size:
        batches, sizes = batches[:-1], sizes[:-1]
        if not batches:
            raise ValueError(f"batch_size: expected at most as many as there are examples, got {size}")
    for found in sizes:
        if found != size:
            raise ValueError(f"batch_size: expected that of the batches of data, {found}, got {size}")
    return batches


def _mean(side: Side, names: Iterable[str]) -> Tensor:
    """The gradient of the mean loss of a batch, flat, at least float32."""
    totals = side.totals()
    return torch.cat([flat_rows(computing(totals[name])[None])[0] / side.capture.examples for name in names])


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ in float64, of rows that are too long for a copy in float64."""
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for part in chunks(x.shape[1], len(x) + len(y)):
        total += x[:, part].double() @ y[:, part].double().mT
    return total


Group = TypeVar("Group")
Gradients = TypeVar("Gradients")


def _gram(
    groups: Sequence[Group], make: Callable[[Group], Gradients], products: Callable[[Gradients, Gradients], Tensor]
) -> Tensor:
    """The Gram matrix of all gradients, block by block; those of two groups exist at once."""
    blocks: list[list[Tensor]] = [[torch.empty(0)] * len(groups) for _ in groups]
    for i, group in enumerate(groups):
        mine = make(group)
        for j in range(i, len(groups)):
            blocks[i][j] = products(mine, mine if i == j else make(groups[j]))
            blocks[j][i] = blocks[i][j].mT
        del mine
    return torch.cat([torch.cat(row, 1) for row in blocks]).cpu()


def _spectrum(gram: Tensor, precision: float) -> tuple[float, tuple[float, ...]]:
    """Tr(K) and its non-zero eigenvalues, descending."""
    if not gram.isfinite().all():
        return math.nan, (math.nan,)
    n = len(gram)
    centred = (gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()) / n
    found = torch.linalg.eigvalsh(centred).flip(0)
    zero = max(10 * n * torch.finfo(gram.dtype).eps, (10 * precision) ** 2) * float(gram.diagonal().mean())
    return max(0.0, float(centred.trace())), tuple(found[found > zero].tolist())
