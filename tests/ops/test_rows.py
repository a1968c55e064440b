"""The operators on rows of logits against reference.py: values, draws, derivatives, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import fastfisher
from fastfisher import ops
from fastfisher.likelihoods.base import Signs
from fastfisher.likelihoods.categorical import CATEGORICAL
from fastfisher.ops import reference
from tests.support.operators import (
    CLASSES,
    DTYPES,
    KEY,
    SHAPES,
    SIGNIFICANCE,
    assert_binary_errs_at_most_twice_what_pytorch_errs,
    assert_binary_labels_are_those_of_the_definition,
    assert_errs_at_most_twice_what_pytorch_errs,
    assert_labels_are_the_exact_inverse_cdf,
    binary_logits_for,
    exact_binary,
    logits_for,
    needs_kernels,
    precise,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_values_err_at_most_twice_what_pytorch_errs(classes: int, dtype: torch.dtype) -> None:
    logits = logits_for(classes, dtype)
    nll, labels, dlogits = ops.sample_cross_entropy(logits, KEY, 0.5)
    assert_errs_at_most_twice_what_pytorch_errs(logits, nll, labels, dlogits, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_labels_are_the_exact_inverse_cdf(classes: int, dtype: torch.dtype) -> None:
    logits = logits_for(classes, dtype)
    assert_labels_are_the_exact_inverse_cdf(logits, ops.sample_cross_entropy(logits, KEY, 1.0)[1], KEY)


@needs_kernels
@pytest.mark.parametrize("key", [118, 701, 909, 1373, 1460])
def test_no_label_lies_beyond_the_row(key: int) -> None:
    """In one draw of 10^7 the running sum up to the last class rounds below the target, and the padding's above."""
    logits = torch.randn(60_000, 10, generator=torch.Generator().manual_seed(10))
    _, labels, _ = ops.sample_cross_entropy(logits, torch.tensor([key, 0]), 1.0)
    assert int(labels.min()) >= 0 and int(labels.max()) < 10


