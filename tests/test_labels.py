"""Which targets fit which logits, what is refused, and where logits have their classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import FisherPenalty
from fastfisher.host import looking_waits
from fastfisher.inputs import known_of
from fastfisher.labels import Rows, labels_of
from fastfisher.likelihoods.base import Signs
from fastfisher.likelihoods.categorical import CATEGORICAL
from fastfisher.ops.sampled import new_key
from fastfisher.targets import fit

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def linear(classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, classes).double()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def squared_norms(model: nn.Module, loss: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    """‖∇ loss(model(x_i), i)‖² for each example, one backward each."""
    parameters = list(model.parameters())
    return torch.stack(
        [flat(torch.autograd.grad(loss(model(x[i : i + 1]), i), parameters)).square().sum() for i in range(len(x))]
    )


# Every public function that takes targets, as f(model, x, y, **options).
CALLS: dict[str, Callable[..., Any]] = {
    "penalty": lambda m, x, y, **o: fastfisher.penalty(m, x, y, labels="true", **o),
    "penalty, drawn labels": lambda m, x, y, **o: fastfisher.penalty(m, x, y, generator=seeded(), **o),
    "penalty, given labels": lambda m, x, y, **o: fastfisher.penalty(m, x, labels=y, **o),
    "FisherPenalty": lambda m, x, y, **o: FisherPenalty(copy.deepcopy(m), 0.1, generator=seeded(), **o).backward(x, y),
    "FisherPenalty, plain steps": lambda m, x, y, **o: FisherPenalty(copy.deepcopy(m), 0.0, **o).backward(x, y),
    "FisherPenalty, its own loss": lambda m, x, y, **o: FisherPenalty(
        copy.deepcopy(m), 0.1, labels="true", loss=lambda logits, _: logits.square().mean(), **o
    ).backward(x, y),
    "per_example_grad_norms": lambda m, x, y, **o: fastfisher.per_example_grad_norms(m, x, y, labels="true", **o).sum(),
    "per_example_grad_norms, given labels": lambda m, x, y, **o: fastfisher.per_example_grad_norms(
        m, x, labels=y, **o
    ).sum(),
    "trace_fisher": lambda m, x, y, **o: fastfisher.trace_fisher(m, [(x, y)], labels="true", **o).value,
    "trace_fisher, all labels": lambda m, x, y, **o: fastfisher.trace_fisher(m, (x, y), labels="exact", **o).value,
    "grad_inner_products": lambda m, x, y, **o: fastfisher.grad_inner_products(m, (x, y), (x, y), **o).mean,
    "trace_hessian": lambda m, x, y, **o: (
        fastfisher.trace_hessian(m, x, y, method="hutchinson", probes=2, generator=seeded(), **o).value
    ),
    "trace_hessian, Tr(F)": lambda m, x, y, **o: (
        fastfisher.trace_hessian(m, x, y, probes=2, generator=seeded(), **o).value
    ),
    "trace_hessian, autograd": lambda m, x, y, **o: (
        fastfisher.trace_hessian(m, x, y, method="hutchinson", hvp="autograd", probes=2, generator=seeded(), **o).value
    ),
    "trace_hessian, differences": lambda m, x, y, **o: (
        fastfisher.trace_hessian(
            m, x, y, method="hutchinson", hvp="finite_difference", probes=2, generator=seeded(), **o
        ).value
    ),
    "top_eigenvalues": lambda m, x, y, **o: fastfisher.top_eigenvalues(m, x, y, generator=seeded(), **o).values[0],
    "gradient_covariance": lambda m, x, y, **o: fastfisher.gradient_covariance(m, (x, y), **o).trace,
    "gradient_covariance, drawn labels": lambda m, x, y, **o: (
        fastfisher.gradient_covariance(m, (x, y), labels="sampled", generator=seeded(), **o).trace
    ),
}

REFUSED: dict[str, tuple[Tensor, str]] = {
    "one column": (Y[:, None], r"shape \(6,\).*shape \(6, 1\)"),
    "one-hot integers": (F.one_hot(Y), r"shape \(6, 3\); of one-hot integers give \w+\.argmax"),
    "one-hot int8": (F.one_hot(Y).to(torch.int8), r"int8 of shape \(6, 3\)"),
    "booleans": (Y.bool(), r"got torch\.bool"),
    "several labels at once": (torch.tensor([[1.0, 1.0, 0.0]] * 6), r"the sum 2; several labels at once"),
    "no numbers of a distribution": (torch.tensor([[1.5, -0.5, 0.0]] * 6), r"row 0 from -0\.5 to 1\.5"),
    "the third row alone is none": (torch.eye(3)[Y] * torch.tensor([1, 1, 0.9, 1, 1, 1])[:, None], "row 2 .* sum 0.9"),
    "NaN": (torch.full((6, 3), torch.nan), "the sum nan"),
    "floating class indices": (Y.double(), r"float64 of shape \(6,\); class indices are integers"),
    "complex numbers": (torch.ones(6, dtype=torch.cfloat), r"complex64"),
    "255 for no class": (torch.tensor([0, 1, 2, 255, 1, 2]), r"got 255; .*masked_fill\(\w+ == 255, -100\)"),
    "255 in uint8": (torch.tensor([0, 1, 2, 255, 1, 2], dtype=torch.uint8), "got 255"),
    "-1 for no class": (torch.tensor([0, 1, 2, -1, 1, 2]), "got -1"),
    "as many classes as one less": (torch.tensor([0, 1, 2, 3, 1, 2]), "class indices 0 to 2, .* got 3"),
}


@pytest.mark.filterwarnings("ignore:method=")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", CALLS)
def test_targets_that_do_not_fit_are_refused_by_name(call: str, name: str) -> None:
    targets, message = REFUSED[name]
    model = linear()
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=f"^(targets|labels): .*{message}"):
        CALLS[call](model, X, targets)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("call", CALLS)
def test_targets_of_another_length_are_refused(call: str) -> None:
    with pytest.raises(ValueError, match=r"got torch\.int64 of shape \(2,\)|got 2 for 6"):
        CALLS[call](linear(), X, Y[:2])
    with pytest.raises(ValueError, match=r"shape \(\)|scalar"):
        CALLS[call](linear(), X, Y[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
@pytest.mark.parametrize("call", CALLS)
def test_integers_of_any_dtype_are_class_indices(call: str, dtype: torch.dtype) -> None:
    targets = Y.clone()
    if dtype.is_signed:
        targets[1] = -100
    found, expected = (number(CALLS[call](linear(), X, y)) for y in (targets.to(dtype), targets))
    assert found == expected


@pytest.mark.parametrize("call", CALLS)
def test_one_hot_probabilities_of_any_precision_are_labels(call: str) -> None:
    expected = number(CALLS[call](linear(), X, Y))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert number(CALLS[call](linear(), X, F.one_hot(Y).to(dtype))) == pytest.approx(expected, rel=1e-9), dtype


@pytest.mark.parametrize("call", [name for name in CALLS if "its own loss" not in name])
def test_a_single_class_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match=r"model: expected logits of at least two classes, got shape \(6, 1\)"):
        CALLS[call](linear(1), X, torch.zeros(6).long())
    with pytest.raises(ValueError, match=r"model: expected logits \(N, ..., C\), got shape \(6,\)"):
        CALLS[call](nn.Sequential(linear(1), nn.Flatten(0)), X, torch.zeros(6).long())


@pytest.mark.parametrize("labels", ["rademacher", "sampled", "exact"])
def test_a_single_class_is_refused_without_targets(labels: Any) -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        fastfisher.trace_fisher(linear(1), X, labels=labels)
    with pytest.raises(ValueError, match="at least two classes"):
        fastfisher.penalty(linear(1), X)


@pytest.mark.parametrize("classes", [2, 10, 1000, 50257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_that_were_rounded_are_probabilities(classes: int, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(4, classes, generator=seeded(), dtype=torch.float64)
    positive = torch.rand(4, classes, generator=seeded()).to(dtype)
    one_hot = F.one_hot(torch.arange(4) % classes, classes).to(dtype)
    for targets in (
        logits.softmax(1).to(dtype),
        logits.to(dtype).softmax(1),
        positive / positive.sum(1, keepdim=True),
        0.3 * one_hot + 0.7 * one_hot.roll(1, 0),
        0.9 * one_hot + 0.1 / classes,
    ):
        assert fit(logits, targets) is targets


def test_given_labels_leave_out_what_targets_leave_out() -> None:
    model, out = linear(), torch.tensor([True, False, False, True, False, False])
    targets, drawn = Y.masked_fill(out, -100), Y.roll(1)
    loss = F.cross_entropy(model(X[~out]), drawn[~out])
    expected = flat(torch.autograd.grad(loss, list(model.parameters()))).square().sum()
    torch.testing.assert_close(fastfisher.penalty(model, X, targets, labels=drawn), expected)
    norms = squared_norms(model, lambda logits, i: F.cross_entropy(logits, drawn[i : i + 1]), X)
    found = fastfisher.per_example_grad_norms(model, X, targets, labels=drawn)
    torch.testing.assert_close(found, norms.masked_fill(out, 0))
    soft = F.one_hot(drawn).double()
    with pytest.raises(ValueError, match="targets: expected none of -100 beside labels that are probabilities"):
        fastfisher.penalty(model, X, targets, labels=soft)


def test_drawn_labels_of_a_covariance_leave_out_what_targets_leave_out() -> None:
    model, targets = linear(), Y.masked_fill(Y == 1, -100)
    found = fastfisher.gradient_covariance(model, (X, targets), labels="sampled", generator=seeded())
    _, drawn = labels_of("sampled").loss(Rows(CATEGORICAL, model(X), targets, new_key(seeded(), X.device)))
    assert isinstance(drawn, Tensor) and torch.equal(drawn == -100, targets == -100)
    expected = fastfisher.gradient_covariance(model, (X, drawn))
    assert found == expected


def test_no_row_that_counts_is_refused_where_a_mean_is_taken() -> None:
    none, model = torch.full((6,), -100), linear()
    for call in (
        lambda: fastfisher.penalty(model, X, none),
        lambda: fastfisher.penalty(model, X, labels=none),
        lambda: FisherPenalty(model, 0.1).backward(X, none),
        lambda: FisherPenalty(model, 0.0).backward(X, none),
    ):
        with pytest.raises(ValueError, match="expected at least one row that counts, got -100 in all"):
            call()
    assert all(p.grad is None for p in model.parameters())


def test_no_example_is_refused() -> None:
    for call in (
        lambda: fastfisher.penalty(linear(), X[:0]),
        lambda: FisherPenalty(linear(), 0.1).backward(X[:0], Y[:0]),
        lambda: fastfisher.per_example_grad_norms(linear(), X[:0]),
        lambda: fastfisher.trace_fisher(linear(), X[:0]),
    ):
        with pytest.raises(ValueError, match="expected at least one example, got none"):
            call()


def test_targets_of_a_loss_of_the_callers_may_be_anything() -> None:
    def loss(logits: Tensor, targets: Any) -> Tensor:
        assert targets is given
        return logits.square().mean()

    expected = FisherPenalty(linear(), 0.3, every=1, loss=lambda logits, _: logits.square().mean(), generator=seeded())
    expected.backward(X, None)
    for given in (Y.bool(), Y.double(), Y[:, None], torch.rand(6, 3), [1, 2], {"boxes": X}, "anything"):
        model = linear()
        penalty = FisherPenalty(model, 0.3, every=1, loss=loss, generator=seeded())
        penalty.backward(X, given)
        assert penalty.value == expected.value
        for p, q in zip(model.parameters(), expected.model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    with pytest.raises(ValueError, match="targets: expected class indices"):
        FisherPenalty(linear(), 0.3, labels="true", loss=lambda logits, _: logits.mean()).backward(X, Y[:, None])


def test_norms_of_a_loss_of_the_callers_have_no_classes() -> None:
    """Regression, and images as outputs."""
    y = torch.randn(6, 1, generator=seeded(), dtype=torch.float64)
    model = linear(1)
    expected = squared_norms(model, lambda out, i: (out - y[i : i + 1]).square().sum(), X)
    found = fastfisher.per_example_grad_norms(model, X, y, labels="true", loss=lambda out, y: (out - y).square().sum(1))
    torch.testing.assert_close(found, expected)
    images = torch.randn(3, 2, 4, 4, generator=seeded(), dtype=torch.float64)
    model = nn.Conv2d(2, 2, 3, padding=1).double()
    expected = squared_norms(model, lambda out, i: (out - images[i : i + 1]).square().sum(), images)
    found = fastfisher.per_example_grad_norms(
        model, images, images, labels="true", loss=lambda out, y: (out - y).square().sum((1, 2, 3))
    )
    torch.testing.assert_close(found, expected)


def test_int8_is_no_sign() -> None:
    logits = torch.randn(6, 3, generator=seeded(), dtype=torch.float64)
    signs = torch.tensor([[1, -1, 1]] * 5 + [[0, 0, 0]], dtype=torch.int8)
    found = CATEGORICAL.loss(logits, Signs(signs))
    torch.testing.assert_close(found, (2 * logits.softmax(1).sqrt() * signs).sum() / 5)
    with pytest.raises(ValueError, match="int8"):
        fit(logits, signs)
    _, chosen = labels_of("rademacher").loss(Rows(CATEGORICAL, logits, None, new_key(seeded(), logits.device)))
    assert isinstance(chosen, Signs) and chosen.tensor.dtype == torch.int8


def test_where_looking_waits_values_are_looked_at_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wrong = linear(), torch.tensor([0, 1, 2, 255, 1, 2])
    assert not looking_waits(X)
    monkeypatch.setattr("fastfisher.targets.looking_waits", lambda _: True)
    logits = model(X)
    for _ in range(2):  # what was refused is not known
        with pytest.raises(ValueError, match="got 255"):
            fit(logits, wrong, model=model)
    fit(logits, Y, model=model)
    assert known_of(model)
    assert fit(logits, wrong, model=model) is wrong  # nobody looks, so that nothing waits
    with pytest.raises(ValueError, match="the sum 2"):
        fit(logits, torch.ones(6, 3) * 2 / 3, model=model)  # another kind
    with pytest.raises(ValueError, match="got 255"):
        fit(logits, wrong, model=linear())  # another model
    with pytest.raises(ValueError, match=r"shape \(2,\)"):  # shapes are always looked at
        fit(logits, Y[:2], model=model)


# ---- where logits have their classes ---------------------------------------------------------------------------------


class ClassesLast(nn.Module):
    """The same network with its logits (N, …, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits.movedim(1, -1)


IMAGES = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
PIXELS = torch.randint(4, (3, 4, 4), generator=torch.Generator().manual_seed(4))
PIXELS[0, 0, 1] = -100


def segmentation() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1)).double()


