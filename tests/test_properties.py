"""Every operator against its reference in float64, over random shapes, dtypes, strides, class counts and options.

The gate is the package's: an operator errs at most twice as much as PyTorch does in the same dtype (plus a unit in the
last place, where PyTorch happens to hit), and what is no rounding, such as labels, masks, signs and indices, is equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.ops import reference
from tests.support.operators import (
    DTYPES,
    GRAM_LOSS,
    NORMAL_ERROR,
    assert_binary_errs_at_most_twice_what_pytorch_errs,
    assert_binary_labels_are_those_of_the_definition,
    assert_errs_at_most_twice_what_pytorch_errs,
    assert_labels_are_the_exact_inverse_cdf,
    assert_same_bits,
    needs_kernels,
    precise,
    rounding,
    scalar,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("one_thread")]

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)
keys = st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)).map(torch.tensor)
scales = st.floats(1e-3, 10.0) | st.floats(-10.0, -1e-3)
# Small numbers are where vectors break; the others reach several vectors and tiles.
classes = st.integers(1, 40) | st.sampled_from([64, 127, 128, 129, 1000, 1023, 1024, 1025, 2048, 2049])
few, some = st.integers(1, 4), st.integers(1, 70)
LAYOUTS = ("contiguous", "every second column", "transposed", "offset by one", "expanded")


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "every second column":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if layout == "offset by one":  # no longer aligned to a vector
        return torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


layouts = st.sampled_from(LAYOUTS)


def low(dtype: torch.dtype) -> torch.dtype:
    """What is computed in where tensors have this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_no_worse(found: Tensor, pytorch: Tensor, exact: Tensor, unit: float = 1.0) -> None:
    """At most twice PyTorch's error, and ``unit`` of the last places of the largest value."""
    if exact.numel():
        allowed = 2 * (pytorch.double() - exact).abs().max() + unit * torch.finfo(found.dtype).eps * exact.abs().max()
        assert float((found.double() - exact).abs().max()) <= float(allowed)


@given(st.integers(16, 70), classes, dtypes, layouts, keys, scales, seeds, st.floats(0.01, 20.0), st.integers(0, 15))
def test_sample_cross_entropy(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    layout: str,
    key: Tensor,
    scale: float,
    seed: int,
    size: float,
    first: int,
) -> None:
    logits = laid_out(
        normal((rows, columns), dtype, seed, size), layout
    )  # many rows: errors are compared at their worst
    nll, labels, dlogits = found = ops.sample_cross_entropy(logits, key, scale)
    assert nll.shape == labels.shape == (rows,) and dlogits.shape == logits.shape and dlogits.is_contiguous()
    assert int(labels.min()) >= 0 and int(labels.max()) < columns
    if layout == "expanded":  # one row, again and again: of that alone PyTorch may happen not to err at all
        dense = ops.sample_cross_entropy(logits.contiguous(), key, scale)
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    else:
        assert_errs_at_most_twice_what_pytorch_errs(logits, nll, labels, dlogits, scale)
    for part, whole in zip(ops.sample_cross_entropy(logits[:first], key, scale), found, strict=True):
        assert torch.equal(part, whole[:first])


@given(st.integers(20, 60), classes, dtypes, keys, seeds, st.floats(0.01, 20.0), st.floats(0.0, 0.9))
def test_labels_of_sample_cross_entropy(
    rows: int, columns: int, dtype: torch.dtype, key: Tensor, seed: int, size: float, masked: float
) -> None:
    logits = normal((rows, columns), dtype, seed, size)
    hidden = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < masked
    hidden[:, seed % columns] = False
    logits[hidden] = -float("inf")
    labels = ops.sample_cross_entropy(logits, key, 1.0)[1]
    assert not bool(hidden[torch.arange(rows), labels].any())
    assert_labels_are_the_exact_inverse_cdf(logits, labels, key)


