"""What a likelihood says beside explicit sums and moments, and what penalty and measurements make of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher.labels import KINDS, LabelName, Rows, labels_of
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.categorical import CATEGORICAL
from fastfisher.likelihoods.subject import likelihood_of

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANCE = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


class Exponential(fastfisher.Likelihood):
    """One of a user's own: y ~ rate·exp(−rate·y), the output being log(rate)."""

    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.exp() * labels - output

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        draws = []
        for row, value in enumerate(output.flatten(), first):
            generator = torch.Generator().manual_seed(int(1000 * key[0] + 100_000 * key[1]) + row)
            draws.append(-torch.rand((), generator=generator, dtype=output.dtype).log() * (-value).exp())
        return torch.stack(draws).view(output.shape)

    def root(self, output: Tensor) -> Iterator[Tensor]:
        yield torch.ones_like(output)


LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": CATEGORICAL,
    "bernoulli": likelihood_of("bernoulli"),
    "gaussian": fastfisher.Gaussian(VARIANCE),
    "poisson": likelihood_of("poisson"),
}
SHAPES = [(5, 4), (3, 2, 4)]
SIGNIFICANCE = 1e-4  # of each statistical test


def fisher(likelihood: Likelihood, output: Tensor) -> Tensor:
    """Of each row as (rows, row, row): the covariance of the gradient over all labels."""
    if likelihood.row_dims:
        p = output.softmax(-1).flatten(0, -2)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]
    variance: dict[type[Likelihood], Callable[[], Tensor]] = {
        fastfisher.Bernoulli: lambda: output.sigmoid() * (1 - output.sigmoid()),
        fastfisher.Gaussian: lambda: (1 / VARIANCE).expand_as(output),
        fastfisher.Poisson: output.exp,
        Exponential: lambda: torch.ones_like(output),
    }
    return variance[type(likelihood)]().flatten()[:, None, None]


def output_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def targets_of(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if name == "categorical":
        return torch.randint(shape[-1], shape[:-1], generator=generator)
    if name == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.randint(2 if name == "bernoulli" else 5, shape, generator=generator)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()),
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y.to(z.dtype)),
    "gaussian": lambda z, y: ((y - z).square() / (2 * VARIANCE)).mean(),
    "poisson": lambda z, y: F.poisson_nll_loss(z, y.to(z.dtype)),
}
"""What PyTorch has for each: the mean over all rows."""


def rows_of(likelihood: Likelihood, gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]) if likelihood.row_dims else gradient.reshape(-1, 1)


def network(outputs: int = 4, act: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), act(), nn.Linear(6, outputs)).double()


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """(examples, outputs, parameters), one backward for each number."""
    parameters = list(model.parameters())
    rows = []
    for example in x:
        out = model(example[None]).flatten()
        each = [torch.autograd.grad(o, parameters, retain_graph=True) for o in out]
        rows.append(torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each]))
    return torch.stack(rows)


def explicit_fisher(model: nn.Module, likelihood: Likelihood, x: Tensor) -> Tensor:
    """The Fisher matrix of the parameters, a mean over examples."""
    jacobian, output = jacobians(model, x), model(x).detach()
    blocks = fisher(likelihood, output)
    per_example = torch.stack([torch.block_diag(*part) for part in blocks.view(len(x), -1, *blocks.shape[1:])])
    return (jacobian.mT @ per_example @ jacobian).mean(0)


