"""The chunked head against the plain way: values, gradients, draws, chunks of every size, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import linear_sample_cross_entropy
from fastfisher.ops import reference
from tests.support.operators import DTYPES, KEY, assert_labels_are_the_exact_inverse_cdf, precise

ROWS, WIDTH = 21, 12
CLASSES = [1, 7, 1023, 1024, 1025, 5000]


def data(classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, and targets of which three are padding."""
    source = torch.Generator().manual_seed(classes)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)  # noqa: E731
    targets = torch.randint(classes, (ROWS,), generator=source)
    targets[[2, 3, 20]] = -100
    return draw(ROWS, WIDTH).requires_grad_(), draw(classes, WIDTH).requires_grad_(), draw(classes), targets


def chunk_of(rows: int, classes: int, dtype: torch.dtype) -> int:
    return rows * classes * (8 if dtype == torch.float64 else 4)


def reduced(losses: Tensor, kept: int, reduction: str) -> Tensor:
    return losses.sum() / kept if reduction == "mean" else losses.sum() if reduction == "sum" else losses


OPTIONS: list[dict[str, Any]] = [
    {"labels": labels, "padded": padded, "bias": bias, "label_smoothing": smoothing}
    for labels in ("sampled", "true")
    for padded in (False, True)
    for bias in (False, True)
    for smoothing in (0.0, 0.1)
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("classes", CLASSES)
def test_values_and_gradients_are_those_of_the_reference(classes: int, options: dict[str, Any], reduction: Any) -> None:
    hidden, weight, bias, targets = data(classes)
    targets = targets if options["padded"] else targets.clamp(min=0)
    inputs = [hidden, weight, *([bias.requires_grad_()] if options["bias"] else [])]
    given = targets if options["padded"] or options["labels"] == "true" else None
    key, smoothing = (KEY if options["labels"] == "sampled" else None), options["label_smoothing"]
    chunk = chunk_of(4, classes, torch.float64)
    loss, labels = linear_sample_cross_entropy(
        hidden, weight, given, bias=bias if options["bias"] else None, labels=options["labels"], key=key,
        reduction=reduction, label_smoothing=smoothing, chunk_bytes=chunk,
    )  # fmt: skip
    expected, chosen = reference.linear_sample_cross_entropy(
        hidden, weight, bias if options["bias"] else None, given, key, label_smoothing=smoothing
    )
    expected = reduced(expected, int((targets != -100).sum()), reduction)
    assert torch.equal(labels, chosen)
    torch.testing.assert_close(loss, expected)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    found = torch.autograd.grad(loss, inputs, upstream)
    for mine, theirs in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Any]:
    """The mean cross-entropy, and its gradients in hidden and weight."""
    h, w, kept = precise(hidden), precise(weight), (targets != -100).numpy()
    logits = h @ w.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.flatnonzero(kept)
    at_target = p[rows, targets.numpy()[rows]]
    p[rows, targets.numpy()[rows]] -= 1
    p *= kept[:, None] / np.longdouble(len(rows))
    return [-np.log(at_target).mean(), p @ w, p.T @ h]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", [1, 5])  # products of few rows are rounded in another way