@pytest.mark.parametrize("classes", [2, 10, 1000, 50257, 262144])
def test_draws_follow_the_softmax(classes: int) -> None:
    rows = 200_000 if classes <= 1000 else 2**26 // classes
    logits = 2 * torch.randn(classes, generator=torch.Generator().manual_seed(classes))
    logits[::5] = -float("inf")
    logits[1] = 1.0
    draws = []
    for chunk in range(16):
        key = torch.tensor([99, chunk])
        draws.append(ops.sample_cross_entropy(logits.expand(rows // 16, classes), key, 1.0)[1])
    counts = torch.bincount(torch.cat(draws), minlength=classes).double()
    assert counts[::5].sum() == 0, "a masked class was drawn"
    expected = logits.double().softmax(0) * counts.sum()
    order = expected.argsort(descending=True)
    cells = (expected[order].cumsum(0) / max(5.0, float(counts.sum()) / 2000)).long()  # at least 5 expected in each
    pooled = torch.zeros(int(cells.max()) + 1, dtype=torch.float64)
    observed, mean = pooled.index_add(0, cells, counts[order]), pooled.index_add(0, cells, expected[order])
    observed, mean = observed[mean >= 5], mean[mean >= 5]
    chi2 = float(((observed - mean) ** 2 / mean).sum())
    assert scipy.stats.chi2.sf(chi2, max(1, len(mean) - 1)) > SIGNIFICANCE


def test_each_tile_of_the_widest_row_is_drawn_within() -> None:
    # With a single 24-bit uniform over 262,144 equal classes more than 100,000 could never come up.
    logits = torch.zeros(64, 262144)
    labels = torch.cat([ops.sample_cross_entropy(logits, torch.tensor([5, i]), 1.0)[1] for i in range(32)])
    low_bits = torch.bincount(labels % 16, minlength=16).double()
    chi2 = float(((low_bits - len(labels) / 16) ** 2 / (len(labels) / 16)).sum())
    assert scipy.stats.chi2.sf(chi2, 15) > SIGNIFICANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [10, 1500])
def test_a_part_of_the_rows_is_drawn_as_in_the_whole(dtype: torch.dtype, columns: int) -> None:
    logits = torch.randn(40, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    whole = [*ops.sample_cross_entropy(logits, KEY, 0.5), ops.rademacher_cotangent(logits, KEY, 0.5)]
    part = [*ops.sample_cross_entropy(logits[13:], KEY, 0.5, 13), ops.rademacher_cotangent(logits[13:], KEY, 0.5, 13)]
    assert all(torch.equal(found, expected[13:]) for found, expected in zip(part, whole, strict=True))
    assert not torch.equal(ops.sample_cross_entropy(logits[13:], KEY, 0.5)[1], whole[1][13:])


def test_many_logits_are_drawn_in_chunks_with_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 100, generator=torch.Generator().manual_seed(2))
    whole = reference.sample_labels(logits, KEY, 3)
    monkeypatch.setattr(reference, "_CHUNK", 700)
    assert torch.equal(reference.sample_labels(logits, KEY, 3), whole)


@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_the_same_bits_for_any_number_of_threads_and_any_split(classes: int) -> None:
    logits = logits_for(classes, torch.float32, rows=512)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.sample_cross_entropy(logits, KEY, 1.0))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # a strided view of the same numbers
    strided = torch.stack([logits, logits], 2)[:, :, 0]
    assert all(torch.equal(a, b) for a, b in zip(results[0], ops.sample_cross_entropy(strided, KEY, 1.0), strict=True))


@pytest.mark.parametrize("extreme", [1e4, -1e4, 80.0])
def test_extreme_and_masked_logits(extreme: float) -> None:
    for classes in (10, 3000):
        logits = torch.full((8, classes), -float("inf"))
        logits[:, 3] = extreme
        logits[:, -1] = extreme
        nll, labels, dlogits = ops.sample_cross_entropy(logits, KEY, 1.0)
        assert set(labels.tolist()) <= {3, classes - 1}
        torch.testing.assert_close(nll, torch.full((8,), 2.0).log())
        torch.testing.assert_close(dlogits.abs().sum(1), torch.ones(8))


@pytest.mark.parametrize("classes", [10, 3000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_row_without_a_softmax_is_named(bad: float | None, classes: int) -> None:
    logits = torch.randn(50, classes)
    for row in (41, 17):
        if bad is None:
            logits[row] = -float("inf")
        else:
            logits[row, classes // 2] = bad
    for implementation in (ops, reference):
        with pytest.raises(ValueError, match="logits: row 17 has no softmax"):
            implementation.sample_cross_entropy(logits, KEY, 1.0)


def test_empty_batch_and_bad_arguments() -> None:
    nll, labels, dlogits = ops.sample_cross_entropy(torch.empty(0, 10), KEY, 1.0)
    assert nll.shape == labels.shape == (0,) and dlogits.shape == (0, 10)
    with pytest.raises(ValueError, match='reduction: expected "mean", "sum" or "none"'):
        fastfisher.sample_cross_entropy(torch.zeros(2, 3), reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key and generator"):
        fastfisher.sample_cross_entropy(torch.zeros(2, 3), key=KEY, generator=torch.Generator())
    with pytest.raises(ValueError, match="expected shape"):
        fastfisher.sample_cross_entropy(torch.tensor(1.0))
    if ops.UNAVAILABLE is None:
        with pytest.raises(ValueError, match="expected float32, float64, bfloat16 or float16"):
            fastfisher.sample_cross_entropy(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="1 to 262144 classes"):
            fastfisher.sample_cross_entropy(torch.zeros(2, 0))
        with pytest.raises(ValueError, match="key: expected"):
            fastfisher.sample_cross_entropy(torch.zeros(2, 3), key=torch.zeros(3))


def test_the_public_wrapper() -> None:
    logits = torch.randn(4, 5, 10, requires_grad=True)
    torch.manual_seed(3)
    loss, labels = fastfisher.sample_cross_entropy(logits)
    torch.manual_seed(3)
    again, same = fastfisher.sample_cross_entropy(logits)
    assert torch.equal(labels, same) and torch.equal(loss, again) and labels.shape == (4, 5)
    _, other = fastfisher.sample_cross_entropy(logits)
    assert not torch.equal(labels, other)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = (logits.softmax(-1) - F.one_hot(labels, 10)) / 20
    torch.testing.assert_close(gradient, expected.detach())
    each, _ = fastfisher.sample_cross_entropy(logits, generator=torch.Generator().manual_seed(1), reduction="none")
    total, _ = fastfisher.sample_cross_entropy(logits, generator=torch.Generator().manual_seed(1), reduction="sum")
    assert each.shape == (4, 5)
    torch.testing.assert_close(each.sum(), total)


@needs_kernels
@pytest.mark.parametrize("classes", [1, 6, 1030])
def test_derivatives_to_second_order(classes: int) -> None:
    x = logits_for(classes, torch.float64, rows=2).requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        nll, _, dlogits = ops.sample_cross_entropy(x, KEY, 0.7)
        return nll, dlogits

    fast = classes > 100
    assert torch.autograd.gradcheck(function, (x,), fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=fast)
    _, labels, d = ops.sample_cross_entropy(x.detach(), KEY, 0.7)
    v = torch.randn_like(d)
    product = lambda d, v: ops.softmax_hessian_product(d, labels, v, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(product, (d.requires_grad_(), v.requires_grad_()), fast_mode=fast)


@needs_kernels
def test_one_compilation_for_many_keys() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    function = torch.compile(lambda x, key: torch.ops.fastfisher.sample_cross_entropy(x, key, 1.0)[1], backend=counter)
    for seed in range(5):
        function(torch.randn(4, 6), torch.tensor([seed, 0]))
    assert counter.frame_count == 1


# ---- labels 0 and 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_binary_values_err_at_most_twice_what_pytorch_errs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for scale, first, size in ((0.5, 0, 3.0), (-3.0, 5, 30.0)):
        logits = binary_logits_for(shape, dtype, size)
        nll, labels, dlogits = ops.sample_binary_cross_entropy(logits, KEY, scale, first)
        assert_binary_errs_at_most_twice_what_pytorch_errs(logits, nll, labels, dlogits, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_binary_labels_are_those_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = binary_logits_for(shape, dtype)
    for first in (0, 3, 2**34 + 777):
        labels = ops.sample_binary_cross_entropy(logits, KEY, 1.0, first)[1]
        assert_binary_labels_are_those_of_the_definition(logits, labels, KEY, first)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_improbable_labels_are_as_exact_as_others(dtype: torch.dtype) -> None:
    """To 4 units of their own last place, where sigmoid(z) − y has no digit left: an exponential's error is 2 units,
    and a sum, a quotient, and two products, or the logarithm's sums, are rounded."""
    logits = torch.linspace(-80, 80, 20_001, dtype=dtype)
    nll, labels, dlogits = ops.sample_binary_cross_entropy(logits, KEY, 1.0)
    for found, exact in zip((nll, dlogits), exact_binary(logits, labels), strict=True):
        assert float(abs(precise(found) / exact - 1).max()) <= 4 * torch.finfo(dtype).eps


def test_binary_draws_follow_the_sigmoid() -> None:
    draws = 100_000
    logits = torch.cat([torch.linspace(-6, 6, 41), torch.tensor([-math.inf, math.inf])])
    ones = torch.zeros(len(logits), dtype=torch.float64)
    for chunk in range(4):
        labels = ops.sample_binary_cross_entropy(logits.expand(draws // 4, -1), torch.tensor([99, chunk]), 1.0)[1]
        ones += labels.double().sum(0)
    assert ones[-2] == 0 and ones[-1] == draws
    p = logits[:-2].double().sigmoid()
    chi2 = float(((ones[:-2] - draws * p) ** 2 / (draws * p * (1 - p))).sum())
    assert scipy.stats.chi2.sf(chi2, len(p)) > SIGNIFICANCE


@pytest.mark.parametrize("distance", [1, 16])  # neighbours, and those that share a Philox call
def test_binary_draws_are_independent(distance: int) -> None:
    labels = ops.sample_binary_cross_entropy(torch.zeros(64 * 20_000), KEY, 1.0)[1].view(-1, 64).long()
    four = labels.view(-1, 16, 4) if distance == 1 else labels.view(-1, 4, 16).mT
    patterns = (four << torch.arange(4)).sum(-1).flatten()
    counts, mean = torch.bincount(patterns, minlength=16).double(), len(patterns) / 16
    assert scipy.stats.chi2.sf(float(((counts - mean) ** 2 / mean).sum()), 15) > SIGNIFICANCE


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 1), (0, 3), (1, 1, 16)], ids=str)
def test_any_shape_has_labels(shape: tuple[int, ...]) -> None:
    logits = binary_logits_for(shape, torch.float32)
    expected = reference.sample_binary_cross_entropy(logits, KEY, 0.5, 7)
    for found, other in zip(ops.sample_binary_cross_entropy(logits, KEY, 0.5, 7), expected, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_the_elements_is_drawn_as_in_the_whole(dtype: torch.dtype) -> None:
    logits = binary_logits_for((40, 10), dtype).flatten()
    whole = ops.sample_binary_cross_entropy(logits, KEY, 0.5)
    for first in (*range(1, 66), 128, 399, 400):
        part = ops.sample_binary_cross_entropy(logits[first:], KEY, 0.5, first)
        assert all(torch.equal(found, expected[first:]) for found, expected in zip(part, whole, strict=True))
    assert not torch.equal(ops.sample_binary_cross_entropy(logits[13:], KEY, 0.5)[1], whole[1][13:])


def test_many_elements_are_drawn_in_chunks_with_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = binary_logits_for((30, 33), torch.float32)
    whole = reference.sample_bernoulli(logits, KEY, 3)
    monkeypatch.setattr(reference, "_CHUNK", 70)
    assert torch.equal(reference.sample_bernoulli(logits, KEY, 3), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_are_counted_in_their_order_whatever_the_layout(dtype: torch.dtype) -> None:
    logits = binary_logits_for((3, 4, 5, 6), dtype)
    expected = ops.sample_binary_cross_entropy(logits, KEY, 0.5)
    laid_out = [logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT]
    for other in (*laid_out, torch.stack([logits, logits], -1)[..., 0]):
        found = ops.sample_binary_cross_entropy(other, KEY, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_logits_are_certain(dtype: torch.dtype) -> None:
    for implementation in (ops, reference):
        logits = torch.tensor([math.inf, -math.inf, torch.finfo(dtype).max, torch.finfo(dtype).min] * 20, dtype=dtype)
        nll, labels, dlogits = implementation.sample_binary_cross_entropy(logits, KEY, 0.5)
        assert torch.equal(labels, (logits > 0).to(dtype))
        assert not nll.any() and not dlogits.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_logit_that_is_nan_is_named(dtype: torch.dtype) -> None:
    logits = binary_logits_for((50, 30), dtype)
    logits[41, 3] = logits[17, 29] = logits[17, 4] = math.nan
    for implementation in (ops, reference):
        with pytest.raises(ValueError, match=r"logits: expected no NaN, got one at \[17, 4\]"):
            implementation.sample_binary_cross_entropy(logits, KEY, 1.0)
        with pytest.raises(ValueError, match=r"logits: expected no NaN, got one at \[\]"):
            implementation.sample_binary_cross_entropy(logits[17, 4], KEY, 1.0)
    large = torch.zeros(3, 100_000, dtype=dtype)  # of several tasks
    large[2, 5] = large[1, 99_999] = -math.nan
    with pytest.raises(ValueError, match=r"one at \[1, 99999\]"):
        ops.sample_binary_cross_entropy(large, KEY, 1.0)


def test_bad_arguments_of_the_binary_loss() -> None:
    function: Any = fastfisher.sample_binary_cross_entropy
    with pytest.raises(ValueError, match='reduction: expected "mean", "sum" or "none", got \'max\''):
        function(torch.zeros(3), reduction="max")
    with pytest.raises(ValueError, match="key and generator"):
        function(torch.zeros(3), key=KEY, generator=torch.Generator())
    with pytest.raises(ValueError, match="first: expected a number >= 0, got -1"):
        function(torch.zeros(3), first=-1)
    with pytest.raises(ValueError, match="logits: expected a tensor, got list"):
        function([0.0])
    assert bool(function(torch.zeros(0, 3))[0].isnan())
    if ops.UNAVAILABLE is None:
        with pytest.raises(ValueError, match="logits: expected float32, float64, bfloat16 or float16"):
            function(torch.zeros(3).long())
        with pytest.raises(ValueError, match="key: expected"):
            function(torch.zeros(3), key=torch.zeros(3))
        with pytest.raises(ValueError, match="scale: expected a number other than 0"):
            ops.sample_binary_cross_entropy(torch.zeros(3), KEY, 0.0)
        with pytest.raises(ValueError, match="first: expected 0 or more, got -1"):
            ops.sample_binary_cross_entropy(torch.zeros(3), KEY, 1.0, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (4, 5, 10)], ids=str)
def test_the_public_binary_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = binary_logits_for(shape, dtype).requires_grad_()
    torch.manual_seed(3)
    loss, labels = fastfisher.sample_binary_cross_entropy(logits)
    torch.manual_seed(3)
    again, same = fastfisher.sample_binary_cross_entropy(logits.detach())
    assert torch.equal(labels, same) and labels.shape == shape and labels.dtype == dtype
    torch.testing.assert_close(loss.detach(), again)
    low = logits.to(loss.dtype)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(low, labels.to(loss.dtype)))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = (low.detach().sigmoid() - labels) / max(1, logits.numel())
    torch.testing.assert_close(gradient, expected.to(dtype))
    key = KEY + 1
    each, drawn = fastfisher.sample_binary_cross_entropy(logits, key=key, reduction="none")
    total, _ = fastfisher.sample_binary_cross_entropy(logits, key=key, reduction="sum")
    assert each.shape == shape
    torch.testing.assert_close(each.sum(), total)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=loss.dtype)
    (gradient,) = torch.autograd.grad(each, logits, weights)
    torch.testing.assert_close(gradient, ((low.detach().sigmoid() - drawn) * weights).to(dtype))


@needs_kernels
@pytest.mark.parametrize("numel", [1, 6, 130])
def test_binary_derivatives_to_third_order(numel: int) -> None:
    x = binary_logits_for((numel,), torch.float64).requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        nll, _, dlogits = ops.sample_binary_cross_entropy(x, KEY, 0.7)
        return nll, dlogits

    fast = numel > 100
    assert torch.autograd.gradcheck(function, (x,), fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=fast)

    def third(implementation: Any) -> Tensor:
        derivative = implementation.sample_binary_cross_entropy(x, KEY, 0.7)[0].sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        return derivative.detach()

    torch.testing.assert_close(third(ops), third(reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_double_backward_of_the_binary_loss(reduction: Any, dtype: torch.dtype) -> None:
    """∇‖∇ of the loss‖² against autograd's through the definition, in float64."""
    logits = binary_logits_for((9, 7), dtype)
    weights = torch.linspace(-1, 2, 63, dtype=torch.float64).view(9, 7)

    def derivative(x: Tensor, loss: Tensor) -> Tensor:
        used = loss if reduction != "none" else (loss * weights.to(loss.dtype)).sum()
        (gradient,) = torch.autograd.grad(used, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.to(loss.dtype).square().sum(), x)
        return second

    x = logits.clone().requires_grad_()
    found = derivative(x, fastfisher.sample_binary_cross_entropy(x, key=KEY, reduction=reduction)[0])
    y = logits.double().requires_grad_()
    nll = reference.sample_binary_cross_entropy(y, KEY, 1.0)[0]
    exact = derivative(y, nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else nll)
    # A gradient, its double, and two factors, each rounded to the dtype.
    assert float((found.double() - exact).abs().max()) <= 4 * torch.finfo(dtype).eps * float(exact.abs().max())


@needs_kernels
def test_one_compilation_of_the_binary_loss_for_many_keys() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    function = torch.compile(lambda x, key: fastfisher.sample_binary_cross_entropy(x, key=key), backend=counter)
    for seed in range(5):
        key = torch.tensor([seed, 0])
        x = torch.randn(4, 6, requires_grad=True)
        loss, labels = function(x, key)
        expected, drawn = fastfisher.sample_binary_cross_entropy(x, key=key)
        assert torch.equal(labels, drawn)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))
    assert counter.frame_count == 1


# ---- Rademacher cotangents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_rademacher_cotangents_agree_with_the_reference(classes: int, dtype: torch.dtype) -> None:
    logits = logits_for(classes, dtype, rows=None if classes < 10_000 else 3)
    logits[1, ::3] = -float("inf")
    if classes == 1:
        logits[1] = 0
    truth = reference.rademacher_cotangent(logits.double(), KEY, 0.5)
    low = torch.float64 if dtype == torch.float64 else torch.float32
    pytorch = reference.rademacher_cotangent(logits.to(low), KEY, 0.5).to(dtype).double()
    ulp = torch.finfo(dtype).eps * float(truth.abs().max()) + 4 * torch.finfo(low).eps
    error = (ops.rademacher_cotangent(logits, KEY, 0.5).double() - truth).abs().max()
    assert float(error) <= 2 * float((pytorch - truth).abs().max()) + ulp


def test_rademacher_cotangents_have_the_covariance_of_the_score() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -float("inf")], dtype=torch.float64)
    draws = 100_000
    c = ops.rademacher_cotangent(logits.expand(draws, 5), torch.tensor([7, 3]), 1.0)
    p = logits.softmax(0)
    covariance = torch.diag(p) - torch.outer(p, p)
    products = c[:, :, None] * c[:, None, :]
    # Every entry's z-score; 15 distinct ones, two-sided, Bonferroni at SIGNIFICANCE.
    error = products.std(0) / draws**0.5
    limit = scipy.stats.norm.isf(SIGNIFICANCE / 30)
    assert bool(((products.mean(0) - covariance).abs() <= limit * error + 1e-12).all())
    assert bool((c.mean(0).abs() <= limit * c.std(0) / draws**0.5 + 1e-12).all())
    assert float(c[:, 4].abs().max()) == 0.0
    torch.testing.assert_close(c.sum(1), torch.zeros(draws, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rademacher_cotangents_are_the_gradient_of_the_loss_at_signs() -> None:
    logits = torch.randn(7, 200, dtype=torch.float64, requires_grad=True)
    loss = CATEGORICAL.loss(logits, Signs(reference.rademacher_signs(7, 200, KEY)))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, ops.rademacher_cotangent(logits.detach(), KEY, 1 / 7))


@pytest.mark.parametrize("classes", [10, 3000])
def test_rademacher_names_a_row_without_a_softmax(classes: int) -> None:
    logits = torch.randn(50, classes)
    logits[17, 3] = float("nan")
    for implementation in (ops, reference):
        with pytest.raises(ValueError, match="logits: row 17 has no softmax"):
            implementation.rademacher_cotangent(logits, KEY, 1.0)


@pytest.mark.parametrize("function", [fastfisher.sample_cross_entropy, fastfisher.sample_binary_cross_entropy])
def test_gradients_by_torch_func_are_those_of_autograd(function: Any) -> None:
    z, key = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    with pytest.warns(fastfisher.SlowPathWarning, match=r"within torch\.func"):
        found = torch.func.grad(lambda z: function(z, key=key)[0])(z)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf, key=key)[0], leaf)
    torch.testing.assert_close(found.detach(), expected)