@pytest.mark.filterwarnings("ignore:method=")
@pytest.mark.parametrize("call", CALLS)
def test_classes_may_be_in_any_dimension(call: str) -> None:
    """As many classes as rows and columns of pixels: only class_dim can tell."""
    model = segmentation()
    with pytest.raises(ValueError, match=r"class_dim: .*\(3, 4, 4, 4\) .*got None; say class_dim=1"):
        CALLS[call](model, IMAGES, PIXELS)
    expected = number(CALLS[call](ClassesLast(model), IMAGES, PIXELS, class_dim=-1))
    for said in (1, -3):
        assert number(CALLS[call](model, IMAGES, PIXELS, class_dim=said)) == pytest.approx(expected, rel=1e-9)
    soft = F.one_hot(PIXELS.clamp(min=0), 4).double()
    expected = number(CALLS[call](ClassesLast(model), IMAGES, soft, class_dim=-1))
    assert number(CALLS[call](model, IMAGES, soft.movedim(-1, 1), class_dim=1)) == pytest.approx(expected, rel=1e-9)
    for said in (0, -4, 4, True, 1.0, "1"):
        with pytest.raises(ValueError, match="class_dim: expected"):
            CALLS[call](model, IMAGES, PIXELS, class_dim=said)


def test_pixels_beside_one_backward_each() -> None:
    model = segmentation()
    expected = squared_norms(model, lambda z, i: F.cross_entropy(z, PIXELS[i : i + 1], reduction="sum"), IMAGES)
    found = fastfisher.per_example_grad_norms(model, IMAGES, PIXELS, labels="true", class_dim=1)
    torch.testing.assert_close(found, expected)
    gradient = flat(torch.autograd.grad(F.cross_entropy(model(IMAGES), PIXELS), list(model.parameters())))
    found = fastfisher.penalty(model, IMAGES, PIXELS, labels="true", class_dim=1)
    torch.testing.assert_close(found, gradient.square().sum())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"method": "double_backprop"}, {"labels": "true"}, {"labels": "rademacher"}, {"labels": "uniform"},
        {"mixed": True}, {"examples": 2}, {"reduction": "first"}, {"wrt": "inputs"}, {"loss": F.cross_entropy},
    ],
    ids=lambda options: str({name: getattr(value, "__name__", value) for name, value in options.items()}),
)  # fmt: skip
def test_the_penalty_of_pixels(options: dict[str, Any]) -> None:
    """Beside the same network with its classes last; logits and the caller's loss have them where the model does."""
    model = segmentation()
    last = ClassesLast(copy.deepcopy(model))
    penalty = FisherPenalty(model, 0.3, every=1, class_dim=1, generator=seeded(), **options)
    loss = penalty.backward(IMAGES, PIXELS)
    options = {**options, "loss": None}
    expected = FisherPenalty(last, 0.3, every=1, class_dim=-1, generator=seeded(), **options)
    torch.testing.assert_close(loss, expected.backward(IMAGES, PIXELS))
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), flat(p.grad for p in last.parameters()))
    assert penalty.logits is not None and expected.logits is not None
    assert torch.equal(penalty.logits.movedim(1, -1), expected.logits)