@given(
    st.lists(st.integers(1, 9), max_size=3), dtypes, layouts, keys, scales, seeds, st.floats(0.01, 20.0),
    st.integers(0, 2**40), st.integers(0, 200),
)  # fmt: skip
def test_sample_binary_cross_entropy(
    shape: list[int],
    dtype: torch.dtype,
    layout: str,
    key: Tensor,
    scale: float,
    seed: int,
    size: float,
    first: int,
    part: int,
) -> None:
    logits = laid_out(normal((40, *shape), dtype, seed, size), layout)  # errors are compared at their worst
    found = ops.sample_binary_cross_entropy(logits, key, scale, first)
    assert all(x.shape == logits.shape and x.is_contiguous() for x in found)
    if layout == "expanded":  # of few values alone PyTorch may happen not to err at all
        dense = ops.sample_binary_cross_entropy(logits.contiguous(), key, scale, first)
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    else:
        assert_binary_errs_at_most_twice_what_pytorch_errs(logits, *found, scale)
    assert_binary_labels_are_those_of_the_definition(logits, found[1], key, first)
    rest = ops.sample_binary_cross_entropy(logits.flatten()[part:], key, scale, first + part)
    assert all(torch.equal(a, b.flatten()[part:]) for a, b in zip(rest, found, strict=True))


@given(few | some, classes, dtypes, layouts, scales, seeds)
def test_softmax_hessian_product(
    rows: int, columns: int, dtype: torch.dtype, layout: str, scale: float, seed: int
) -> None:
    p = normal((rows, columns), torch.float64, seed, 2.0).softmax(1)
    labels = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(seed))
    d = laid_out(((p - F.one_hot(labels, columns)) * scale).to(dtype), "contiguous")
    v = laid_out(normal((rows, columns), dtype, seed + 1), layout)
    exact = reference.softmax_hessian_product(d.double(), labels, v.double(), scale)
    found = ops.softmax_hessian_product(d, labels, v, scale)
    pytorch = reference.softmax_hessian_product(d, labels, v, scale)
    # p is had back from d by a division and an addition of 1: each rounds, and v may amplify.
    rounded = torch.finfo(low(dtype)).eps * abs(scale) * float(v.double().abs().max()) * 4
    allowed = 2 * (pytorch.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max() + rounded
    assert float((found.double() - exact).abs().max()) <= float(allowed)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), dtypes, seeds, st.booleans())
def test_gate_relu_and_gate_apply(shape: list[int], dtype: torch.dtype, seed: int, special: bool) -> None:
    x, y = normal(tuple(shape), dtype, seed), normal(tuple(shape), dtype, seed + 1)
    if special and x.numel():
        values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")], dtype=dtype)
        x.view(-1)[::2] = values[torch.arange(len(x.view(-1)[::2])) % 5]
    out, bits = ops.gate_relu(x)
    expected, expected_bits = reference.gate_relu(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits, expected_bits)
    inplace = x.clone()
    assert torch.equal(ops.gate_relu_(inplace), bits)
    torch.testing.assert_close(inplace, out, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ops.gate_apply(y, bits), reference.gate_apply(y, bits))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), dtypes, seeds, st.booleans(), st.floats(-2, 2))
def test_leaky_gates(shape: list[int], dtype: torch.dtype, seed: int, special: bool, slope: float) -> None:
    x, y = normal(tuple(shape), dtype, seed), normal(tuple(shape), dtype, seed + 1)
    if special and x.numel():
        values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")], dtype=dtype)
        x.view(-1)[::2] = values[torch.arange(len(x.view(-1)[::2])) % 5]
    out, bits = ops.gate_relu(x, slope)
    assert_same_bits(out, F.leaky_relu(x, slope))
    assert torch.equal(bits, reference.gate_relu(x, slope)[1])
    inplace = x.clone()
    assert torch.equal(ops.gate_relu_(inplace, slope), bits)
    assert_same_bits(inplace, out)
    assert_same_bits(ops.gate_apply(y, bits, slope), torch.ops.aten.leaky_relu_backward(y, x, slope, False))


