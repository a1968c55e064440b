"""The operators against reference.py: values, derivatives, draws, errors, and the same bits every time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import fastfisher
from fastfisher import ops
from fastfisher.labels import Signs, cross_entropy
from fastfisher.ops import reference

needs_kernels = pytest.mark.skipif(ops.UNAVAILABLE is not None, reason=f"no compiled kernels: {ops.UNAVAILABLE}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One lane, less than a vector, whole and broken vectors, one tile less and more by one, several tiles, the widest.
CLASSES = [1, 2, 7, 10, 16, 100, 127, 1000, 1023, 1024, 1025, 2048, 5000, 50257, 262144]
KEY = torch.tensor([1234, 2**40 + 7])
SIGNIFICANCE = 1e-4


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def logits_for(classes: int, dtype: torch.dtype, rows: int | None = None) -> Tensor:
    rows = rows or max(2, min(64, 2**18 // classes))
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))).to(dtype)


def precise(x: Tensor) -> Any:
    """In more digits than float64 has."""
    return x.detach().double().numpy().astype(numpy.longdouble)


def assert_errs_at_most_twice_what_pytorch_errs(
    logits: Tensor, nll: Tensor, labels: Tensor, dlogits: Tensor, scale: float
) -> None:
    classes, dtype = logits.shape[1], logits.dtype
    onehot = F.one_hot(labels, classes)
    exact = numpy.asarray(logits.double().cpu()).astype(numpy.longdouble)  # 64 bits of mantissa judge float64 too
    exact -= exact.max(1, keepdims=True)
    exact_nll = numpy.log(numpy.exp(exact).sum(1)) - exact[numpy.arange(len(labels)), labels.cpu().numpy()]
    exact_dlogits = (numpy.exp(exact) / numpy.exp(exact).sum(1, keepdims=True) - onehot.cpu().numpy()) * scale

    def error(found: Tensor, truth: numpy.ndarray) -> float:
        return float(numpy.abs(found.double().cpu().numpy() - truth).max())

    # PyTorch's own computation in the same dtype. Half a unit in the last place of the largest result is granted to
    # both: where it happens to be representable, PyTorch has no error at all.
    torch_dlogits = (logits.softmax(1) - onehot) * scale
    half_ulp = torch.finfo(dtype).eps / 2 * float(numpy.abs(exact_dlogits).max())
    assert error(dlogits, exact_dlogits) <= 2 * error(torch_dlogits, exact_dlogits) + half_ulp
    torch_nll = F.cross_entropy(logits.to(nll.dtype), labels, reduction="none")
    half_ulp = torch.finfo(nll.dtype).eps / 2 * float(exact_nll.max())
    assert error(nll, exact_nll) <= 2 * error(torch_nll, exact_nll) + half_ulp
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert dlogits.dtype == dtype


def assert_labels_are_the_exact_inverse_cdf(logits: Tensor, labels: Tensor, key: Tensor) -> None:
    expected = reference.sample_labels(logits, key)
    # A draw may fall to the other side of an edge only where its target lies within rounding of that edge: then the
    # two labels are neighbours among the classes of positive weight in their tile, or in neighbouring tiles.
    for row in (labels != expected).nonzero().flatten().tolist():
        u = reference.philox(key, torch.tensor([row]))[0].double() * 2.0**-32
        weights = F.pad(
            (logits[row].double() - logits[row].double().max()).exp(), (0, -logits.shape[1] % reference.TILE)
        )
        tiles = weights.view(-1, reference.TILE)
        by_tile = tiles.sum(1).cumsum(0) / tiles.sum()
        within = tiles[expected[row] // reference.TILE].cumsum(0)
        distance = min((by_tile - u[0]).abs().min(), (within / within[-1] - u[1]).abs().min())
        assert distance < 2e-6, f"row {row}: {labels[row]} instead of {expected[row]}"
    assert (labels != expected).float().mean() < 0.05


@needs_kernels
@pytest.mark.parametrize("key", [118, 701, 909, 1373, 1460])
def test_no_label_lies_beyond_the_row(key: int) -> None:
    """In one draw of 10^7 the running sum up to the last class rounds below the target, and the padding's above."""
    logits = torch.randn(60_000, 10, generator=torch.Generator().manual_seed(10))
    _, labels, _ = ops.sample_cross_entropy(logits, torch.tensor([key, 0]), 1.0)
    assert int(labels.min()) >= 0 and int(labels.max()) < 10


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


