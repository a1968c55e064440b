"""What a likelihood says beside explicit sums over all labels, for one with classes and one without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastfisher
from fastfisher.labels import KINDS, LabelName, Rows, labels_of
from fastfisher.likelihoods import CATEGORICAL, Chosen, Likelihood, Reduction, Signs
from fastfisher.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")


class Bernoulli(Likelihood):
    """One yes or no for each element, p = σ(output): a likelihood without a dimension of classes."""

    def fit(self, output: Tensor, targets: Any, **how: Any) -> Tensor:
        fitting: Tensor = targets.to(output.dtype)
        return fitting

    def loss(self, output: Tensor, labels: Chosen, reduction: Reduction = "mean") -> Tensor:
        if isinstance(labels, Signs):  # its derivative is √(p(1 − p)) ε
            each = 2 * labels.tensor * output.sigmoid().sqrt().clamp(max=1 - 1e-12).asin()
        else:
            each = F.binary_cross_entropy_with_logits(output, labels, reduction="none")
        return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        logits = torch.stack([torch.zeros_like(output), output], -1)
        return CATEGORICAL.draw(logits, key, first).to(output.dtype)

    def draw_signs(self, output: Tensor, key: Tensor, first: int = 0) -> Signs:
        return Signs(reference.rademacher_signs(output.numel(), 1, key, first).view(output.shape))

    def root(self, output: Tensor) -> Iterator[Tensor]:
        p = output.sigmoid()
        yield (p * (1 - p)).sqrt()


def fisher(likelihood: Likelihood, output: Tensor) -> Tensor:
    """Of each row as (rows, row, row), by the sum over all labels."""
    if likelihood is CATEGORICAL:
        p = output.softmax(-1).flatten(0, -2)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]
    p = output.sigmoid().flatten()
    return (p * (1 - p))[:, None, None]


LIKELIHOODS: dict[str, Likelihood] = {"categorical": CATEGORICAL, "bernoulli": Bernoulli()}
SHAPES = [(5, 4), (3, 2, 4)]


def output_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rows_of(likelihood: Likelihood, gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]) if likelihood.row_dims else gradient.reshape(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_columns_of_the_root_make_up_the_fisher_information(name: str, shape: tuple[int, ...]) -> None:
    likelihood, output = LIKELIHOODS[name], output_of(*shape)
    columns = [rows_of(likelihood, column) for column in likelihood.root(output)]
    assert len(columns) == (3 if likelihood.row_dims else 1)
    total = sum((r[:, :, None] * r[:, None] for r in columns), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(total, fisher(likelihood, output))


@pytest.mark.parametrize("labels", ["sampled", "rademacher"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_drawn_cotangents_have_the_covariance_of_the_fisher_information(name: str, labels: LabelName) -> None:
    likelihood, one = LIKELIHOODS[name], output_of(1, 4)
    draws = 20_000
    rows = Rows(likelihood, one.expand(draws, 4).contiguous(), key=torch.tensor([1, 2]))
    (cotangent,) = KINDS[labels].cotangents(rows)
    found = cotangent.mT @ cotangent / draws
    expected = fisher(likelihood, one)
    expected = expected[0] if likelihood.row_dims else torch.diag(expected.flatten())
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * float(expected.max()) / draws**0.5)
    assert float(cotangent.mean(0).abs().max()) < 5 * float(expected.max() / draws) ** 0.5


@pytest.mark.parametrize("labels", ["sampled", "uniform", "rademacher"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_penalty_and_measurements_have_the_same_labels(name: str, shape: tuple[int, ...], labels: LabelName) -> None:
    """The gradient of the loss is the cotangent, of a part of the rows too, and of the loss taken again elsewhere."""
    likelihood, output, key = LIKELIHOODS[name], output_of(*shape), torch.tensor([3, 4])
    if labels == "uniform" and name == "bernoulli":
        with pytest.raises(ValueError, match='labels: got "uniform", which Bernoulli has none of'):
            KINDS[labels].loss(Rows(likelihood, output, key=key))
        return
    rows = Rows(likelihood, output.requires_grad_(), key=key)
    loss, chosen = KINDS[labels].loss(rows)
    (gradient,) = torch.autograd.grad(loss, output)
    (cotangent,) = KINDS[labels].cotangents(Rows(likelihood, output.detach(), key=key))
    torch.testing.assert_close(gradient * likelihood.shape_of_labels(output).numel(), cotangent)
    torch.testing.assert_close(likelihood.loss(output, chosen), loss)
    first = likelihood.shape_of_labels(output)[1:].numel()
    (rest,) = KINDS[labels].cotangents(Rows(likelihood, output.detach()[1:], key=key, first=first))
    torch.testing.assert_close(rest, cotangent[1:])


@pytest.mark.parametrize("labels", ["sampled", "uniform", "rademacher", "exact", "true", "given"])
def test_rows_that_do_not_count_have_no_part(labels: str) -> None:
    output, targets = output_of(3, 2, 4).requires_grad_(), torch.tensor([[0, -100], [1, 2], [-100, -100]])
    kind = labels_of(targets.clamp(min=0) if labels == "given" else labels)
    rows = Rows(CATEGORICAL, output, targets, torch.tensor([5, 6]))
    for cotangent in kind.cotangents(rows):
        assert bool((cotangent[targets == -100] == 0).all()) and CATEGORICAL.counted(output, targets) == 3
    if labels != "exact":
        loss, chosen = kind.loss(rows)
        (gradient,) = torch.autograd.grad(loss, output)
        assert bool((gradient[targets == -100] == 0).all())
        torch.testing.assert_close(3 * gradient, cotangent)
        torch.testing.assert_close(CATEGORICAL.loss(output, chosen, "none").sum() / 3, loss)


def test_the_expectation_over_all_labels_is_no_label() -> None:
    model, x = torch.nn.Linear(4, 3).double(), output_of(5, 4)
    calls: list[Callable[[], Any]] = [
        lambda: fastfisher.penalty(model, x, labels="exact"),
        lambda: fastfisher.FisherPenalty(model, 0.1, labels="exact"),  # type: ignore[arg-type]
        lambda: fastfisher.grad_inner_products(model, x, x, labels="exact"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"got .exact., which is an expectation over all"):
            call()


def test_uniform_labels_are_measured() -> None:
    """In the mean over many draws ‖∇ℓ(x_i, y)‖² has the mean over the classes y."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3).double(), output_of(6, 4)
    each = [fastfisher.per_example_grad_norms(model, x, labels=torch.full((6,), c)) for c in range(3)]
    found = fastfisher.per_example_grad_norms(model, x, labels="uniform", draws=4000)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - torch.stack(each).mean(0)).abs() < 4 * error).all())
    trace = fastfisher.trace_fisher(model, x, labels="uniform", draws=400)
    assert abs(trace.value - float(torch.stack(each).mean())) < 4 * trace.standard_error
    assert trace.draws == 400 and "labels=uniform" in trace.method
    inner = fastfisher.grad_inner_products(model, x, x, labels="uniform")
    assert inner.per_example is not None