@given(
    few, st.integers(1, 40), st.integers(1, 70), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5),
    st.integers(1, 5), st.booleans(), dtypes, seeds,
)  # fmt: skip
def test_gate_max_pool_take_and_put(
    planes: int, height: int, width: int, rows: int, columns: int, down: int, right: int, gated: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    assume(height >= rows and width >= columns)
    x = (2 * normal((planes, height, width), torch.float64, seed)).round().to(dtype)  # with ties
    x = x.relu() if gated else x
    values, indices = ops.gate_max_pool(x, rows, columns, down, right, gated)
    expected_values, expected_indices = reference.gate_max_pool(x, rows, columns, down, right, gated)
    assert torch.equal(values, expected_values) and torch.equal(indices, expected_indices)
    flat = normal((planes, height * width), dtype, seed + 1)
    assert torch.equal(ops.gate_take(flat, indices), reference.gate_take(flat, indices))
    y = normal(values.shape, dtype, seed + 2)
    found = ops.gate_put(y, indices, height * width)
    exact = reference.gate_put(y.double(), indices, height * width)
    sizes = reference.gate_put(y.double().abs(), indices, height * width)  # at most 25 addends round
    assert bool(((found.double() - exact).abs() <= 25 * torch.finfo(dtype).eps * sizes).all())


tensor_lists = st.lists(st.lists(st.integers(0, 50), max_size=3).map(tuple), min_size=1, max_size=5)


@given(tensor_lists, dtypes, layouts, seeds, st.floats(-3, 3))
def test_axpy_diff_and_sum_squares(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, layout: str, seed: int, scale: float
) -> None:
    out, a, b = ([normal(shape, dtype, seed + 10 * k + i) for i, shape in enumerate(shapes)] for k in range(3))
    a = [laid_out(x, layout) if x.numel() and layout != "expanded" else x for x in a]
    found = [x.clone() for x in out]
    size = ops.axpy_diff(found, a, b, scalar(scale))
    pytorch = [x.clone() for x in out]
    reference.axpy_diff(pytorch, a, b, scalar(scale))
    for tensors in zip(found, pytorch, out, a, b, strict=True):
        if tensors[0].numel() == 0:
            continue
        mine, theirs, *given = (x.double().numpy().astype(np.longdouble) for x in tensors)
        truth = given[0] + np.longdouble(scale) * (given[1] - given[2])  # float64 alone would be its own judge
        allowed = 2 * np.abs(theirs - truth).max() + torch.finfo(dtype).eps * np.abs(truth).max()
        assert np.abs(mine - truth).max() <= allowed
    differences = [(x.to(low(dtype)) - y.to(low(dtype))).double() for x, y in zip(a, b, strict=True)]
    truth = reference.sum_squares(differences) if scale != 0 else scalar(0.0)
    torch.testing.assert_close(size, truth, rtol=4 * torch.finfo(low(dtype)).eps, atol=0)
    torch.testing.assert_close(ops.sum_squares(a), reference.sum_squares(a), rtol=1e-12, atol=0)


@given(few, st.integers(1, 20), st.integers(1, 70), st.booleans(), st.booleans(), dtypes, seeds, st.floats(-3, 3))
def test_batch_norm(
    examples: int, channels: int, size: int, affine: bool, gated: bool, dtype: torch.dtype, seed: int, shift: float
) -> None:
    assume(examples * size > 1)
    x = (normal((examples, channels, size), torch.float64, seed) + shift).to(dtype)
    grad = normal((examples, channels, size), dtype, seed + 1)
    weight, bias = (normal((channels,), dtype, seed + 2 + i) if affine else None for i in range(2))
    wide = [None if t is None else t.double() for t in (weight, bias)]
    exact = reference.batch_norm(x.double(), *wide, 1e-5)
    found = ops.batch_norm(x, weight, bias, 1e-5)
    theirs, *statistics = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    assert_no_worse(found[0], theirs, exact[0])
    assert_no_worse(found[1], found[1], exact[1], unit=examples * size)
    torch.testing.assert_close(found[2], exact[2], rtol=1e-5, atol=1e-12)
    bits = ops.gate_relu(normal((examples, channels, size), dtype, seed + 4))[1] if gated else None
    gradients = ops.batch_norm_backward(grad, bits, x, weight, *found[1:], 1e-5)
    truths = reference.batch_norm_backward(grad.double(), bits, x.double(), wide[0], *exact[1:], 1e-5)
    through = grad if bits is None else ops.gate_apply(grad, bits)
    backward = torch.ops.aten.native_batch_norm_backward
    pytorch = backward(through, x, weight, None, None, *statistics, True, 1e-5, [True] * 3)
    # Where the gradient all but cancels, what is lost are units of its addends.
    normalised = reference.batch_norm(x.double(), None, None, 1e-5)[0]
    inverse = (exact[2] + 1e-5).rsqrt() * (1.0 if wide[0] is None else wide[0].abs())
    addends = float(through.double().abs().max() * (1 + normalised.abs().max()) * inverse.max())
    sums = float((through.double() * normalised).abs().sum((0, 2)).max() + through.double().abs().sum((0, 2)).max())
    for mine, other, truth in zip(gradients, pytorch, truths, strict=True):
        error = float((other.double() - truth).abs().max()) if other is not None else 0.0
        whole = addends if truth.dim() == 3 else sums
        allowed = (
            2 * error + torch.finfo(dtype).eps * (float(truth.abs().max())) + 8 * torch.finfo(low(dtype)).eps * whole
        )
        assert float((mine.double() - truth).abs().max()) <= allowed


@given(few | some, classes, dtypes, layouts, keys, scales, seeds)
def test_rademacher_cotangent(
    rows: int, columns: int, dtype: torch.dtype, layout: str, key: Tensor, scale: float, seed: int
) -> None:
    logits = laid_out(normal((rows, columns), dtype, seed, 3.0), layout)
    p = np.exp(precise(logits) - precise(logits).max(1, keepdims=True))  # in more digits than float64 has
    p /= p.sum(1, keepdims=True)
    root = np.sqrt(p) * reference.rademacher_signs(rows, columns, key).numpy()
    exact = (root - p * root.sum(1, keepdims=True)) * np.longdouble(scale)
    mine, theirs = (
        np.abs(precise(cotangent) - exact).max()
        for cotangent in (
            ops.rademacher_cotangent(logits, key, scale),
            reference.rademacher_cotangent(logits, key, scale),
        )
    )
    rounded = 4 * torch.finfo(low(dtype)).eps * abs(scale)
    assert mine <= 2 * theirs + torch.finfo(dtype).eps * np.abs(exact).max() + rounded


@given(few, st.integers(1, 40), some, some, st.booleans(), dtypes, layouts, seeds)
def test_grad_sqnorm_linear(
    examples: int, positions: int, inputs: int, outputs: int, gram: bool, dtype: torch.dtype, layout: str, seed: int
) -> None:
    a = laid_out(normal((examples, positions, inputs), dtype, seed), layout)
    d = laid_out(normal((examples, positions, outputs), dtype, seed + 1), layout)
    truth = reference.grad_sqnorm_linear(a, d, gram)
    pytorch = torch.bmm(d.to(low(dtype)).mT, a.to(low(dtype))).double().square().sum((1, 2))
    g, size = (torch.bmm(y.double().mT, x.double()) for x, y in ((a, d), (a.abs(), d.abs())))
    amplified = 2 * positions**0.5 * (g.abs() * size).sum((1, 2)) / truth + 2
    allowed = 2 * (pytorch / truth - 1).abs() + torch.finfo(low(dtype)).eps * (amplified + (GRAM_LOSS if gram else 0))
    assert bool(((ops.grad_sqnorm_linear(a, d, gram) / truth - 1).abs() <= allowed).all())


@st.composite
def convolutions(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], list[list[int]], int]:
    """Shapes of input and output gradient; kernel, stride, padding and dilation; groups."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 20))
    numbers = [
        draw(st.lists(st.integers(lo, hi), min_size=dims, max_size=dims)) for lo, hi in ((1, 3), (1, 3), (0, 2), (1, 2))
    ]
    kernel, stride, padding, dilation = numbers
    size = [draw(st.integers(1, 8)) for _ in range(dims)]
    out = [(n + 2 * p - m * (k - 1) - 1) // s + 1 for n, k, s, p, m in zip(size, *numbers, strict=True)]
    assume(all(n >= 1 for n in out))
    examples = draw(st.integers(1, 3))
    return (examples, channels, *size), (examples, outputs, *out), [kernel, stride, padding, dilation], groups


@given(convolutions(), st.booleans(), dtypes, seeds)
def test_grad_sqnorm_conv(shapes: Any, gram: bool, dtype: torch.dtype, seed: int) -> None:
    in_shape, out_shape, numbers, groups = shapes
    a, d = normal(in_shape, dtype, seed), normal(out_shape, dtype, seed + 1)
    args = (*numbers, groups, gram)
    exact = reference.grad_sqnorm_conv(a.double(), d.double(), *args)
    assume(bool(all((x > 0).all() for x in exact)))  # a kernel may see nothing but padding
    pytorch = reference.grad_sqnorm_conv(a.to(low(dtype)), d.to(low(dtype)), *args)
    found = ops.grad_sqnorm_conv(a, d, *args)
    for mine, theirs, truth, bound in zip(found, pytorch, exact, rounding(a, d, args), strict=True):
        allowed = 2 * (theirs / truth - 1).abs() + torch.finfo(low(dtype)).eps * (bound + (GRAM_LOSS if gram else 0))
        assert bool(((mine / truth - 1).abs() <= allowed).all())


@given(few, st.integers(1, 20), st.integers(1, 140), dtypes, layouts, seeds)
def test_channel_products(examples: int, channels: int, width: int, dtype: torch.dtype, layout: str, seed: int) -> None:
    a = laid_out(normal((examples, channels, width), dtype, seed), layout)
    d, center = normal((examples, channels, width), dtype, seed + 1), normal((channels,), dtype, seed + 2)
    truths = reference.channel_products(a, d, center)
    sizes = ((a.double() - center.double()[:, None]).abs() * d.double().abs()).sum(2), d.double().abs().sum(2)
    for mine, truth, size in zip(ops.channel_products(a, d, center), truths, sizes, strict=True):
        # A term rounds twice, and a sum of n terms grows its error like their number at worst.
        assert bool(((mine - truth).abs() <= (width + 2) * torch.finfo(low(dtype)).eps * size).all())


@given(tensor_lists, dtypes, st.sampled_from(["gaussian", "rademacher"]), keys, st.integers(0, 2**40), seeds)
def test_probe_dot_and_perturb(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, distribution: str, key: Tensor, first: int, seed: int
) -> None:
    tensors = [normal(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    exact = reference.probe_dot(tensors, key, distribution, first)
    found = ops.probe_dot(tensors, key, distribution, first)
    size = float(ops.sum_squares(tensors).sqrt())
    error = NORMAL_ERROR * 7 * size if distribution == "gaussian" else 1e-12 * size
    assert abs(float(found - exact)) <= error
    for given_tensors in (tensors, []):
        mine, truth = [torch.empty_like(x) for x in tensors], [x.double() for x in tensors]
        ops.perturb(mine, given_tensors, key, 0.3, distribution, first)
        reference.perturb(truth, [x.double() for x in given_tensors], key, 0.3, distribution, first)
        for a, b in zip(mine, truth, strict=True):
            unit = torch.finfo(dtype).eps if distribution == "rademacher" else max(torch.finfo(dtype).eps, NORMAL_ERROR)
            torch.testing.assert_close(a.double(), b, rtol=unit, atol=0.3 * 7 * NORMAL_ERROR)
    count = sum(x.numel() for x in tensors)  # what a probe is does not depend on how it is cut
    whole, pieces = torch.empty(count), [torch.empty(x.numel()) for x in tensors]
    ops.perturb([whole], [], key, 1.0, distribution, first)
    ops.perturb(pieces, [], key, 1.0, distribution, first)
    assert torch.equal(torch.cat(pieces), whole)