@needs_kernels
def test_philox_words_are_equal_in_cpp_and_pytorch() -> None:
    from fastfisher import _native

    for seed, offset in [(0, 0), (1, 2), (2**63 + 5, 2**33 + 1)]:
        for element in [0, 1, 2**31, 2**32 + 3, 2**40]:
            key = torch.tensor([seed - (seed >> 63 << 64), offset])
            words = reference.philox(key, torch.tensor(element)).tolist()
            assert list(_native.philox(seed, offset, element)) == words
    # Salmon et al.'s known answer for counter and key zero.
    assert reference.philox(torch.tensor([0, 0]), torch.tensor(0)).tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


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


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_simd_level_gives_the_same_labels(level: str) -> None:
    program = (
        "import torch; from fastfisher import ops, _native; from tests.ops.test_ops import KEY, logits_for\n"
        "print(_native.simd_level())\n"
        "for c in (10, 1000, 5000):\n"
        "    nll, labels, d = ops.sample_cross_entropy(logits_for(c, torch.float32), KEY, 1.0)\n"
        "    x = logits_for(c, torch.float64); e = (x.softmax(1) - torch.nn.functional.one_hot(labels, c))\n"
        "    print(labels.tolist(), bool((d - e).abs().max() < 3e-7))\n"
        "y = torch.arange(-40., 45.); out, bits = ops.gate_relu(y)\n"
        "assert torch.equal(out, y.relu()) and torch.equal(ops.gate_apply(y, bits), out)\n"
        "x = torch.randn(3, 40, 41); pool = (2, 2, 2, 2, False)\n"
        "from fastfisher.ops import reference\n"
        "assert all(map(torch.equal, ops.gate_max_pool(x, *pool), reference.gate_max_pool(x, *pool)))\n"
    )
    lines = {}
    for chosen in (level, ""):
        environment = {**os.environ, "FASTFISHER_SIMD_LEVEL": chosen}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        lines[chosen] = run.stdout.splitlines()
    assert lines[level][0] in (level, "baseline")
    assert lines[level][1:] == lines[""][1:]
    assert "False" not in run.stdout


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
def test_opcheck() -> None:
    x, y = torch.randn(5, 7, requires_grad=True), [torch.randn(3), torch.randn(4, 4)]
    _, labels, d = ops.sample_cross_entropy(x.detach(), KEY, 0.5)
    _, bits = ops.gate_relu(x.detach())
    namespace = torch.ops.fastfisher
    for operator, args in [
        (namespace.sample_cross_entropy, (x, KEY, 0.5)),
        (namespace.softmax_hessian_product, (d.requires_grad_(), labels, x.detach().requires_grad_(), 0.5)),
        (namespace.gate_relu, (x.detach(),)),
        (namespace.gate_relu_, (x.detach().clone(),)),
        (namespace.gate_max_pool, (torch.randn(3, 5, 6), 2, 3, 1, 2, True)),
        (namespace.gate_apply, (x.detach(), bits)),
        (namespace.gate_take, (x.detach(), torch.zeros(5, 2, dtype=torch.int32))),
        (namespace.gate_put, (x.detach(), torch.ones(5, 7, dtype=torch.int32), 9)),
        (namespace.axpy_diff, ([t.clone() for t in y], y, [2 * t for t in y], scalar(0.5))),
        (namespace.sum_squares, (y,)),
        (namespace.rademacher_cotangent, (x.detach(), KEY, 0.5)),
        (namespace.grad_sqnorm_linear, (torch.randn(2, 3, 4), torch.randn(2, 3, 5), True)),
        (namespace.grad_sqnorm_conv, (torch.randn(2, 3, 4), torch.randn(2, 5, 4), [1], [1], [0], [1], 1, False)),
        (namespace.channel_products, (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(3))),
    ]:
        torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize("module", [ops, reference])
