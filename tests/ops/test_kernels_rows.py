"""The Triton kernels of kernels/rows.py in Triton's interpreter, against reference.py and exact arithmetic.

bfloat16 is left to the GPU tests: the interpreter computes it wrongly (triton-lang/triton#11584). What the kernels do
with it differs from float16 in one conversion.
"""

from __future__ import annotations

import math

import numpy
import pytest
import scipy.stats
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

if torch.cuda.is_available():
    pytest.skip("on a GPU the kernels themselves are tested (tests/test_gpu.py)", allow_module_level=True)

from fastfisher.kernels import rows
from fastfisher.ops import reference
from tests.support.operators import (
    KEY,
    SIGNIFICANCE,
    assert_binary_errs_at_most_twice_what_pytorch_errs,
    assert_binary_labels_are_those_of_the_definition,
    assert_errs_at_most_twice_what_pytorch_errs,
    assert_labels_are_the_exact_inverse_cdf,
    binary_logits_for,
    exact_binary,
    logits_for,
    precise,
)

# The interpreter divides by the zeros of masked rows as numpy does: with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")

DTYPES = [torch.float32, torch.float64, torch.float16]
# classes, rows, and why
SHAPES = [
    (1, 5),  # a single class: no choice, a gradient of 0
    (2, 33),  # more rows than a program takes
    (10, 40),  # the same, of another width
    (16, 3),  # a full row, fewer rows than a program takes
    (17, 9),  # one column more: the next width
    (127, 5),  # one short of a width and of a sign word's block
    (129, 5),
    (512, 2),
    (513, 2),  # a row that is a tile; float64 loops from here on
    (1000, 3),  # a multiple of 8: vector loads
    (1023, 2),
    (1024, 2),
    (1025, 2),  # two tiles, the second of one column
    (4096, 2),
    (5000, 2),  # a broken tile among 16
    (16384, 1),  # the longest row on chip
    (16385, 2),  # two passes, the last step of one column
    (50257, 2),
    (262144, 1),  # the widest
]
# Negative words, words above 2^31 and 2^32, both halves set.
KEYS = [KEY, torch.tensor([0, 0]), torch.tensor([-1, -(2**63)]), torch.tensor([2**33 + 1, 2**31])]


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What is granted to both sides, as in test_rows.py: a unit in the last place, and four of a sum of size 1."""
    low = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps * float(truth.abs().max()) + 4 * torch.finfo(low).eps


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_philox_words_are_those_of_the_reference(key: Tensor) -> None:
    calls = 300  # more than one program's
    for first in (0, 2**33):
        words = torch.empty(calls, 4, dtype=torch.int32)
        rows.sign_words[(2,)](key, words, first, calls, BLOCK=256)
        assert torch.equal(words.long() & 0xFFFFFFFF, reference.philox(key, first + torch.arange(calls)))


@triton.jit
def _exponentials(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, rows.exponential(tl.load(x + place)))


@triton.jit
def _quotients(x, y, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, rows.quotient(tl.load(x + place), tl.load(y + place)))


def fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x y + z rounded once, as a GPU does; the interpreter rounds twice."""
    product = x.data.astype(numpy.longdouble) * y.data  # exact for float32, and the sum to 64 bits
    return TensorHandle((product + z.data).astype(x.data.dtype), z.dtype.scalar)


