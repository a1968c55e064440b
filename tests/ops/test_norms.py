"""The squared norms of per-example gradients, and the products of channels, against reference.py."""

from __future__ import annotations

import pytest
import torch

from fastfisher import ops
from fastfisher.ops import reference
from tests.support.operators import (
    CONVOLUTIONS,
    DTYPES,
    GRAM_LOSS,
    needs_kernels,
    rounding,
)


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