def test_a_difference_times_0_is_not_looked_at(module: Any) -> None:
    out, b = torch.randn(40), torch.randn(40)
    a = b + 1
    a[3], a[5] = math.nan, math.inf
    before = out.clone()
    assert module.axpy_diff([out], [a], [b], scalar(0.0)) == 0
    assert torch.equal(out, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000, 2**16 + 5])
def test_gates_and_combines_agree_with_the_reference(numel: int, dtype: torch.dtype) -> None:
    a, b, out = (torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(3))
    a[::7], a[1::7] = 0, math.nan
    (relu, bits), (expected_relu, expected_bits) = ops.gate_relu(a), reference.gate_relu(a)
    assert torch.equal(bits, expected_bits)
    torch.testing.assert_close(relu, expected_relu, rtol=0, atol=0, equal_nan=True)
    inplace = a.clone()
    assert torch.equal(ops.gate_relu_(inplace), bits)
    torch.testing.assert_close(inplace, relu, rtol=0, atol=0, equal_nan=True)
    a = a.nan_to_num()
    assert torch.equal(ops.gate_apply(b, bits), reference.gate_apply(b, bits))
    expected, found = [out.clone(), a.clone()], [out.clone(), a.clone()]
    size = reference.axpy_diff(expected, [a, b], [b, a], scalar(0.3))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ops.axpy_diff(found, [a, b], [b, a], scalar(0.3)), size, rtol=tolerance, atol=0)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ops.sum_squares([a, b]), reference.sum_squares([a, b]), rtol=1e-12, atol=0)


# Windows of 2x2 side by side have a kernel of their own, which writes whole vectors: planes narrower than one, one
# element short of one, and wider; the others overlap, leave gaps or are no squares.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        *(((height, width), (2, 2), (2, 2)) for height in (2, 5, 30) for width in (2, 7, 31, 32, 33, 70)),
        ((9, 8), (3, 3), (2, 2)),
        ((9, 8), (2, 3), (1, 1)),
        ((9, 8), (2, 2), (3, 4)),
        ((4, 5), (4, 5), (1, 1)),
    ],
)
def test_max_pool_agrees_with_the_reference(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], gated: bool, dtype: torch.dtype
) -> None:
    x = torch.randint(-3, 4, (5, *size)).to(dtype)  # with many ties
    x[1, -1, -1], x[2] = math.nan, -math.inf
    x = x.relu() if gated else x
    values, indices = ops.gate_max_pool(x, *window, *stride, gated)
    expected_values, expected_indices = reference.gate_max_pool(x, *window, *stride, gated)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected_indices)