def test_a_shared_forward_of_pixels() -> None:
    model, other = segmentation(), segmentation()
    penalty = FisherPenalty(model, 0.3, every=1, class_dim=1, generator=seeded())
    with penalty.watching() as forward:
        loss = F.cross_entropy(model(IMAGES), PIXELS)
    (loss + penalty.term(forward, PIXELS)).backward()  # type: ignore[no-untyped-call]
    FisherPenalty(other, 0.3, every=1, class_dim=1, generator=seeded()).backward(IMAGES, PIXELS)
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), flat(p.grad for p in other.parameters()))
    assert forward.logits is not None and forward.logits.shape == (3, 4, 4, 4)
    shared = fastfisher.penalty(model, IMAGES, PIXELS, labels="true", logits=model(IMAGES), class_dim=1)
    torch.testing.assert_close(shared, fastfisher.penalty(model, IMAGES, PIXELS, labels="true", class_dim=1))


SEQUENCES = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("call", CALLS)
def test_targets_that_fit_another_dimension_have_it_said(call: str) -> None:
    """Logits (N, C, L) of three dimensions, whose targets (N, L) show that the classes are not last."""
    torch.manual_seed(0)
    model, targets = nn.Conv1d(3, 5, 1).double(), torch.randint(5, (2, 7), generator=seeded())
    with pytest.raises(ValueError, match=r"class_dim: .*\(2, 5, 7\).*\(2, 7\) fit class_dim=1$"):
        CALLS[call](model, SEQUENCES, targets)
    soft = F.one_hot(targets, 5).double().movedim(-1, 1)
    if "its own loss" not in call:
        with pytest.raises(ValueError, match=r"class_dim: .*probabilities over class_dim=1$"):
            CALLS[call](model, SEQUENCES, soft)
    square = nn.Conv1d(3, 7, 1).double()
    with pytest.raises(ValueError, match=r"class_dim: .*fit class_dim=1 or class_dim=2$"):
        CALLS[call](square, SEQUENCES, targets)
    expected = number(CALLS[call](ClassesLast(model), SEQUENCES, targets))
    assert number(CALLS[call](model, SEQUENCES, targets, class_dim=1)) == pytest.approx(expected, rel=1e-9)


