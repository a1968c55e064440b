"""The norms of the gradients of single examples, and their inner products with those of another batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfisher.checks import check_count, check_flags
from fastfisher.data import paired, split
from fastfisher.engine.layers import flat_rows
from fastfisher.engine.rollback import undoing
from fastfisher.inputs import Call, Inputs
from fastfisher.labels import LabelName, Labels, labels_beside
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, Subject, subject_of
from fastfisher.measure.cotangents import Cotangents, Keys
from fastfisher.measure.per_example import Captured, Side
from fastfisher.model import chosen_names, eval_mode, trainable_parameters
from fastfisher.outputs import OwnLossFunction
from fastfisher.placement import placement_of, whole

T = TypeVar("T")

EACH = ", whose norms are wanted"
"""Why a loss of the caller's has to be one value for each example."""


@undoing
def per_example_grad_norms(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor | None = None,
    *,
    labels: LabelName | Tensor = "sampled",
    draws: int = 1,
    squared: bool = True,
    params: Iterable[Tensor] | None = None,
    likelihood: LikelihoodName | Likelihood = "categorical",
    loss: OwnLossFunction | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    verify: bool = True,
) -> Tensor:
    """‖∇_θ ℓ(x_i, ŷ_i)‖² for each example i, with ℓ = −log p(ŷ_i | x_i) summed over the rows of an example.

    About the cost of one forward and backward of the batch; each further draw costs a backward.

    Example:
        >>> norms = fastfisher.per_example_grad_norms(model, x, y, labels="true", squared=False)

    Args:
        inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first.
        targets: class indices (N, …) or class probabilities (N, …, C), where ``labels="true"``; by default the
            ``labels`` in a mapping of inputs. Positions with the index −100 are left out, whichever the labels.
        labels: "sampled", "rademacher", "exact", "true" or "uniform", see docs/traces.md; or a tensor of labels.
        draws: how many independent draws, with one forward in common.
        squared: False for the norms themselves.
        loss: in the place of a likelihood, a function of (output, targets) that returns one loss per example (N,).
            Goes with ``labels="true"``; the output is all that the model returns, and targets may be anything.
        model, params, likelihood, logits_of, generator, class_dim, verify: see docs/traces.md, "Arguments in common".

    Returns:
        float64 (N,), or (draws, N) for more than one draw.

    Raises:
        ValueError, TypeError, NotImplementedError: as there.
    """
    check_flags(squared=squared, verify=verify)
    check_count("draws", draws)
    kind = labels_beside(loss is not None, labels)
    subject = subject_of(likelihood, class_dim, logits_of, loss, each=EACH)
    model = placement_of(model).module  # the norms of this process's examples are right in any case
    names = parameter_names(model, params)
    with eval_mode(model):
        call, targets = paired(model, inputs, targets, subject.reading)
        kind.check_targets(targets, subject.likelihood)
        captured = Captured(model, call, names, verify)
        cotangents = Cotangents(captured.logits, kind, subject, targets, Keys(generator))
        norms = torch.stack([sum(n.values(), captured.zeros()) for n in draws_of(captured, cotangents, draws)])
    norms = norms if squared else norms.sqrt()
    return norms[0] if draws == 1 else norms


def draws_of(
    captured: Captured, cotangents: Cotangents, draws: int, means: list[float] | None = None
) -> Iterator[dict[str, Tensor]]:
    """For each draw, the squared norms of each example's gradient by parameter, float64[N]; then the graph is released.

    With ``means``, ‖mean gradient‖² of each draw is appended to it.
    """
    exact = cotangents.labels.name == "exact"
    for draw in range(draws):
        total: dict[str, Tensor] = {}
        squared_mean = 0.0
        for cotangent, last in with_last(cotangents.draw()):
            retain_graph = not last or draw < draws - 1
            norms, mean = captured.squared_norms(cotangent, retain_graph, means is not None and not exact)
            squared_mean += mean
            total = {name: total[name] + values if total else values for name, values in norms.items()}
        if means is not None:
            if exact:  # labels are independent and their gradients have mean 0
                squared_mean = sum(float(values.sum()) for values in total.values()) / captured.examples**2
            means.append(squared_mean)
        yield total


def with_last(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """The items, each with whether it is the last one."""
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True


@dataclass(frozen=True)
class GradInnerProducts:
    """Inner products between the gradients of two batches.

    Attributes:
        per_example: ⟨g_i, h_i⟩ for the pairs of examples, float64 (N,); None where the batches differ in size.
        mean: ⟨ḡ, h̄⟩ of the mean gradients.
        cosine: ⟨ḡ, h̄⟩ / (‖ḡ‖ ‖h̄‖).
    """

    per_example: Tensor | None
    mean: float
    cosine: float


@undoing
def grad_inner_products(
    model: nn.Module,
    first: Any,
    second: Any,
    *,
    labels: LabelName = "true",
    params: Iterable[Tensor] | None = None,
    likelihood: LikelihoodName | Likelihood = "categorical",
    loss: OwnLossFunction | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    verify: bool = True,
) -> GradInnerProducts:
    """Inner products of the gradients of two batches, such as clean and mislabelled examples (figure 12).

    One forward and backward of each batch, whose layer inputs and output gradients are kept until both are there.

    Args:
        first, second: batches, as in :func:`trace_fisher`: pairs (inputs, targets).
        labels: "true", or "sampled", "uniform" or "rademacher" for drawn ones (the targets may then be None).
        loss: as in :func:`per_example_grad_norms`.
        model, params, likelihood, logits_of, generator, class_dim, verify: see docs/traces.md, "Arguments in common".

    Raises:
        ValueError, TypeError, NotImplementedError: as there.
    """
    kind = labels_beside(loss is not None, labels, ("true", "sampled", "uniform", "rademacher"))
    subject = subject_of(likelihood, class_dim, logits_of, loss, each=EACH)
    check_flags(verify=verify)
    model = whole(model, "the inner product of mean gradients")
    names = parameter_names(model, params)
    with eval_mode(model):
        pairs = [split(model, batch, subject.reading, name) for name, batch in (("first", first), ("second", second))]
        for _, targets in pairs:
            kind.check_targets(targets, subject.likelihood)
        one, two = (one_backward(model, *pair, names, kind, subject, generator, verify) for pair in pairs)
        per_example = one.inner_products(two) if one.of.examples == two.of.examples else None
        mean = norm_one = norm_two = 0.0
        totals = one.totals(), two.totals()
        for name in names:
            g, h = (flat_rows(side[name][None])[0].double() for side in totals)
            g, h = g / one.of.examples, h / two.of.examples
            mean, norm_one, norm_two = mean + float(g @ h), norm_one + float(g @ g), norm_two + float(h @ h)
    size = math.sqrt(norm_one * norm_two)
    return GradInnerProducts(per_example, mean, mean / size if size else math.nan)


def one_backward(
    model: nn.Module,
    inputs: Call,
    targets: Any,
    names: Iterable[str],
    labels: Labels,
    subject: Subject,
    generator: torch.Generator | None = None,
    verify: bool = True,
) -> Side:
    """A capture, one backward of it, and what its layers saw there; the model is in eval mode."""
    captured = Captured(model, inputs, names, verify)
    cotangents = Cotangents(captured.logits, labels, subject, targets, Keys(generator))
    (cotangent,) = cotangents.draw()
    return captured.side(cotangent)


def parameter_names(model: nn.Module, params: Iterable[Tensor] | None) -> list[str]:
    """The chosen parameters in the model's order: that of a set differs between processes, and so would rounding."""
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    return [name for name in trainable if name in chosen]