@needs_kernels
def test_max_pool_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="x: expected planes of at least 3 x 2, got 2 x 5"):
        ops.gate_max_pool(torch.ones(1, 2, 5), 3, 2, 1, 1, False)
    with pytest.raises(ValueError, match="expected >= 1"):
        ops.gate_max_pool(torch.ones(1, 2, 5), 1, 1, 0, 1, False)
    with pytest.raises(ValueError, match="planes, height, width"):
        ops.gate_max_pool(torch.ones(2, 5), 1, 1, 1, 1, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool_gates_agree_with_the_reference(dtype: torch.dtype) -> None:
    x, y = torch.randn(300, 50).to(dtype), torch.randn(300, 12).to(dtype)
    indices = torch.randint(-1, 50, (300, 12), dtype=torch.int32)
    assert torch.equal(ops.gate_take(x, indices), reference.gate_take(x, indices))
    # A few addends of size 3 at most meet in one place, and each addition may round.
    put, expected = ops.gate_put(y, indices, 50).double(), reference.gate_put(y.double(), indices, 50)
    torch.testing.assert_close(put, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    if ops.UNAVAILABLE is None:
        for bad in (-2, 50):
            indices[3, 4] = bad
            with pytest.raises(ValueError, match="indices: expected -1 to 49"):
                ops.gate_take(x, indices)
            with pytest.raises(ValueError, match="indices: expected -1 to 49"):
                ops.gate_put(y, indices, 50)


@needs_kernels
def test_combines_check_everything_before_writing() -> None:
    out = [torch.zeros(3), torch.zeros(4)]
    with pytest.raises(ValueError, match="out and b: expected the same size"):
        ops.axpy_diff(out, [torch.ones(3), torch.ones(4)], [torch.zeros(3), torch.zeros(5)], scalar(1.0))
    with pytest.raises(ValueError, match="scale: expected a float64 scalar"):
        ops.axpy_diff(out, out, out, torch.ones(2, dtype=torch.float64))
    assert not out[0].any()


@pytest.mark.filterwarnings("error::fastfisher.SlowPathWarning")
@needs_kernels
def test_tensors_that_lie_otherwise_in_memory_take_the_fast_path() -> None:
    a, b = (torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    out = a.clone() + 1
    cases = [(out, a, b), (out, a.contiguous(), b), (out.contiguous(), a, b), (out[0, 0].t(), a[0, 0].t(), b[0, 0].t())]
    for target, x, y in cases:
        found, expected = target.clone(), target.clone()
        sizes = [m.axpy_diff([t], [x], [y], scalar(0.3)) for m, t in ((ops, found), (reference, expected))]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*sizes)
        torch.testing.assert_close(ops.sum_squares([x]), reference.sum_squares([x]))
        z, zero = (torch.empty(x.shape) for _ in range(2))
        for m, t in ((ops, z), (reference, zero)):
            m.perturb([t], [x], KEY, 0.3, "rademacher")
        torch.testing.assert_close(z, zero)


@needs_kernels
def test_targets_with_gaps_are_written_by_the_reference_which_says_so() -> None:
    x, out = torch.randn(4, 3), torch.zeros(4, 6)[:, ::2]
    with pytest.warns(
        fastfisher.SlowPathWarning, match="axpy_diff runs its PyTorch reference: a tensor of out has gaps"
    ):
        ops.axpy_diff([out], [x], [torch.zeros_like(x)], scalar(2.0))
    torch.testing.assert_close(out, 2 * x)
    with pytest.warns(fastfisher.SlowPathWarning, match="perturb runs its PyTorch reference: a tensor of out is not"):
        ops.perturb([out], [x], KEY, 0.0, "gaussian")
    torch.testing.assert_close(out, x)


def test_sums_have_the_same_bits_for_any_number_of_threads() -> None:
    x = [torch.randn(3 * 2**16 + 11), torch.randn(7)]
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums.append(float(ops.sum_squares(x)))
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1


@needs_kernels
def test_one_compilation_for_many_keys() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    function = torch.compile(lambda x, key: torch.ops.fastfisher.sample_cross_entropy(x, key, 1.0)[1], backend=counter)
    for seed in range(5):
        function(torch.randn(4, 6), torch.tensor([seed, 0]))
    assert counter.frame_count == 1


# ---- squared norms of per-example gradients, and Rademacher cotangents ----------------------------------------------

# channels, outputs, input size, kernel, stride, padding, dilation, groups
CONVOLUTIONS = [
    (3, 5, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 33, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (17, 16, (5, 6), (1, 1), (2, 1), (0, 0), (1, 1), 1),
    (4, 6, (9, 10), (2, 3), (2, 3), (1, 2), (2, 1), 2),
    (8, 8, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 8),
    (5, 40, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 3, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (3, 4, (20,), (5,), (3,), (2,), (2,), 1),
    (2, 3, (4, 5, 6), (3, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 2), 1),
    (1, 1, (40, 41), (7, 7), (1, 1), (3, 3), (1, 1), 1),
]


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_norms_of_convolution_gradients(shape: tuple, dtype: torch.dtype, gram: bool) -> None:
    channels, outputs, size, *rest, groups = shape
    kernel, stride, padding, dilation = (list(x) for x in rest)
    torch.manual_seed(4)
    a = torch.randn(4, channels, *size, dtype=torch.float64).to(dtype)
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - m * (k - 1) - 1) // s + 1 for n, k, s, p, m in spans]
    d = torch.randn(4, outputs, *out, dtype=torch.float64).to(dtype)
    args = (kernel, stride, padding, dilation, groups, gram)
    found = ops.grad_sqnorm_conv(a, d, *args)
    exact = reference.grad_sqnorm_conv(a.double(), d.double(), *args)
    low = torch.float64 if dtype == torch.float64 else torch.float32  # what is computed in
    pytorch = reference.grad_sqnorm_conv(a.to(low), d.to(low), *args)
    for mine, theirs, truth, bound in zip(found, pytorch, exact, rounding(a, d, args), strict=True):
        assert mine.dtype == torch.float64
        allowed = 2 * (theirs / truth - 1).abs() + torch.finfo(low).eps * (bound + (GRAM_LOSS if gram else 0))
        assert bool(((mine / truth - 1).abs() <= allowed).all())


GRAM_LOSS = 64.0
"""How many rounding errors the Gram form may show: a few, times the 16 of cancellation that the kernel lets pass."""


def rounding(a: Tensor, d: Tensor, args: tuple) -> list[Tensor]:
    """By how much an error in each product of a gradient's sums is amplified in its squared norm, twice over.

    Σ |g| Σ_t |a_t d_t| / ‖g‖²: rounding errors of sums over T positions grow like √T at random.
    """
    kernel, stride, padding, dilation, groups, _ = args
    weight = torch.empty(d.shape[1], a.shape[1] // groups, *kernel, dtype=torch.float64)
    bounds = []
    for slot in (1, 2):
        each = []
        for x, y in zip(a.double(), d.double(), strict=True):
            g, magnitude = (
                torch.ops.aten.convolution_backward(
                    y[None], x[None], weight, [d.shape[1]], stride, padding, dilation, False, [0] * len(kernel), groups,
                    [False, True, True],
                )[slot]
                for x, y in ((x, y), (x.abs(), y.abs()))
            )  # fmt: skip
            each.append((g.abs() * magnitude).sum() / g.square().sum())
        bounds.append(2 * d[0, 0].numel() ** 0.5 * torch.stack(each) + 2)
    return bounds


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 5, 3), (2, 1, 1), (7, 33, 17), (40, 16, 32), (130, 3, 50), (3, 200, 12)], ids=str
)
def test_norms_of_linear_gradients(shape: tuple[int, int, int], dtype: torch.dtype, gram: bool) -> None:
    positions, inputs, outputs = shape
    torch.manual_seed(5)
    a, d = (torch.randn(6, positions, n, dtype=torch.float64).to(dtype) for n in (inputs, outputs))
    low = torch.float64 if dtype == torch.float64 else torch.float32
    truth = reference.grad_sqnorm_linear(a, d, gram)
    pytorch = torch.bmm(d.to(low).mT, a.to(low)).double().square().sum((1, 2))
    g, magnitude = (torch.bmm(y.double().mT, x.double()) for x, y in ((a, d), (a.abs(), d.abs())))
    amplified = 2 * positions**0.5 * (g.abs() * magnitude).sum((1, 2)) / truth + 2
    allowed = 2 * (pytorch / truth - 1).abs() + torch.finfo(low).eps * (amplified + (GRAM_LOSS if gram else 0))
    assert bool(((ops.grad_sqnorm_linear(a, d, gram) / truth - 1).abs() <= allowed).all())


@needs_kernels
def test_the_gram_form_notices_that_it_cancels() -> None:
    torch.manual_seed(0)
    a, d = torch.randn(1, 2, 30), torch.randn(1, 2, 20)
    a[:, 1], d[:, 1] = a[:, 0], -d[:, 0] * (1 + 1e-3)  # the two positions all but cancel
    truth = reference.grad_sqnorm_linear(a, d, True)
    assert float((ops.grad_sqnorm_linear(a, d, True) / truth - 1).abs()) < 1e-3
    products = (torch.bmm(a, a.mT) * torch.bmm(d, d.mT)).sum()  # what it would have given
    assert float((products / truth - 1).abs()) > 1e-2
    x, y = a.mT.reshape(1, 30, 1, 2), d.mT.reshape(1, 20, 1, 2)
    (found, _) = ops.grad_sqnorm_conv(x, y, [1, 1], [1, 1], [0, 0], [1, 1], 1, True)
    assert float((found / truth - 1).abs()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 64, 100])
