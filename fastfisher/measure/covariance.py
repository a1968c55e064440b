"""The covariance of gradients, of single examples or of mini-batches, by their Gram matrix.

With the gradients g_i as the rows of A, centred, K = AᵀA/n has the non-zero eigenvalues of AAᵀ/n, which is as large as
there are gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastfisher.checks import check_count, check_flags
from fastfisher.data import Batches, Pair
from fastfisher.engine.layers import chunks, computing, flat_rows
from fastfisher.engine.rollback import undoing
from fastfisher.inputs import count_examples
from fastfisher.labels import KINDS, Labels, Rows, labels_beside
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, Subject, subject_of
from fastfisher.measure.norms import EACH, one_backward, parameter_names
from fastfisher.measure.per_example import Side
from fastfisher.model import call_model, eval_mode
from fastfisher.ops.sampled import new_key
from fastfisher.outputs import Output, OwnLossFunction
from fastfisher.placement import whole

EXAMPLES_AT_ONCE = 128
"""How many examples of tensors go through the model at once for per-example gradients."""

GRADIENT_ELEMENTS = 1 << 26
"""How many elements of mini-batch gradients may exist at once on each side of the Gram matrix: 256 MiB in float32."""


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
    likelihood: LikelihoodName | Likelihood = "categorical",
    loss: OwnLossFunction | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    verify: bool = True,
) -> GradientCovariance:
    """The covariance K of the gradients of single examples, or of mini-batches.

    Nothing as large as examples x parameters is made. Per example, the inner products ⟨g_i, g_j⟩ come layer by layer
    from two batches at a time. Of mini-batches, at most two groups of gradients of GRADIENT_ELEMENTS elements each (or
    of one gradient) exist at once. In both cases what does not fit is made again: b batches or groups take
    b (b + 1)/2 forwards and backwards of one. The Gram matrix is summed in float64.

    Example:
        >>> covariance = fastfisher.gradient_covariance(model, (x, y), samples=25 * 128, batch_size=128)
        >>> covariance.trace, covariance.largest, covariance.conditioning

    Args:
        data: as in :func:`fastfisher.trace_fisher`; its batches are kept. An example with −100 has gradient 0.
        batch_size: None or 1 for the gradients of single examples; B for those of the mean loss of B examples, which
            are the batches of an iterable. What is left at the end and too few is left out.
        labels: "true" takes the targets; "sampled" draws ŷ ~ p(y|x), once for each example.
        samples: at most so many examples: a random choice of a pair's, the first of an iterable's.
        loss: as in :func:`fastfisher.per_example_grad_norms`.
        generator: where examples and labels are drawn; torch's default generator otherwise.
        model, params, likelihood, logits_of, class_dim, verify: see docs/traces.md, "Arguments in common".

    Returns:
        Trace and eigenvalues; NaN where a gradient is not finite.

    Raises:
        ValueError, TypeError, NotImplementedError: as there.
    """
    kind = labels_beside(loss is not None, labels, ("true", "sampled"), given=False)
    subject = subject_of(likelihood, class_dim, logits_of, loss, each=EACH)
    check_count("batch_size", batch_size, optional=True)
    check_flags(verify=verify)
    model = whole(model, "the covariance of gradients")
    together = batch_size if batch_size is not None and batch_size != 1 else None
    gradients = _Gradients(model, parameter_names(model, params), kind.of(subject.likelihood), verify)
    device, size = next(model.parameters()).device, together or EXAMPLES_AT_ONCE
    how: dict[str, Any] = {"reading": subject.reading, "samples": samples, "generator": generator}
    source = Batches(model, data, device, batch_size=size, **how)
    with eval_mode(model):
        batches = [_labelled(model, pair, kind, subject, generator) for pair in source]
        batches = batches if together is None else _complete(batches, together)
        if not batches:
            raise ValueError("data: expected at least one example, got none")
        gram = gradients.gram_of_examples(batches) if together is None else gradients.gram_of_means(batches)
    trace, eigenvalues = _spectrum(gram, gradients.precision)
    return GradientCovariance(trace, eigenvalues, len(gram), together or 1, gradients.fallbacks)


class _Gradients:
    """The gradients whose covariance is wanted, made as often as it takes.

    Attributes:
        precision: ε of the coarsest of the parameters.
        fallbacks: which parameters went a slower way, and why.
    """

    def __init__(self, model: nn.Module, names: list[str], likelihood: Likelihood, verify: bool) -> None:
        self.model, self.names, self.likelihood, self.verify = model, names, likelihood, verify
        found = dict(model.named_parameters())
        self.elements = sum(found[name].numel() for name in names)
        self.precision = max(torch.finfo(found[name].dtype).eps for name in names)
        self.fallbacks: dict[str, str] = {}

    def gram_of_examples(self, batches: list[Pair]) -> Tensor:
        """⟨g_i, g_j⟩ of the gradients of all examples."""
        return _gram(batches, self._side, Side.gram)

    def gram_of_means(self, batches: list[Pair]) -> Tensor:
        """⟨g_i, g_j⟩ of the gradients of the batches' mean losses."""
        groups = [batches[rows] for rows in chunks(len(batches), self.elements, GRADIENT_ELEMENTS)]
        return _gram(groups, lambda group: torch.stack([self._mean(pair) for pair in group]), _products)

    def _side(self, pair: Pair) -> Side:
        subject = Subject(self.likelihood, pair[0].reading)
        side = one_backward(self.model, *pair, self.names, KINDS["true"], subject, verify=self.verify)
        self.fallbacks.update(side.capture.fallbacks)
        return side

    def _mean(self, pair: Pair) -> Tensor:
        """The gradient of the mean loss of a batch, flat, at least float32."""
        side = self._side(pair)
        totals = side.totals()
        return torch.cat([flat_rows(computing(totals[name])[None])[0] / side.of.examples for name in self.names])


def _labelled(
    model: nn.Module, pair: Pair, labels: Labels, subject: Subject, generator: torch.Generator | None
) -> Pair:
    """The batch with the labels of its gradients, drawn here once so that gradients can be taken again."""
    inputs, targets = pair
    if labels.drawn:
        with torch.no_grad():
            logits = call_model(model, inputs)
            if targets is not None:  # those of -100 are left out
                targets = subject.fit(logits, targets, model=model)
            likelihood = labels.of(subject.likelihood)
            likelihood.check(logits)
            drawn = labels.choose(Rows(likelihood, logits, targets, new_key(generator, logits.device)))
        assert isinstance(drawn, Tensor)
        if isinstance(reading := inputs.reading, Output) and reading.class_dim is None:
            # It was certain for these logits; the shape of drawn labels says nothing.
            inputs = dataclasses.replace(inputs, reading=dataclasses.replace(reading, class_dim=-1))
        targets = drawn
    elif targets is None and subject.likelihood.needs_targets:
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