def exp2(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
    """2^x rounded once, which numpy's float32 function is not."""
    return TensorHandle(numpy.exp2(x.data.astype(numpy.longdouble)).astype(x.data.dtype), x.dtype.scalar)


def test_exponentials_far_below_0_are_nearly_as_exact_as_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", exp2)
    x = torch.linspace(-87, 0, 2**16)  # to the smallest normal number
    x[:4] = torch.tensor([-math.inf, math.nan, -1e4, -200.5])
    found = torch.empty_like(x)
    _exponentials[(1,)](x, found, SIZE=len(x))
    assert found[0] == found[2] == found[3] == 0 and bool(found[1].isnan())
    exact = numpy.asarray(x[4:]).astype(numpy.longdouble)
    error = numpy.abs(numpy.asarray(found[4:]) / numpy.exp(exact) - 1)
    # Two roundings, and what float32 lacks of log 2, 2.75e-9 of it: eps / 43.
    assert bool((error <= torch.finfo(torch.float32).eps * (1 - exact / 43)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quotients_are_ieees(dtype: torch.dtype) -> None:
    x, y = torch.rand(2, 2**12, dtype=dtype) + 0.1
    found = torch.empty_like(x)
    _quotients[(1,)](x, y, found, SIZE=len(x))
    assert torch.equal(found, x / y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_labels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = logits_for(shape[0], dtype, rows=shape[1])
    nll, labels, dlogits = rows.sample_cross_entropy(logits, KEY, 0.5)
    assert_errs_at_most_twice_what_pytorch_errs(logits, nll, labels, dlogits, 0.5)
    assert_labels_are_the_exact_inverse_cdf(logits, labels, KEY)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hessian_products_err_at_most_twice_what_the_reference_errs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = logits_for(shape[0], dtype, rows=shape[1])
    _, labels, d = reference.sample_cross_entropy(logits, KEY, 0.5)
    vector = (2 * torch.rand(d.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1).to(dtype)
    truth = reference.softmax_hessian_product(d.double(), labels, vector.double(), 0.5)
    error = (rows.softmax_hessian_product(d, labels, vector, 0.5).double() - truth).abs().max()
    theirs = (reference.softmax_hessian_product(d, labels, vector, 0.5).double() - truth).abs().max()
    assert float(error) <= 2 * float(theirs) + rounding(truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rademacher_cotangents_err_at_most_twice_what_the_reference_errs(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits = logits_for(shape[0], dtype, rows=shape[1])
    if shape[0] > 1:
        logits[0, 1::3] = -math.inf
    truth = reference.rademacher_cotangent(logits.double(), KEY, 0.5)
    error = (rows.rademacher_cotangent(logits, KEY, 0.5).double() - truth).abs().max()
    theirs = (reference.rademacher_cotangent(logits, KEY, 0.5).double() - truth).abs().max()
    assert float(error) <= 2 * float(theirs) + rounding(truth, dtype)


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("classes", [10, 2000])
def test_every_key_draws_what_the_reference_draws(classes: int, key: Tensor) -> None:
    logits = logits_for(classes, torch.float32, rows=16)
    assert_labels_are_the_exact_inverse_cdf(logits, rows.sample_cross_entropy(logits, key, 1.0)[1], key)
    expected = reference.rademacher_cotangent(logits, key, 1.0)
    torch.testing.assert_close(rows.rademacher_cotangent(logits, key, 1.0), expected)


# Both forms of the kernel: a row in registers, and one in two passes.
@pytest.mark.parametrize("classes", [10, 20_000])
def test_a_part_of_the_rows_is_drawn_as_in_the_whole(classes: int) -> None:
    logits = logits_for(classes, torch.float32, rows=5)
    whole = [*rows.sample_cross_entropy(logits, KEY, 0.5), rows.rademacher_cotangent(logits, KEY, 0.5)]
    part = [*rows.sample_cross_entropy(logits[2:], KEY, 0.5, 2), rows.rademacher_cotangent(logits[2:], KEY, 0.5, 2)]
    assert all(torch.equal(found, expected[2:]) for found, expected in zip(part, whole, strict=True))


@pytest.mark.parametrize("extreme", [1e4, -1e4, 80.0])
@pytest.mark.parametrize("classes", [10, 3000, 20_000])  # each form of the kernels
def test_extreme_and_masked_logits(classes: int, extreme: float) -> None:
    logits = torch.full((4, classes), -math.inf)
    logits[:, 3] = logits[:, -1] = extreme
    nll, labels, dlogits = rows.sample_cross_entropy(logits, KEY, 1.0)
    assert set(labels.tolist()) <= {3, classes - 1}
    torch.testing.assert_close(nll, torch.full((4,), 2.0).log())
    torch.testing.assert_close(dlogits.abs().sum(1), torch.ones(4))
    assert bool((dlogits[:, 4:-1] == 0).all())
    torch.testing.assert_close(
        rows.rademacher_cotangent(logits, KEY, 1.0), reference.rademacher_cotangent(logits, KEY, 1.0)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("classes", [10, 3000, 20_000])
def test_a_row_without_a_softmax_is_marked_and_harms_no_other(classes: int, bad: float | None) -> None:
    logits = torch.randn(4, classes)
    good = rows.sample_cross_entropy(logits, KEY, 1.0)
    if bad is None:
        logits[2] = -math.inf
    else:
        logits[2, classes // 2] = bad
    nll, labels, dlogits = rows.sample_cross_entropy(logits, KEY, 1.0)
    assert labels[2] == -1 and bool(nll[2].isnan()) and bool(dlogits[2].isnan().all())
    product = rows.softmax_hessian_product(dlogits, labels, torch.ones_like(dlogits), 1.0)
    assert bool(product[2].isnan().all()) and bool(product[[0, 1, 3]].isfinite().all())
    cotangent = rows.rademacher_cotangent(logits, KEY, 1.0)
    assert bool(cotangent[2].isnan().all()) and bool(cotangent[[0, 1, 3]].isfinite().all())
    for found, expected in zip((nll, labels, dlogits), good, strict=True):
        assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_draws_follow_the_softmax() -> None:
    classes, draws = 100, 800
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(0))
    logits[::5] = -math.inf
    labels = rows.sample_cross_entropy(logits.expand(draws, classes), KEY, 1.0)[1]
    counts = torch.bincount(labels, minlength=classes).double()
    assert counts[::5].sum() == 0, "a masked class was drawn"
    expected, order = (logits.double().softmax(0) * draws).sort(descending=True)
    alone = int((expected >= 5).sum())  # the others are pooled
    observed = torch.cat([counts[order[:alone]], counts[order[alone:]].sum()[None]])
    mean = torch.cat([expected[:alone], expected[alone:].sum()[None]])
    assert alone >= 20 and float(mean[-1]) >= 5
    assert scipy.stats.chi2.sf(float(((observed - mean) ** 2 / mean).sum()), alone) > SIGNIFICANCE


# ---- labels 0 and 1 -------------------------------------------------------------------------------------------------

# Less than a group of 64, one, one more; a program's 2,048 less and more by one; maps.
BINARY_SHAPES = [(63,), (64,), (65,), (2047,), (2049,), (2, 3, 5, 70)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BINARY_SHAPES, ids=str)
@pytest.mark.parametrize("first", [0, 5, 2**34 + 777])
def test_binary_values_and_labels(shape: tuple[int, ...], dtype: torch.dtype, first: int) -> None:
    logits = binary_logits_for(shape, dtype)
    nll, labels, dlogits = rows.sample_binary_cross_entropy(logits, KEY, -0.5, first)
    assert_binary_errs_at_most_twice_what_pytorch_errs(logits, nll, labels, dlogits, -0.5)
    assert_binary_labels_are_those_of_the_definition(logits, labels, KEY, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_improbable_labels_are_nearly_as_exact_as_others(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
        monkeypatch.setattr(InterpreterBuilder, "create_exp2", exp2)
    logits = torch.linspace(-80, 80, 20_001, dtype=dtype)
    nll, labels, dlogits = rows.sample_binary_cross_entropy(logits, KEY, 1.0)
    # The exponential's own error, as above, and three roundings.
    allowed = torch.finfo(dtype).eps * (4 + precise(logits.abs()) / 43)
    for found, exact in zip((nll, dlogits), exact_binary(logits, labels), strict=True):
        assert bool((abs(precise(found) / exact - 1) <= allowed).all())


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_every_key_draws_the_labels_of_the_reference(key: Tensor) -> None:
    logits = binary_logits_for((1000,), torch.float32)
    labels = rows.sample_binary_cross_entropy(logits, key, 1.0)[1]
    assert_binary_labels_are_those_of_the_definition(logits, labels, key)


def test_a_part_of_the_elements_is_drawn_as_in_the_whole() -> None:
    logits = binary_logits_for((2500,), torch.float32)
    whole = rows.sample_binary_cross_entropy(logits, KEY, 0.5)
    for first in (1, 3, 16, 63, 64, 65, 2047, 2499):
        part = rows.sample_binary_cross_entropy(logits[first:], KEY, 0.5, first)
        assert all(torch.equal(found, expected[first:]) for found, expected in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_logits_are_certain_and_nan_is_marked(dtype: torch.dtype) -> None:
    logits = torch.tensor([math.inf, -math.inf, math.nan] * 40, dtype=dtype)
    nll, labels, dlogits = (x.view(-1, 3) for x in rows.sample_binary_cross_entropy(logits, KEY, 1.0))
    assert bool((labels == torch.tensor([1, 0, -1])).all()) and labels.dtype == dtype
    assert not nll[:, :2].any() and not dlogits[:, :2].any()
    assert bool(nll[:, 2].isnan().all()) and bool(dlogits[:, 2].isnan().all())


def test_binary_draws_follow_the_sigmoid() -> None:
    draws, logits = 4000, torch.linspace(-4, 4, 33)
    labels = rows.sample_binary_cross_entropy(logits.expand(draws, -1), KEY, 1.0)[1]
    ones, p = labels.double().sum(0), logits.double().sigmoid()
    chi2 = float(((ones - draws * p) ** 2 / (draws * p * (1 - p))).sum())
    assert scipy.stats.chi2.sf(chi2, len(p)) > SIGNIFICANCE


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3, 1)], ids=str)
def test_any_shape_and_layout_has_labels(shape: tuple[int, ...]) -> None:
    logits = binary_logits_for(shape, torch.float32)
    expected = reference.sample_binary_cross_entropy(logits, KEY, 1.0)
    for layout in (logits, torch.stack([logits, logits], -1)[..., 0], logits.transpose(0, -1) if shape else logits):
        found = rows.sample_binary_cross_entropy(layout, KEY, 1.0)
        assert all(x.shape == layout.shape and x.is_contiguous() for x in found)
        if layout.shape == shape:
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y)


def test_any_layout_and_no_rows() -> None:
    logits = logits_for(10, torch.float32, rows=6)
    strided = torch.stack([logits, logits], 2)[:, :, 0]
    for found, expected in zip(
        rows.sample_cross_entropy(strided, KEY, 1.0), rows.sample_cross_entropy(logits, KEY, 1.0), strict=True
    ):
        assert torch.equal(found, expected)
    nll, labels, dlogits = rows.sample_cross_entropy(torch.empty(0, 10), KEY, 1.0)
    assert nll.shape == labels.shape == (0,) and dlogits.shape == (0, 10)
    assert rows.rademacher_cotangent(torch.empty(0, 10), KEY, 1.0).shape == (0, 10)
    assert rows.softmax_hessian_product(dlogits, labels, dlogits, 1.0).shape == (0, 10)


def test_every_plan_is_among_the_configurations_that_are_compiled() -> None:
    known = set(map(str, rows.CONFIGURATIONS))
    for classes in [*range(1, 1100), *range(1100, 2**18, 977), 2**18]:
        for operator in ("sample_cross_entropy", "softmax_hessian_product", "rademacher_cotangent"):
            for dtype in (*DTYPES, torch.bfloat16):
                assert str(rows.plan(operator, dtype, classes)) in known
    for dtype in (*DTYPES, torch.bfloat16):
        assert str(rows.plan_binary(dtype)) in known


def test_bad_arguments_are_named() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="expected float32, float64, bfloat16 or float16"):
        rows.sample_cross_entropy(logits.long(), KEY, 1.0)
    with pytest.raises(ValueError, match="1 to 262144 classes"):
        rows.sample_cross_entropy(torch.zeros(2, 0), KEY, 1.0)
    with pytest.raises(ValueError, match="2 dimensions"):
        rows.rademacher_cotangent(torch.zeros(2), KEY, 1.0)
    with pytest.raises(ValueError, match="scale: expected"):
        rows.sample_cross_entropy(logits, KEY, 0.0)
    with pytest.raises(ValueError, match="key: expected a contiguous int64"):
        rows.rademacher_cotangent(logits, KEY.int(), 1.0)
    with pytest.raises(ValueError, match="dlogits and vector"):
        rows.softmax_hessian_product(logits, torch.zeros(2).long(), torch.zeros(2, 4), 1.0)
    for arguments, message in (
        ((logits.long(), KEY, 1.0), "logits: expected float32, float64, bfloat16 or float16"),
        ((logits, KEY, 0.0), "scale: expected a number other than 0"),
        ((logits, KEY, 1.0, -1), "first: expected 0 or more, got -1"),
        ((logits, KEY.int(), 1.0), "key: expected a contiguous int64"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.sample_binary_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="labels: expected one int64 label per row"):
        rows.softmax_hessian_product(logits, torch.zeros(3).long(), logits, 1.0)