def test_channel_products_agree_with_the_reference(width: int, dtype: torch.dtype) -> None:
    a, d = (torch.randn(3, 5, width, dtype=torch.float64).to(dtype) for _ in range(2))
    center = torch.randn(5).to(dtype)
    low = torch.float64 if dtype == torch.float64 else torch.float32
    for mine, truth in zip(ops.channel_products(a, d, center), reference.channel_products(a, d, center), strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=width * 8 * torch.finfo(low).eps)


@needs_kernels
def test_norms_name_bad_arguments() -> None:
    a, d, two = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5), [1, 1]
    with pytest.raises(ValueError, match="does not fit"):
        ops.grad_sqnorm_conv(a, d, [3, 3], two, [0, 0], two, 1, False)
    with pytest.raises(ValueError, match="groups: expected a divisor"):
        ops.grad_sqnorm_conv(a, d, [3, 3], two, two, two, 3, False)
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        ops.grad_sqnorm_conv(a[0], d, [3, 3], two, two, two, 1, False)
    with pytest.raises(ValueError, match="same examples"):
        ops.grad_sqnorm_conv(a[:1], d, [3, 3], two, two, two, 1, False)
    with pytest.raises(ValueError, match="expected the same examples, positions"):
        ops.grad_sqnorm_linear(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), False)
    with pytest.raises(ValueError, match="center: expected 4 numbers"):
        ops.channel_products(a.flatten(2), a.flatten(2), torch.zeros(3))


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
    loss = cross_entropy(logits, Signs(reference.rademacher_signs(7, 200, KEY)))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, ops.rademacher_cotangent(logits.detach(), KEY, 1 / 7))