def test_targets_of_a_loss_of_the_callers_show_where_classes_are() -> None:
    model, targets = nn.Conv1d(3, 5, 1).double(), torch.randint(5, (2, 7), generator=seeded())
    with pytest.raises(ValueError, match="class_dim"):
        FisherPenalty(model, 0.1, loss=F.cross_entropy).backward(SEQUENCES, targets)


def test_transposed_targets_are_refused_with_both_shapes() -> None:
    model = nn.Linear(3, 4).double()
    x, targets = SEQUENCES.movedim(1, -1), torch.zeros(7, 2).long()
    with pytest.raises(ValueError, match=r"shape \(2, 7\) .* shape \(7, 2\); give targets.T"):
        fastfisher.penalty(model, x, targets, labels="true")
    with pytest.raises(ValueError, match=r"shape \(14,\); give targets.view\(2, 7\)"):
        FisherPenalty(model, 0.1).backward(x, torch.zeros(14).long())


def test_labels_are_drawn_in_any_dimension() -> None:
    logits, key = torch.randn(2, 5, 3, generator=seeded()), torch.tensor([1, 2])
    for dim in (0, 1, -2, 2):
        loss, labels = fastfisher.sample_cross_entropy(logits, key=key, class_dim=dim, reduction="none")
        expected, drawn = fastfisher.sample_cross_entropy(logits.movedim(dim, -1), key=key, reduction="none")
        assert torch.equal(labels, drawn) and torch.equal(loss, expected)
    with pytest.raises(ValueError, match="class_dim"):
        fastfisher.sample_cross_entropy(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"class_dim: expected a dimension of the logits \(2, 5, 3\), got 3"):
        fastfisher.sample_cross_entropy(logits, class_dim=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("factor", [1.0, 3.0, 2.0**16])
def test_the_gradient_is_that_of_cross_entropy_at_the_drawn_labels(
    dtype: torch.dtype, reduction: Any, factor: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(500, 7).to(dtype).requires_grad_()
    loss, labels = fastfisher.sample_cross_entropy(logits, reduction=reduction)
    expected = F.cross_entropy(logits.float() if dtype != torch.float64 else logits, labels, reduction=reduction)
    found, wanted = (torch.autograd.grad(factor * x.mean(), logits, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 * float(wanted.abs().max()))
    for _ in range(2):
        (factor * loss.mean()).backward(retain_graph=True)
        assert logits.grad is not None and torch.equal(logits.grad, found)
        logits.grad.zero_()
    (last,) = torch.autograd.grad(factor * loss.mean(), logits)
    torch.testing.assert_close(last, found, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_second_derivatives_of_the_drawn_loss() -> None:
    torch.manual_seed(0)
    logits, key = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2])
    for reduction in ("mean", "sum", "none"):

        def call(x: Tensor, reduction: Any = reduction) -> Tensor:
            return fastfisher.sample_cross_entropy(x, key=key, reduction=reduction)[0]

        assert torch.autograd.gradcheck(call, (logits,))
        assert torch.autograd.gradgradcheck(call, (logits,))
