"""The Triton kernels of kernels/gates.py in Triton's interpreter, against reference.py.

bfloat16 is left to the GPU tests: the interpreter computes it wrongly (triton-lang/triton#11584).
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU the kernels themselves are tested (tests/test_gpu.py)", allow_module_level=True)

from fastfisher import ops
from fastfisher.kernels import gates
from fastfisher.ops import reference
from tests.support.operators import assert_same_bits

DTYPES = [torch.float32, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
# Nothing, one element, a word short of one bit, full, with one more; a program's elements and one more; several.
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1024, 1025, 5000])
def test_relu_and_its_gates(numel: int, dtype: torch.dtype) -> None:
    x, y = (torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(2))
    x[::7], x[1::7], x[2::7], x[3::7] = 0, math.nan, math.inf, -math.inf
    (relu, bits), (expected, expected_bits) = gates.gate_relu(x), reference.gate_relu(x)
    assert torch.equal(bits, expected_bits)
    torch.testing.assert_close(relu, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gates.gate_apply(y, bits), reference.gate_apply(y, bits))
    inplace = x.clone()
    assert torch.equal(gates.gate_relu_(inplace), bits)
    torch.testing.assert_close(inplace, relu, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.01, 1 / 3, 0.0, -0.5])
@pytest.mark.parametrize("numel", [0, 31, 33, 1025, 5000])
def test_leaky_relu_and_its_gates(numel: int, slope: float, dtype: torch.dtype) -> None:
    x, y = (torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(2))
    x[::7], x[1::7], x[2::7], x[3::7], x[4::7] = 0, math.nan, math.inf, -math.inf, -0.0
    y[1::9], y[2::9] = math.nan, -math.inf
    (leaky, bits), (expected, expected_bits) = gates.gate_relu(x, slope), reference.gate_relu(x, slope)
    assert torch.equal(bits, expected_bits)
    assert_same_bits(leaky, expected)
    assert_same_bits(gates.gate_apply(y, bits, slope), reference.gate_apply(y, bits, slope))
    inplace = x.clone()
    assert torch.equal(gates.gate_relu_(inplace, slope), bits)
    assert_same_bits(inplace, leaky)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((2, 2), (2, 2), (2, 2)),  # one output in each plane: a program's outputs come from many planes
        ((5, 7), (2, 2), (2, 2)),  # a row and a column that no window reaches
        ((40, 41), (2, 2), (1, 1)),  # planes of more outputs than a program has
        ((9, 8), (3, 3), (2, 2)),  # windows that overlap
        ((9, 8), (2, 3), (1, 1)),
        ((9, 8), (2, 2), (3, 4)),  # gaps between windows
        ((4, 5), (4, 5), (7, 9)),  # a window that is the plane, a stride beyond it
    ],
)
def test_max_pool(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], gated: bool, dtype: torch.dtype
) -> None:
    x = torch.randint(-3, 4, (5, *size)).to(dtype)  # with many ties
    x[1, -1, -1], x[2], x[3, 0, 0], x[3, 0, 1] = math.nan, -math.inf, math.nan, math.nan
    x = x.relu() if gated else x
    values, indices = gates.gate_max_pool(x, *window, *stride, gated)
    expected_values, expected_indices = reference.gate_max_pool(x, *window, *stride, gated)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("planes", "elements", "outputs"),
    [
        (3, 50, 12),  # fewer outputs than a warp takes at once
        (3, 2000, 100),  # planes of several blocks of zeros, a last turn that is not full
        (2, 3, 64),  # nearly all outputs meet
        (40, 1, 1),
        (2, 5, 0),  # no outputs: zeros
    ],
)
def test_take_and_put(planes: int, elements: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(planes, elements, generator=generator).to(dtype)
    y = torch.randn(planes, outputs, generator=generator).to(dtype)
    indices = torch.randint(-1, elements, (planes, outputs), dtype=torch.int32, generator=generator)
    assert torch.equal(gates.gate_take(x, indices), reference.gate_take(x, indices))
    # Both add in the order of the outputs, each sum rounded to the dtype.
    expected = ops.gate_put(y, indices, elements)
    assert torch.equal(gates.gate_put(y, indices, elements), expected)


def test_put_takes_back_an_overlapping_pool() -> None:
    x = torch.randn(6, 11, 12)
    values, indices = gates.gate_max_pool(x, 3, 3, 1, 1, False)
    x.requires_grad_()
    pooled = torch.nn.functional.max_pool2d(x, 3, 1)
    (expected,) = torch.autograd.grad(pooled, x, values.view_as(pooled))
    torch.testing.assert_close(gates.gate_put(values, indices, 132).view_as(x), expected)


def test_an_index_outside_its_plane_is_nan_or_dropped() -> None:
    x, indices = torch.ones(2, 5), torch.tensor([[0, 5], [-2, 4]], dtype=torch.int32)
    taken = gates.gate_take(x, indices)
    assert taken.isnan().tolist() == [[False, True], [True, False]]
    assert gates.gate_put(torch.ones(2, 2), indices, 5).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x: expected planes of at least 3 x 2, got 2 x 5"):
        gates.gate_max_pool(torch.ones(1, 2, 5), 3, 2, 1, 1, False)
    with pytest.raises(ValueError, match="expected >= 1"):
        gates.gate_max_pool(torch.ones(1, 2, 5), 1, 1, 0, 1, False)
    with pytest.raises(ValueError, match="planes, height, width"):
        gates.gate_max_pool(torch.ones(2, 5), 1, 1, 1, 1, False)
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        gates.gate_relu(torch.ones(4, 4)[:, ::2])
    with pytest.raises(ValueError, match="expected float32, float64, bfloat16 or float16"):
        gates.gate_relu_(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="bits: expected a contiguous int32 tensor of 2 words, got 1"):
        gates.gate_apply(torch.ones(33), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="indices: expected a contiguous int32"):
        gates.gate_take(torch.ones(2, 3), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="y and indices"):
        gates.gate_put(torch.ones(2, 3), torch.zeros(2, 4, dtype=torch.int32), 3)