@pytest.mark.parametrize("classes", [10, 3000])
def test_rademacher_names_a_row_without_a_softmax(classes: int) -> None:
    logits = torch.randn(50, classes)
    logits[17, 3] = float("nan")
    for implementation in (ops, reference):
        with pytest.raises(ValueError, match="logits: row 17 has no softmax"):
            implementation.rademacher_cotangent(logits, KEY, 1.0)


def test_norms_and_cotangents_have_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    a, d, logits = torch.randn(9, 8, 8, 8), torch.randn(9, 40, 8, 8), torch.randn(500, 300)
    args = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([
                *ops.grad_sqnorm_conv(a, d, *args, True),
                *ops.grad_sqnorm_conv(a, d, *args, False),
                ops.grad_sqnorm_linear(a.flatten(2), d.flatten(2)[:, :8], True),
                *ops.channel_products(a.flatten(2), a.flatten(2), a[0, :, 0, 0]),
                ops.rademacher_cotangent(logits, KEY, 1.0),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_simd_level_has_the_same_norms(level: str) -> None:
    program = (
        "import torch; from fastfisher import ops; from fastfisher.ops import reference; torch.manual_seed(0)\n"
        "for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):\n"
        "    a, d = torch.randn(3, 7, 9, 8, dtype=dtype), torch.randn(3, 37, 9, 8, dtype=dtype)\n"
        "    args = ([3, 3], [1, 1], [1, 1], [1, 1], 1)\n"
        "    for gram in (False, True):\n"
        "        found, expected = (m.grad_sqnorm_conv(a, d, *args, gram) for m in (ops, reference))\n"
        "        for x, y in zip(found, expected):\n"
        "            torch.testing.assert_close(x, y, rtol=rtol, atol=0)\n"
        "    x, key = torch.randn(4, 1500, dtype=dtype), torch.tensor([1, 2])\n"
        "    found, expected = (m.rademacher_cotangent(x, key, 1.0) for m in (ops, reference))\n"
        "    torch.testing.assert_close(found, expected)\n"
    )
    environment = {**os.environ, "FASTFISHER_SIMD_LEVEL": level}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


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
