"""Batch normalisation by our own kernels against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch

from fastfisher import ops
from fastfisher.ops import reference
from tests.support.operators import (
    needs_kernels,
)

# Planes of one element, of less than a vector, of one more than four vectors, and of several blocks of four.
SHAPES = [(7, 3), (5, 3, 1), (4, 2, 5), (3, 4, 8, 8), (2, 3, 5, 13), (3, 2, 4, 5, 9), (2, 1, 33, 31)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_err_no_more_than_twice_as_much_as_pytorch(
    shape: tuple[int, ...], gated: bool, affine: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, grad = ((torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype) for _ in range(2))
    x3, grad3 = x.view(*shape[:2], -1), grad.view(*shape[:2], -1)
    weight, bias = (torch.randn(shape[1]).to(dtype) if affine else None for _ in range(2))
    exact = reference.batch_norm(x3.double(), None if weight is None else weight.double(), bias, 1e-5)
    found = ops.batch_norm(x3, weight, bias, 1e-5)
    theirs, *statistics = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    theirs = theirs.view_as(x3)
    unit = torch.finfo(dtype).eps * float(exact[0].abs().max())
    assert float((found[0] - exact[0]).abs().max()) <= 2 * float((theirs - exact[0]).abs().max()) + unit
    torch.testing.assert_close(found[1], exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], exact[2], rtol=1e-5, atol=1e-12)

    bits = ops.gate_relu(torch.randn(x3.shape))[1] if gated else None
    arguments = (grad3.double(), bits, x3.double(), None if weight is None else weight.double(), *exact[1:], 1e-5)
    gradients = ops.batch_norm_backward(grad3, bits, x3, weight, *found[1:], 1e-5)
    backward = torch.ops.aten.native_batch_norm_backward
    grad = grad if bits is None else ops.gate_apply(grad, bits)
    theirs = backward(grad, x, weight, None, None, *statistics, True, 1e-5, [True] * 3)
    # Ours and PyTorch's sums run in float64, whose rounding is a part of the sum of the absolute values.
    normalised = reference.batch_norm(x3.double(), None, None, 1e-5)[0]
    size = float((grad3.double() * normalised).abs().sum((0, 2)).max()) if dtype == torch.float64 else 0.0
    for ours, other, wanted in zip(gradients, theirs, reference.batch_norm_backward(*arguments), strict=True):
        unit = torch.finfo(dtype).eps * max(float(wanted.abs().max()), size if wanted.dim() == 1 else 0.0)
        error = float((other.view_as(wanted) - wanted).abs().max()) if other is not None else 0.0
        assert float((ours - wanted).abs().max()) <= 2 * error + 4 * unit


@needs_kernels
def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(3, 4, 5), torch.randn(4)
    _, mean, variance = ops.batch_norm(x, weight, None, 1e-5)
    with pytest.raises(ValueError, match="weight: expected one contiguous value per channel"):
        ops.batch_norm(x, torch.randn(5), None, 1e-5)
    with pytest.raises(ValueError, match="grad and x: expected the same size"):
        ops.batch_norm_backward(x[:2], None, x, weight, mean, variance, 1e-5)
    with pytest.raises(ValueError, match="bits: expected a contiguous int32 tensor of 2 words"):
        ops.batch_norm_backward(x, torch.zeros(3, dtype=torch.int32), x, weight, mean, variance, 1e-5)