def test_it_errs_at_most_twice_what_pytorch_errs(rows: int, classes: int, dtype: torch.dtype) -> None:
    hidden, weight, _, targets = data(classes, dtype)
    arguments = {"labels": "true", "chunk_bytes": chunk_of(rows, classes, dtype)}
    loss, _ = linear_sample_cross_entropy(hidden, weight, targets, **arguments)
    found = [loss, *torch.autograd.grad(loss, [hidden, weight])]
    plain = F.cross_entropy(hidden @ weight.t(), targets)
    theirs = [plain, *torch.autograd.grad(plain, [hidden, weight])]
    for mine, other, true in zip(found, theirs, truth(hidden, weight, targets), strict=True):
        # half a unit in the last place of the largest, which PyTorch may happen not to err by
        last_place = 0.5 * torch.finfo(mine.dtype).eps * np.abs(true).max()
        assert np.abs(precise(mine) - true).max() <= 2 * np.abs(precise(other) - true).max() + last_place
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(g.dtype == dtype for g in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_labels_are_those_of_the_whole_logits(classes: int, dtype: torch.dtype) -> None:
    hidden, weight, _, _ = data(classes, dtype)
    _, labels = linear_sample_cross_entropy(hidden, weight, key=KEY, chunk_bytes=chunk_of(8, classes, dtype))
    assert_labels_are_the_exact_inverse_cdf((hidden @ weight.t()).detach(), labels, KEY)
    _, rest = linear_sample_cross_entropy(hidden[9:], weight, key=KEY, first=9)
    assert_labels_are_the_exact_inverse_cdf((hidden @ weight.t()).detach(), torch.cat([labels[:9], rest]), KEY)


def test_losses_and_labels_have_the_same_bits_for_every_chunk_size() -> None:
    """Of small integers a product has no rounding, whatever its order."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (40, WIDTH), generator=source).float()
    weight = torch.randint(-2, 3, (3000, WIDTH), generator=source).float()

    def run(rows: int) -> tuple[Tensor, Tensor]:
        size = chunk_of(rows, 3000, torch.float32)
        return linear_sample_cross_entropy(hidden, weight, key=KEY, reduction="none", chunk_bytes=size)

    losses, labels = run(40)
    for rows in (1, 3, 16, 39):
        assert torch.equal(run(rows)[0], losses) and torch.equal(run(rows)[1], labels)


def test_masked_classes_are_never_drawn() -> None:
    hidden, weight, bias, _ = data(2000, torch.float32)
    bias[500:1800] = -torch.inf
    drawn = [linear_sample_cross_entropy(hidden, weight, bias=bias, key=torch.tensor([i, 0]))[1] for i in range(200)]
    assert not torch.isin(torch.stack(drawn), torch.arange(500, 1800)).any()


def test_what_an_ignored_row_holds_does_not_matter() -> None:
    hidden, weight, _, targets = data(7)
    broken = hidden.detach().clone()
    broken[2] = torch.nan
    results = []
    for given in (hidden, broken.requires_grad_()):
        loss, labels = linear_sample_cross_entropy(given, weight, targets, key=KEY)
        results.append((loss, labels, *torch.autograd.grad(loss, [given, weight])))
        assert labels[2] == -100 and results[-1][2][2].abs().sum() == 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_shapes_draws_from_a_generator_and_tied_weights() -> None:
    embedding = torch.nn.Embedding(50, WIDTH)
    tokens = torch.arange(6).view(2, 3)
    loss, labels = linear_sample_cross_entropy(
        embedding(tokens), embedding.weight, generator=torch.Generator().manual_seed(1), reduction="none"
    )
    assert loss.shape == labels.shape == (2, 3)
    again = linear_sample_cross_entropy(embedding(tokens), embedding.weight, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[1], labels)
    (found,) = torch.autograd.grad(again[0], [embedding.weight])
    plain = F.cross_entropy((embedding(tokens) @ embedding.weight.t()).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found, torch.autograd.grad(plain, [embedding.weight])[0])
    assert not linear_sample_cross_entropy(embedding(tokens).detach(), embedding.weight.detach())[0].requires_grad
    with torch.no_grad():
        assert not linear_sample_cross_entropy(embedding(tokens), embedding.weight)[0].requires_grad


def test_under_autocast_it_computes_as_a_linear_layer_does() -> None:
    hidden, weight, _, targets = data(100, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_sample_cross_entropy(hidden, weight, targets, labels="true")
    low = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().t()).float(), targets)
    torch.testing.assert_close(loss, low)
    found = torch.autograd.grad(loss, [hidden, weight])
    assert all(g.dtype == torch.float32 for g in found)


def test_no_rows_and_only_ignored_rows_have_a_mean_of_nan() -> None:
    hidden, weight, _, targets = data(7)
    assert linear_sample_cross_entropy(hidden[:0], weight)[0].isnan()
    assert linear_sample_cross_entropy(hidden, weight, torch.full_like(targets, -100))[0].isnan()


H, W = torch.zeros(3, 4), torch.zeros(5, 4)
T = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, "hidden: .*int64"),
        ({"weight": torch.zeros(5, 3)}, r"weight: .*\(5, 3\)"),
        ({"weight": W.double()}, "weight: .*float64"),
        ({"bias": torch.zeros(4)}, r"bias: .*\(4,\)"),
        ({"labels": "uniform"}, "labels: .*'uniform'"),
        ({"labels": "true"}, "targets: .*None"),
        ({"labels": "true", "targets": T, "key": KEY}, "key and generator"),
        ({"key": KEY, "generator": torch.Generator()}, "key and generator"),
        ({"targets": T[:2]}, r"targets: .*\(2,\)"),
        ({"labels": "true", "targets": T + 3}, "targets: .*0 to 4 .*5"),
        ({"reduction": "max"}, "reduction: .*'max'"),
        ({"label_smoothing": 1.5}, "label_smoothing: .*1.5"),
        ({"chunk_bytes": 0}, "chunk_bytes: .*0"),
        ({"first": -1}, "first: .*-1"),
        ({"hidden": H.index_fill(0, torch.tensor([1]), torch.nan), "chunk_bytes": 20}, "hidden: row 1 "),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        linear_sample_cross_entropy(**{"hidden": H, "weight": W, **arguments})
