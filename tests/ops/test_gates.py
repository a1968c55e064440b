"""ReLU and max-pool with their gates against reference.py: values, gates, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.ops import reference
from tests.support.operators import (
    DTYPES,
    assert_same_bits,
    needs_kernels,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000, 2**16 + 5])
def test_relu_gates_agree_with_the_reference(numel: int, dtype: torch.dtype) -> None:
    a, b = (torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(2))
    a[::7], a[1::7] = 0, math.nan
    (relu, bits), (expected_relu, expected_bits) = ops.gate_relu(a), reference.gate_relu(a)
    assert torch.equal(bits, expected_bits)
    torch.testing.assert_close(relu, expected_relu, rtol=0, atol=0, equal_nan=True)
    inplace = a.clone()
    assert torch.equal(ops.gate_relu_(inplace), bits)
    torch.testing.assert_close(inplace, relu, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ops.gate_apply(b, bits), reference.gate_apply(b, bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.01, 0.2, 1 / 3, 0.0, 1.0, -0.5, math.inf])
@pytest.mark.parametrize("numel", [0, 31, 33, 2**16 + 5])
def test_leaky_relu_and_its_backward_are_those_of_pytorch(numel: int, slope: float, dtype: torch.dtype) -> None:
    """To the last bit, the sign of 0 and NaN included: a slope of 0 is no ReLU there."""
    a, b = (torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(2))
    for x in (a, b.flip(0)):
        for place, value in enumerate([0.0, -0.0, math.nan, math.inf, -math.inf]):
            x[place::7] = value
    leaky, bits = ops.gate_relu(a, slope)
    assert_same_bits(leaky, F.leaky_relu(a, slope))
    assert torch.equal(bits, reference.gate_relu(a, slope)[1])
    inplace = a.clone()
    assert torch.equal(ops.gate_relu_(inplace, slope), bits)
    assert_same_bits(inplace, leaky)
    applied = ops.gate_apply(b, bits, slope)
    assert_same_bits(applied, torch.ops.aten.leaky_relu_backward(b, a, slope, False))
    assert_same_bits(applied, reference.gate_apply(b, bits, slope))


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
