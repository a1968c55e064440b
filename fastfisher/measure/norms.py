"""The norms of the gradients of single examples, and their inner products with those of another batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfisher.checks import check_count, check_flags
from fastfisher.data import paired, split
from fastfisher.engine.layers import flat_rows
from fastfisher.engine.rollback import undoing
from fastfisher.inputs import Call, Inputs
from fastfisher.labels import LabelName, Labels
from fastfisher.likelihoods import EachLoss, Likelihood
from fastfisher.measure.cotangents import Cotangents, Keys, labels_and_likelihood
from fastfisher.measure.per_example import Captured, Side
from fastfisher.model import check_class_dim, chosen_names, eval_mode, trainable_parameters
from fastfisher.placement import placement_of, whole

T = TypeVar("T")


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
    loss: EachLoss | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    verify: bool = True,
) -> Tensor:
    """‖∇_θ ℓ(x_i, ŷ_i)‖² for each example i, with ℓ = −log p(ŷ_i | x_i) summed over the positions of an example.

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
        loss: instead of the cross-entropy, a function of (logits, targets) that returns one loss per example (N,).
            Goes with ``labels="true"``; logits are as the model gives them, and targets may be anything.
        model, params, generator, class_dim, verify: see docs/traces.md, "Arguments in common".

    Returns:
        float64 (N,), or (draws, N) for more than one draw.

    Raises:
        ValueError, TypeError, NotImplementedError: as there.
    """
    check_flags(squared=squared, verify=verify)
    check_class_dim(class_dim)
    check_count("draws", draws)
    kind, likelihood = labels_and_likelihood(labels, loss, class_dim)
    model = placement_of(model).module  # the norms of this process's examples are right in any case
    names = parameter_names(model, params)
    with eval_mode(model):
        call, targets = paired(model, inputs, targets, of_loss(class_dim, loss))
        kind.check_targets(targets, likelihood)
        captured = Captured(model, call, names, verify)
        cotangents = Cotangents(captured.logits, kind, likelihood, targets, Keys(generator), call.class_dim)
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
    loss: EachLoss | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    verify: bool = True,
) -> GradInnerProducts:
    """Inner products of the gradients of two batches, such as clean and mislabelled examples (figure 12).

    One forward and backward of each batch, whose layer inputs and output gradients are kept until both are there.

    Args:
        first, second: batches, as in :func:`trace_fisher`: pairs (inputs, targets).
        labels: "true", or "sampled", "uniform" or "rademacher" for drawn ones (the targets may then be None).
        loss: as in :func:`per_example_grad_norms`.
        model, params, generator, class_dim, verify: see docs/traces.md, "Arguments in common".

    Raises:
        ValueError, TypeError, NotImplementedError: as there.
    """
    check_class_dim(class_dim)
    kind, likelihood = labels_and_likelihood(labels, loss, class_dim, ("true", "sampled", "uniform", "rademacher"))
    check_flags(verify=verify)
    model = whole(model, "the inner product of mean gradients")
    names = parameter_names(model, params)
    with eval_mode(model):
        pairs = [
            split(model, batch, of_loss(class_dim, loss), name)
            for name, batch in (("first", first), ("second", second))
        ]
        for _, targets in pairs:
            kind.check_targets(targets, likelihood)
        one, two = (one_backward(model, *pair, names, kind, likelihood, generator, verify) for pair in pairs)
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
    likelihood: Likelihood,
    generator: torch.Generator | None = None,
    verify: bool = True,
) -> Side:
    """A capture, one backward of it, and what its layers saw there; the model is in eval mode."""
    captured = Captured(model, inputs, names, verify)
    cotangents = Cotangents(captured.logits, labels, likelihood, targets, Keys(generator), inputs.class_dim)
    (cotangent,) = cotangents.draw()
    return captured.side(cotangent)


def parameter_names(model: nn.Module, params: Iterable[Tensor] | None) -> list[str]:
    """The chosen parameters in the model's order: that of a set differs between processes, and so would rounding."""
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    return [name for name in trainable if name in chosen]


def of_loss(class_dim: int | None, loss: EachLoss | None) -> int | None:
    """What is said of the classes; a loss of the caller's decides itself what the dimensions of its logits are."""
    return -1 if class_dim is None and loss is not None else class_dim
