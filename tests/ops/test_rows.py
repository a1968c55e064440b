"""The operators on rows of logits against reference.py: values, draws, derivatives, errors."""

from __future__ import annotations

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
    SIGNIFICANCE,
    assert_errs_at_most_twice_what_pytorch_errs,
    assert_labels_are_the_exact_inverse_cdf,
    logits_for,
    needs_kernels,
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