def explicit_hessian(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())

    def of(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in parameters.values()])
        state = {name: part.view_as(p) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
        return loss(torch.func.functional_call(model, state, (x,)))

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    found: Tensor = torch.autograd.functional.hessian(of, flat)  # type: ignore[no-untyped-call]
    return found


# ---- what a likelihood says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_columns_of_the_root_make_up_the_fisher_information(name: str, shape: tuple[int, ...]) -> None:
    likelihood, output = LIKELIHOODS[name], output_of(*shape)
    columns = [rows_of(likelihood, column) for column in likelihood.root(output)]
    assert len(columns) == (3 if likelihood.row_dims else 1) == likelihood.columns(output)
    total = sum((r[:, :, None] * r[:, None] for r in columns), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(total, fisher(likelihood, output))


@pytest.mark.parametrize("labels", ["sampled", "rademacher"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_drawn_cotangents_have_the_covariance_of_the_fisher_information(name: str, labels: LabelName) -> None:
    likelihood, one = LIKELIHOODS[name], output_of(1, 4)
    draws = 20_000
    rows = Rows(likelihood, one.expand(draws, 4).contiguous(), key=torch.tensor([1, 2]))
    (cotangent,) = KINDS[labels].cotangents(rows)
    products = cotangent[:, :, None] * cotangent[:, None]
    expected = fisher(likelihood, one)
    expected = expected[0] if likelihood.row_dims else torch.diag(expected.flatten())
    error = products.std(0) / draws**0.5
    assert bool(((products.mean(0) - expected).abs() <= 5 * error + 1e-12).all())
    assert bool((cotangent.mean(0).abs() <= 5 * cotangent.std(0) / draws**0.5).all())


@pytest.mark.parametrize("labels", ["sampled", "uniform", "rademacher"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_penalty_and_measurements_have_the_same_labels(name: str, shape: tuple[int, ...], labels: LabelName) -> None:
    """The gradient of the loss is the cotangent, of a part of the rows too, and of the loss taken again elsewhere."""
    likelihood, output, key = LIKELIHOODS[name], output_of(*shape), torch.tensor([3, 4])
    if labels == "uniform" and name in ("gaussian", "poisson"):
        with pytest.raises(ValueError, match=f'labels: got "uniform", which likelihood={name.title()} has no way'):
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


def draws_of(name: str, value: float, count: int = 40_000) -> Tensor:
    output = torch.full((count,), value, dtype=torch.float64)
    return LIKELIHOODS[name].draw(output, torch.tensor([7, 8]))


def chi_squared(observed: Tensor, expected: Tensor) -> float:
    """The p-value of counts."""
    statistic = ((observed - expected).square() / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic.double() / 2))


@pytest.mark.parametrize("value", [-3.0, -0.4, 0.0, 2.0])
def test_bernoulli_labels_have_their_probability(value: float) -> None:
    y = draws_of("bernoulli", value)
    assert set(y.tolist()) <= {0.0, 1.0}
    p = 1 / (1 + math.exp(-value))
    observed = torch.tensor([float((y == 0).sum()), float((y == 1).sum())])
    assert chi_squared(observed, torch.tensor([1 - p, p]) * len(y)) > SIGNIFICANCE


@pytest.mark.parametrize("rate", [0.02, 1.0, 6.5, 80.0, 3e4])
def test_poisson_labels_have_their_distribution(rate: float) -> None:
    y = draws_of("poisson", math.log(rate))
    assert bool((y == y.round()).all()) and bool((y >= 0).all())
    low, high = max(0, int(rate - 3 * rate**0.5)), int(rate + 3 * rate**0.5) + 1
    edges = torch.linspace(low, high, min(20, high - low + 1)).floor().unique().double()
    below = torch.special.gammaincc(edges + 1, torch.full_like(edges, rate))  # P(Y ≤ edge)
    p = torch.cat([below[:1], below.diff(), 1 - below[-1:]])
    observed = torch.histc(torch.bucketize(y, edges).double(), len(p), 0, len(p) - 1)
    enough = p * len(y) > 5
    pooled = lambda x: torch.cat([x[enough], x[~enough].sum(0, keepdim=True)]) if not enough.all() else x  # noqa: E731
    expected = pooled(p * len(y))
    assert chi_squared(pooled(observed)[expected > 0], expected[expected > 0]) > SIGNIFICANCE


def test_gaussian_labels_have_their_distribution() -> None:
    """By Kolmogorov's distance, whose limit distribution gives the p-value."""
    likelihood = fastfisher.Gaussian(4.0)
    y = likelihood.draw(torch.full((40_000,), 1.5, dtype=torch.float64), torch.tensor([7, 8])).sort().values
    cdf = torch.special.ndtr((y - 1.5) / 2)
    steps = torch.arange(len(y) + 1) / len(y)
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max())) * len(y) ** 0.5
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k**2 * distance**2) for k in range(1, 50))
    assert p > SIGNIFICANCE


@pytest.mark.parametrize("value", [-40.0, -1.0, 0.0, 1e-3, 60.0, 1e4])
def test_signs_of_bernoulli_keep_their_precision_where_the_label_is_certain(value: float) -> None:
    z = torch.tensor([value], dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(LIKELIHOODS["bernoulli"].signs(z, torch.ones(1)).sum(), z, create_graph=True)
    exact = 1 / (2 * math.cosh(value / 2)) if abs(value) < 700 else 0.0
    assert float(slope) == pytest.approx(exact, rel=1e-6)
    (second,) = torch.autograd.grad(slope.sum(), z)
    eps = torch.finfo(torch.float32).eps  # of terms as large as the slope, which cancel around 0
    assert float(second) == pytest.approx(-math.tanh(value / 2) * exact / 2, rel=1e-5, abs=exact * eps)


# ---- what penalty and measurements make of it ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_fisher_trace_is_that_of_the_explicit_matrix(name: str, shape: tuple[int, ...]) -> None:
    model: nn.Module = network()
    if len(shape) == 3:  # two rows of outputs for each example
        model = nn.Sequential(*network(8), nn.Unflatten(1, (2, 4)))
    matrix = explicit_fisher(model, LIKELIHOODS[name], X)
    exact = fastfisher.trace_fisher(model, X, likelihood=LIKELIHOODS[name], labels="exact")
    assert exact.value == pytest.approx(float(matrix.trace()), rel=1e-9) and exact.standard_error == 0
    for labels in ("sampled", "rademacher"):
        torch.manual_seed(3)
        found = fastfisher.trace_fisher(model, X, likelihood=LIKELIHOODS[name], labels=labels, draws=400)
        assert abs(found.value - exact.value) < 4.5 * found.standard_error


@pytest.mark.parametrize("labels", ["sampled", "rademacher"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_error_bars_are_calibrated(name: str, labels: LabelName) -> None:
    """Of 200 intervals of 95 %, some 190 hold the trace; fewer than 176 do with a probability below 1e-4."""
    model = network()
    truth = fastfisher.trace_fisher(model, X, likelihood=LIKELIHOODS[name], labels="exact").value
    held = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"labels": labels, "draws": 20, "generator": generator, "verify": False}
        low, high = fastfisher.trace_fisher(model, X, likelihood=LIKELIHOODS[name], **options).interval()
        held += low <= truth <= high
    assert held >= 176


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_norms_at_true_labels_are_those_of_a_loop(name: str) -> None:
    model, y = network(), targets_of(name, 6, 4)
    found = fastfisher.per_example_grad_norms(model, X, y, likelihood=LIKELIHOODS[name], labels="true")
    for i in range(6):
        loss = LOSSES[name](model(X[i : i + 1]), y[i : i + 1]) * (1 if name == "categorical" else 4)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert float(found[i]) == pytest.approx(float(sum(g.square().sum() for g in gradients)), rel=1e-9)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_hessian_trace_is_that_of_the_explicit_matrix(name: str, act: type[nn.Module]) -> None:
    model, y = network(act=act), targets_of(name, 6, 4)
    matrix = explicit_hessian(model, lambda z: LOSSES[name](z, y), X)
    truth, likelihood = float(matrix.trace()), LIKELIHOODS[name]
    found = fastfisher.trace_hessian(model, X, y, likelihood=likelihood)
    assert found.value == pytest.approx(truth, rel=1e-9) and found.standard_error < 1e-9 * abs(truth)
    assert found.method.startswith("fisher, labels=exact")
    assert ("reduced" in found.method) == (act is nn.Tanh)
    for how in ({"method": "hutchinson"}, {"method": "reduced"}, {"hvp": "autograd"}, {"hvp": "finite_difference"}):
        torch.manual_seed(4)
        estimate = fastfisher.trace_hessian(
            model, X, y, likelihood=likelihood, probes=100, **{"method": "hutchinson", **how}
        )
        assert abs(estimate.value - truth) < 4.5 * estimate.standard_error + 1e-6
    top = torch.linalg.eigvalsh(matrix)[-2:].flip(0)
    values = fastfisher.top_eigenvalues(model, X, y, likelihood=likelihood, k=2, tolerance=1e-6).values
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), top, rtol=1e-4, atol=1e-8)
    gauss_newton = explicit_fisher(model, likelihood, X).trace() / (1 if likelihood.row_dims else 4)
    ggn = fastfisher.trace_hessian(model, X, y, likelihood=likelihood, method="ggn")
    assert ggn.value == pytest.approx(float(gauss_newton), rel=1e-9)


@pytest.mark.parametrize("labels", ["sampled", "rademacher", "true"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_penalty_by_differences_is_that_of_double_backprop(name: str, act: type[nn.Module], labels: Any) -> None:
    model, y, likelihood = network(act=act), targets_of(name, 6, 4), LIKELIHOODS[name]
    gradients = {}
    for method in ("double_backprop", "finite_difference"):
        value = fastfisher.penalty(
            model, X, y, likelihood=likelihood, labels=labels, method=method,  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        found = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        gradients[method] = torch.cat([g.flatten() for g in found])
    exact, found_ = gradients["double_backprop"], gradients["finite_difference"]
    assert float((found_ - exact).norm() / exact.norm()) < 1e-5
    assert float(exact.norm()) > 1e-6


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_step_trains_the_mean_loss_of_the_likelihood(name: str) -> None:
    model, y = network(), targets_of(name, 6, 4)
    penalty = fastfisher.FisherPenalty(model, 0.0, likelihood=LIKELIHOODS[name])
    loss = penalty.backward(X, y)
    found = [p.grad for p in model.parameters()]
    expected = LOSSES[name](model(X), y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, list(model.parameters()))))
    penalty = fastfisher.FisherPenalty(model, 0.1, likelihood=LIKELIHOODS[name], every=1)
    penalty.backward(X, y)
    rows = 6 if name == "categorical" else 24
    assert penalty.value is not None and penalty.trace_estimate is not None
    assert float(penalty.trace_estimate) == pytest.approx(rows * float(penalty.value))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_gradients_have_their_covariance_and_inner_products(name: str) -> None:
    model, y, likelihood = network(), targets_of(name, 6, 4), LIKELIHOODS[name]
    inner = fastfisher.grad_inner_products(model, (X, y), (X, y), likelihood=likelihood)
    norms = fastfisher.per_example_grad_norms(model, X, y, likelihood=likelihood, labels="true")
    torch.testing.assert_close(inner.per_example, norms)
    covariance = fastfisher.gradient_covariance(model, (X, y), likelihood=likelihood)
    assert covariance.trace == pytest.approx(float(norms.mean()) - inner.mean, rel=1e-9)
    drawn = fastfisher.gradient_covariance(model, X, likelihood=likelihood, labels="sampled")
    assert drawn.trace > 0 and drawn.gradients == 6


# ---- outputs without classes -----------------------------------------------------------------------------------------


class Squeezed(nn.Module):
    """A binary classifier or a regression whose output is (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).squeeze(-1)
        return out


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_outputs_of_one_number_an_example_and_maps(name: str) -> None:
    flat, column = Squeezed(), Squeezed()
    exact: Any = {"likelihood": name, "labels": "exact"}
    value = fastfisher.trace_fisher(flat, X, **exact).value
    assert fastfisher.trace_fisher(column.body, X, **exact).value == pytest.approx(value, rel=1e-12)
    y = targets_of(name, 6)
    for model, targets in ((flat, y), (column.body, y[:, None])):
        penalty = fastfisher.FisherPenalty(model, 0.1, likelihood=name, every=1)  # type: ignore[arg-type]
        penalty.backward(X, targets)
        assert penalty.logits is not None and penalty.logits.shape == targets.shape
    maps = nn.Conv2d(3, 2, 3, padding=1).double()
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    trace = fastfisher.trace_fisher(maps, images, likelihood=name, draws=50)  # type: ignore[arg-type]
    assert trace.value > 0  # 4 dimensions, of which none has to be said
    for wrong in (y[:, None], y[:5]):
        with pytest.raises(ValueError, match=r"targets: expected shape \(6,\), one for each row of the output, got"):
            fastfisher.per_example_grad_norms(flat, X, wrong, likelihood=name, labels="true")  # type: ignore[arg-type]


def test_values_that_can_be_no_label_are_refused() -> None:
    model = network()
    for name, bad, message in (
        ("bernoulli", 2, "expected labels 0 and 1, or probabilities between, got 2"),
        ("poisson", -1, "expected finite numbers >= 0, got -1"),
        ("gaussian", math.nan, "expected finite numbers, got nan"),
    ):
        with pytest.raises(ValueError, match=f"targets: {message}"):
            y = torch.full((6, 4), float(bad))
            fastfisher.per_example_grad_norms(model, X, y, likelihood=name, labels="true")  # type: ignore[arg-type]


# ---- weights, smoothing, another mark of rows that do not count ------------------------------------------------------

WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(
    "how",
    [
        {"weight": WEIGHT},
        {"label_smoothing": 0.2},
        {"ignore_index": 7},
        {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 7},
    ],
    ids=" ".join,
)
def test_categorical_arguments_are_those_of_cross_entropy(how: dict[str, Any]) -> None:
    model, y, likelihood = network(), targets_of("categorical", 6, 4), fastfisher.Categorical(**how)
    if "ignore_index" in how:
        y[2] = 7
    loss = lambda z: F.cross_entropy(z, y, **how)  # noqa: E731
    penalty = fastfisher.FisherPenalty(model, 0.0, likelihood=likelihood)
    torch.testing.assert_close(penalty.backward(X, y), loss(model(X)).detach())
    matrix = explicit_hessian(model, loss, X)
    truth = float(matrix.trace())
    found = fastfisher.trace_hessian(model, X, y, likelihood=likelihood, probes=200)
    assert abs(found.value - truth) < 4.5 * found.standard_error + 1e-9 * abs(truth)
    assert ("fisher" in found.method) == ("weight" not in how)
    in_parts = fastfisher.trace_hessian(model, [(X[:2], y[:2]), (X[2:], y[2:])], likelihood=likelihood, probes=200)
    assert abs(in_parts.value - truth) < 4.5 * in_parts.standard_error + 1e-9 * abs(truth)
    # The distribution that the logits stand for is without them.
    kept = (y != 7).nonzero().flatten()
    plain = fastfisher.trace_fisher(model, X[kept], labels="exact").value
    weighed = fastfisher.trace_fisher(model, (X, y), likelihood=likelihood, labels="exact")
    assert weighed.value * weighed.samples == pytest.approx(plain * len(kept), rel=1e-12)
    norms = fastfisher.per_example_grad_norms(model, X, y, likelihood=likelihood, labels="true")
    each = F.cross_entropy(model(X), y, reduction="none", **how)
    g = torch.autograd.grad(each[0], list(model.parameters()))
    assert float(norms[0]) == pytest.approx(float(sum(x.square().sum() for x in g)), rel=1e-9)
    if "ignore_index" in how:
        with pytest.raises(ValueError, match=r"targets: expected class indices .* got -100"):
            fastfisher.per_example_grad_norms(model, X, y.clamp(max=3) * 0 - 100, likelihood=likelihood, labels="true")


def test_the_weight_of_positive_labels_is_that_of_binary_cross_entropy() -> None:
    model, y, likelihood = network(), targets_of("bernoulli", 6, 4), fastfisher.Bernoulli(pos_weight=WEIGHT)
    loss = lambda z: F.binary_cross_entropy_with_logits(z, y.double(), pos_weight=WEIGHT)  # noqa: E731
    penalty = fastfisher.FisherPenalty(model, 0.0, likelihood=likelihood)
    torch.testing.assert_close(penalty.backward(X, y), loss(model(X)).detach())
    truth = float(explicit_hessian(model, loss, X).trace())
    found = fastfisher.trace_hessian(model, X, y, likelihood=likelihood, probes=300)
    assert abs(found.value - truth) < 4.5 * found.standard_error and "fisher" not in found.method
    exact: Any = {"labels": "exact"}
    assert fastfisher.trace_fisher(model, X, likelihood=likelihood, **exact).value == pytest.approx(
        fastfisher.trace_fisher(model, X, likelihood="bernoulli", **exact).value, rel=1e-12
    )


# ---- a likelihood of the user's own ----------------------------------------------------------------------------------


def test_a_likelihood_of_ones_own() -> None:
    model, likelihood = network(), Exponential()
    exact = fastfisher.trace_fisher(model, X, likelihood=likelihood, labels="exact")
    assert exact.value == pytest.approx(float(explicit_fisher(model, likelihood, X).trace()), rel=1e-9)
    drawn = fastfisher.trace_fisher(model, X, likelihood=likelihood, labels="sampled", draws=100)
    assert abs(drawn.value - exact.value) < 4.5 * drawn.standard_error
    value = fastfisher.penalty(model, X, likelihood=likelihood, method="finite_difference")
    value.backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match='labels: got "rademacher", which likelihood=Exponential has no way to make'):
        fastfisher.trace_fisher(model, X, likelihood=likelihood)
    y = torch.rand(6, 4, dtype=torch.float64)
    truth = explicit_hessian(model, lambda z: likelihood.nll(z, y).mean(), X).trace()
    found = fastfisher.trace_hessian(model, X, y, likelihood=likelihood, probes=300)
    assert abs(found.value - float(truth)) < 4.5 * found.standard_error
    assert found.method == "reduced hutchinson, gaussian probes"  # nobody said that its Hessian is the Fisher matrix


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


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "pos_weight", "variance"])
def test_what_a_likelihood_holds_is_a_constant_that_may_be_written_into(name: str) -> None:
    """By its holder, as weights that follow the data are: also where it is held in another precision."""
    kind: Any = {
        "weight": fastfisher.Categorical,
        "pos_weight": fastfisher.Bernoulli,
        "variance": fastfisher.Gaussian,
    }[name]
    torch.manual_seed(0)
    output, values = torch.randn(5, 3, dtype=torch.float64), torch.linspace(0.5, 2, 3)
    labels = torch.tensor([0, 2, 1, 1, 0]) if name == "weight" else torch.ones(5, 3)
    held = torch.ones(3)
    likelihood = kind(**{name: held})
    before = likelihood.loss(output, labels)
    held.copy_(values)
    assert likelihood.loss(output, labels) == kind(**{name: values}).loss(output, labels) != before
    with pytest.raises(ValueError, match=rf"{name}: expected a constant, got a tensor that requires a gradient"):
        kind(**{name: held.requires_grad_()})


def test_counts_that_are_too_many_to_draw_are_no_numbers() -> None:
    output = torch.tensor([20.0, 21.0, 400.0, torch.nan], dtype=torch.float64)
    drawn = likelihood_of("poisson").draw(output, torch.tensor([3, 5]))
    assert drawn.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "student"}, "likelihood: expected \"categorical\", .* got 'student'"),
        ({"likelihood": fastfisher.Poisson}, "got the class Poisson; give an object"),
        ({"likelihood": "gaussian", "class_dim": 1}, "class_dim: expected None with likelihood=Gaussian"),
        ({"likelihood": fastfisher.Gaussian(torch.ones(3))}, r"variance: expected a tensor that broadcasts .* \(4,\)"),
        ({"likelihood": fastfisher.Categorical(torch.ones(3))}, "weight: expected one for each of 4 classes, got 3"),
        ({"logits_of": 3}, "logits_of: expected a function or None"),
        ({"logits_of": lambda output: None}, "logits_of: expected a function that returns a tensor"),
        ({"loss": F.mse_loss, "likelihood": "gaussian"}, "likelihood: expected none beside loss="),
        ({"loss": F.mse_loss, "logits_of": lambda output: output}, "logits_of: expected None with loss="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_mean_nothing_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fastfisher.per_example_grad_norms(network(), X, targets_of("gaussian", 6, 4), labels="true", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastfisher.Gaussian(0.0), "variance: expected a positive number"),
        (lambda: fastfisher.Gaussian(torch.tensor([1.0, -1.0])), "variance: expected a floating-point tensor of pos"),
        (lambda: fastfisher.Categorical(weight=torch.ones(2, 2)), r"weight: expected a floating-point tensor \(C,\)"),
        (lambda: fastfisher.Categorical(weight=torch.tensor([-1.0])), "weight: expected finite weights >= 0"),
        (lambda: fastfisher.Categorical(label_smoothing=2.0), "label_smoothing: expected a number from 0 to 1"),
        (lambda: fastfisher.Categorical(ignore_index=1.5), "ignore_index: expected an integer"),
        (lambda: fastfisher.Bernoulli(pos_weight=2.0), "pos_weight: expected a floating-point tensor"),
    ],
)
def test_arguments_of_likelihoods_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_in_low_precision_labels_and_losses_are_not_rounded(name: str, dtype: torch.dtype) -> None:
    likelihood = likelihood_of(name)
    output, y = output_of(50, 4).to(dtype), targets_of(name, 50, 4)
    wide = output.double()
    fitting = likelihood.fit(output, y * 1.0)
    torch.testing.assert_close(fitting.double(), y.double(), rtol=1e-7, atol=0)
    loss, exact = likelihood.loss(output, fitting), likelihood.loss(wide, likelihood.fit(wide, y * 1.0))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    drawn = likelihood.draw(output, torch.tensor([1, 2]))
    torch.testing.assert_close(
        drawn.double(), likelihood.draw(wide, torch.tensor([1, 2])).double(), rtol=1e-5, atol=1e-5
    )
