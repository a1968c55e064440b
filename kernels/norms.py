"""grad_sqnorm_linear, grad_sqnorm_conv and channel_products: per-example gradients that never exist as a whole.

An example's weight gradient is a product of two matrices, G[o, f] = Σ_t D[o, t] X[f, t]: output gradients and input
features over the positions t. For a linear layer X is the input itself. For a convolution a feature is a tap (a channel
and a place in the kernel), and X[f, t] is the pixel that tap f sees at position t: its address is the tap's offset plus
the position's, so the patches are read where they lie and nothing is unfolded. Only the padding is written around the
input beforehand: it costs a copy of the input, and saves each load six comparisons.

Direct form: a program makes one tile of one example's G in registers, and squares and sums it there. Gram form: with
‖G‖² = Σ_{t,s} (X_t·X_s) (D_t·D_s), a program makes the same block of both matrices of inner products and multiplies
them; it wins where positions are few. That sum may cancel: an example whose sum is so far below its diagonal that
rounding shows is done again by the direct form. That one is always launched, so that the host need not wait for the
answer; its programs read a flag of their example, and mostly leave at once.

Each program stores a partial sum in float64, and PyTorch adds those of an example in a fixed order: no atomics, the
same bits every time. Products of float32 are TF32's where PyTorch's are: in convolutions unless
``torch.backends.cudnn.conv.fp32_precision`` says otherwise, in linear layers where ``torch.backends.cuda.matmul`` says
so. bfloat16 and float16 are accumulated in float32. Tile sizes are not yet measured.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.checks import TYPES, check, check_dtype, compute_type
from fastfisher.kernels.compile import Configuration

CANCELLATION = 16
"""How far below its diagonal the sum of the Gram form may be: as in csrc/cpu/norms.cpp."""

_SIZES = [
    "inputs", "outputs", "positions", "groups", "kernel", "kernel1", "kernel2", "input0", "input1", "input2",
    "output1", "output2", "stride0", "stride1", "stride2", "dilation0", "dilation1", "dilation2",
]  # fmt: skip
"""A layer's sizes: arguments for whose values (1, multiples of 16) Triton would otherwise compile the kernel again."""

LAST_DIMENSION_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))
"""Along which dimension of a block neighbouring threads go where Triton sees contiguous addresses in none: the last one
from 3.7 on, and the first one before. Across features they would read pixels that lie far apart, and each thread would
divide for many positions."""


@triton.jit
def _of_feature(
    f, kernel, kernel1, kernel2, input0, input1, input2, dilation0, dilation1, dilation2, CONVOLUTION: tl.constexpr
):
    """A feature's share of the place in memory of X[f, t]: of tap f, how far it lies from the corner of a patch."""
    if CONVOLUTION:
        place = f % kernel
        i = place // (kernel1 * kernel2) * dilation0
        j = place // kernel2 % kernel1 * dilation1
        k = place % kernel2 * dilation2
        return ((f // kernel * input0 + i) * input1 + j) * input2 + k
    else:
        return f


@triton.jit
def _of_position(
    t, inputs, input1, input2, output1, output2, stride0, stride1, stride2, CONVOLUTION: tl.constexpr
):  # fmt: skip
    """A position's share of the place in memory of X[f, t]: the corner of the patch that it sees."""
    if CONVOLUTION:
        i = t // (output1 * output2) * stride0
        j = t // output2 % output1 * stride1
        k = t % output2 * stride2
        return (i * input1 + j) * input2 + k
    else:
        return t * inputs


@triton.jit
def _features(a, feature, position, real_feature, real_position):
    """A block X[f, t], 0 outside, by the shares of its features and positions; neighbouring threads read along t."""
    if LAST_DIMENSION_FIRST:
        inside = real_feature[:, None] & real_position[None, :]
        return tl.load(a + (feature[:, None] + position[None, :]), mask=inside, other=0.0)
    else:
        inside = real_feature[None, :] & real_position[:, None]
        return tl.trans(tl.load(a + (feature[None, :] + position[:, None]), mask=inside, other=0.0))


@triton.jit
def _gradients(d, t, o, outputs, positions, CONVOLUTION: tl.constexpr):
    """D[o, t] for blocks of indices that broadcast, 0 outside: of [outputs, positions] or [positions, outputs]."""
    place = o * positions + t if CONVOLUTION else t * outputs + o
    return tl.load(d + place, mask=(t < positions) & (o < outputs), other=0.0)


@triton.jit
def _operands(a, d, part, inputs, outputs, positions, kernel, input0, input1, input2, CONVOLUTION: tl.constexpr):
    """Where the input and the output gradient of a part begin: of one group of one example."""
    if CONVOLUTION:
        size = (inputs // kernel * input0).to(tl.int64) * input1 * input2
    else:
        size = inputs.to(tl.int64) * positions
    return a + part * size, d + part * (outputs.to(tl.int64) * positions)


@triton.jit(do_not_specialize=_SIZES)
def _direct(
    a, d, chosen, partial, inputs, outputs, positions, groups, kernel, kernel1, kernel2, input0, input1, input2,
    output1, output2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    CONVOLUTION: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ G² over a tile OUTPUTS x INPUTS of chosen examples; programs go by example, group, tile."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(inputs, INPUTS)
    tiles = tl.cdiv(outputs, OUTPUTS) * columns
    part, tile = program // tiles, (program % tiles).to(tl.int32)
    if tl.load(chosen + part // groups) != 0:
        a, d = _operands(a, d, part, inputs, outputs, positions, kernel, input0, input1, input2, CONVOLUTION)
        o = (tile // columns * OUTPUTS + tl.arange(0, OUTPUTS))[:, None]
        f = tile % columns * INPUTS + tl.arange(0, INPUTS)
        feature = _of_feature(
            f, kernel, kernel1, kernel2, input0, input1, input2, dilation0, dilation1, dilation2, CONVOLUTION
        )
        product = tl.zeros((OUTPUTS, INPUTS), ACCUMULATE)
        for begin in range(0, positions, POSITIONS):
            t = begin + tl.arange(0, POSITIONS)
            position = _of_position(
                t, inputs, input1, input2, output1, output2, stride0, stride1, stride2, CONVOLUTION
            )  # fmt: skip
            x = _features(a, feature, position, f < inputs, t < positions)
            y = _gradients(d, t[None, :], o, outputs, positions, CONVOLUTION)
            product = tl.dot(y, tl.trans(x), product, input_precision=PRECISION, out_dtype=ACCUMULATE)
        product = product.to(tl.float64)
        tl.store(partial + program, tl.sum(product * product))


@triton.jit(do_not_specialize=_SIZES)
def _gram(
    a, d, partial, diagonal, inputs, outputs, positions, groups, kernel, kernel1, kernel2, input0, input1, input2,
    output1, output2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    CONVOLUTION: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr,
    POSITIONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ (X_t·X_s) (D_t·D_s) over a block of pairs (t, s), and diagonal[program] those with t = s.

    Programs go by example, group and block. The matrices are symmetric: blocks right of the diagonal count twice, and
    those left of it are left out: partial and diagonal hold zeros before.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, POSITIONS)
    part, block = program // (blocks * blocks), (program % (blocks * blocks)).to(tl.int32)
    row, column = block // blocks, block % blocks
    if column >= row:
        a, d = _operands(a, d, part, inputs, outputs, positions, kernel, input0, input1, input2, CONVOLUTION)
        t = (row * POSITIONS + tl.arange(0, POSITIONS))[None, :]
        s = (column * POSITIONS + tl.arange(0, POSITIONS))[None, :]
        position = _of_position(t, inputs, input1, input2, output1, output2, stride0, stride1, stride2, CONVOLUTION)
        other_position = _of_position(
            s, inputs, input1, input2, output1, output2, stride0, stride1, stride2, CONVOLUTION
        )
        of_inputs = tl.zeros((POSITIONS, POSITIONS), ACCUMULATE)
        for begin in range(0, inputs, DEPTH):
            f = (begin + tl.arange(0, DEPTH))[:, None]
            feature = _of_feature(
                f, kernel, kernel1, kernel2, input0, input1, input2, dilation0, dilation1, dilation2, CONVOLUTION
            )
            x = tl.load(a + (feature + position), mask=(f < inputs) & (t < positions), other=0.0)
            other = tl.load(a + (feature + other_position), mask=(f < inputs) & (s < positions), other=0.0)
            of_inputs = tl.dot(tl.trans(x), other, of_inputs, input_precision=PRECISION, out_dtype=ACCUMULATE)
        of_outputs = tl.zeros((POSITIONS, POSITIONS), ACCUMULATE)
        for begin in range(0, outputs, DEPTH):
            o = (begin + tl.arange(0, DEPTH))[:, None]
            y = _gradients(d, t, o, outputs, positions, CONVOLUTION)
            other = _gradients(d, s, o, outputs, positions, CONVOLUTION)
            of_outputs = tl.dot(tl.trans(y), other, of_outputs, input_precision=PRECISION, out_dtype=ACCUMULATE)
        products = of_inputs.to(tl.float64) * of_outputs.to(tl.float64)
        total = tl.sum(products)
        tl.store(partial + program, tl.where(column > row, 2 * total, total))
        tl.store(diagonal + program, tl.sum(tl.where(tl.trans(t) == s, products, 0.0)))


@triton.jit(do_not_specialize=["rows", "channels", "size"])
def _channel_products(
    a, d, center, products, sums, rows, channels, size, COMPUTE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Per row of a and d: Σ (a - center) d and Σ d, in float64."""
    size = size // MULTIPLE * MULTIPLE  # tells the compiler how rows are aligned: it loads as wide
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    middle = tl.load(center + row % channels, mask=row < rows, other=0.0).to(COMPUTE)
    product, total = tl.zeros((ROWS, SIZE), tl.float64), tl.zeros((ROWS, SIZE), tl.float64)
    for begin in range(0, size, SIZE):
        place = begin + tl.arange(0, SIZE)
        inside = (row < rows)[:, None] & (place < size)[None, :]
        x = tl.load(a + row[:, None] * size + place[None, :], mask=inside, other=0.0).to(COMPUTE)
        y = tl.load(d + row[:, None] * size + place[None, :], mask=inside, other=0.0).to(COMPUTE)
        product += (x - middle[:, None]).to(tl.float64) * y.to(tl.float64)
        total += y.to(tl.float64)
    tl.store(products + row, tl.sum(product, 1), mask=row < rows)
    tl.store(sums + row, tl.sum(total, 1), mask=row < rows)


# ---- which configuration ---------------------------------------------------------------------------------------------


def _precision(dtype: torch.dtype, convolution: bool) -> str:
    """How float32 numbers are multiplied: as PyTorch does in such a layer. The other types have one way only."""
    backends: Any = torch.backends  # cudnn.conv is made when it is asked for, which mypy cannot see
    backend = backends.cudnn.conv if convolution else backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and backend.fp32_precision == "tf32" else "ieee"


class Tile(NamedTuple):
    """The share of a program: rows and columns of the result, how much of the sum it takes at once, its warps."""

    rows: int
    columns: int
    depth: int
    warps: int = 4


def direct_tile(dtype: torch.dtype, precision: str, inputs: int, outputs: int) -> Tile:
    """The tile of the direct form, by the features and outputs of a group.

    Without tensor cores the arithmetic is what costs, so tiles shall not be wider than the gradient; with them the
    loads are, and one tile serves all.
    """
    if dtype == torch.float64:
        return Tile(32, 32, 16)
    if dtype != torch.float32 or precision == "tf32":
        return Tile(64, 64, 32)
    return Tile(_at_least(outputs, 16, 64), _at_least(inputs, 32, 64), 16)


def gram_tile(dtype: torch.dtype, precision: str, positions: int) -> Tile:
    """The block of position pairs of the Gram form: the largest whose two results spill on no GPU."""
    if dtype == torch.float64:
        return Tile(16, 16, 16)
    if dtype != torch.float32:
        return Tile(64, 64, 16, warps=8)
    if precision == "tf32":
        return Tile(32, 32, 32)
    side = _at_least(positions, 16, 64)
    return Tile(side, side, 16, warps=8 if side == 64 else 4)


def _at_least(size: int, least: int, most: int) -> int:
    """The power of two of ``least`` … ``most`` that covers ``size``, or the largest."""
    return min(most, max(least, triton.next_power_of_2(size)))


class ChannelTile(NamedTuple):
    """Rows and elements of a row that a program of channel_products takes at once; what divides the length of a row."""

    rows: int
    size: int
    multiple: int


def channel_tile(size: int) -> ChannelTile:
    """The tile of channel_products for rows of this length."""
    rows, width = (16, 32) if size <= 32 else (4, 256)
    return ChannelTile(rows, width, 8 if size % 8 == 0 else 1)


class _Layer(NamedTuple):
    """The sizes of a layer, of one group of its channels: the kernels' arguments (see ``_SIZES``) in their order."""

    inputs: int
    outputs: int
    positions: int
    groups: int = 1
    kernel: int = 1
    kernel_sizes: tuple[int, int] = (1, 1)  # of the last two dimensions, as of the output
    input_sizes: tuple[int, int, int] = (1, 1, 1)
    output_sizes: tuple[int, int] = (1, 1)
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)

    def arguments(self) -> list[int]:
        return [
            *self[:5], *self.kernel_sizes, *self.input_sizes, *self.output_sizes, *self.stride, *self.dilation,
        ]  # fmt: skip


def _direct_norms(a: Tensor, d: Tensor, layer: _Layer, convolution: bool, chosen: Tensor) -> Tensor:
    """‖G‖² of each chosen example, and anything for the others."""
    precision = _precision(a.dtype, convolution)
    tile = direct_tile(a.dtype, precision, layer.inputs, layer.outputs)
    tiles = layer.groups * triton.cdiv(layer.outputs, tile.rows) * triton.cdiv(layer.inputs, tile.columns)
    partial = torch.empty(len(a), tiles, dtype=torch.float64, device=a.device)
    _direct[(partial.numel(),)](
        a, d, chosen, partial, *layer.arguments(), CONVOLUTION=convolution, PRECISION=precision,
        ACCUMULATE=compute_type(a.dtype), OUTPUTS=tile.rows, INPUTS=tile.columns, POSITIONS=tile.depth,
        num_warps=tile.warps,
    )  # fmt: skip
    return partial.sum(1)


def _norms(a: Tensor, d: Tensor, layer: _Layer, convolution: bool, gram: bool) -> Tensor:
    """‖G‖² of each example."""
    if not gram:
        return _direct_norms(a, d, layer, convolution, torch.ones(len(a), dtype=torch.bool, device=a.device))
    precision = _precision(a.dtype, convolution)
    tile = gram_tile(a.dtype, precision, layer.positions)
    blocks = layer.groups * triton.cdiv(layer.positions, tile.rows) ** 2
    partial, diagonal = torch.zeros(2, len(a), blocks, dtype=torch.float64, device=a.device)
    _gram[(partial.numel(),)](
        a, d, partial, diagonal, *layer.arguments(), CONVOLUTION=convolution, PRECISION=precision,
        ACCUMULATE=compute_type(a.dtype), POSITIONS=tile.rows, DEPTH=tile.depth, num_warps=tile.warps,
    )  # fmt: skip
    total = partial.sum(1)
    cancelled = total * CANCELLATION < diagonal.sum(1)
    return torch.where(cancelled, _direct_norms(a, d, layer, convolution, cancelled), total)


# ---- the operators ---------------------------------------------------------------------------------------------------


def _check(a: Tensor, d: Tensor, dimensions: int, what: str) -> None:
    check(a.dim() == d.dim() == dimensions, f"a and d: expected {dimensions} dimensions, got {a.dim()} and {d.dim()}")
    check_dtype(a, "a")
    same = a.shape[0] == d.shape[0] and a.dtype == d.dtype and a.device == d.device
    check(same, f"a and d: expected the same {what} and dtype on one device")
    largest = max(a.shape[1:].numel(), d.shape[1:].numel())
    check(largest < 2**31, f"a and d: expected fewer than 2^31 elements an example, got {largest}")


def grad_sqnorm_linear(a: Tensor, d: Tensor, gram: bool) -> Tensor:
    """See :func:`fastfisher.ops.reference.grad_sqnorm_linear`.

    Raises:
        ValueError: shapes or dtypes that do not match, or a dtype without kernels.
    """
    _check(a, d, 3, "examples, positions")
    check(a.shape[1] == d.shape[1], "a and d: expected the same examples, positions and dtype")
    if a.shape[1] <= 1:  # a single outer product
        norms = [torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64) for x in (a, d)]
        return (norms[0] * norms[1]).square()
    if 0 in (*a.shape, d.shape[2]):
        return a.new_zeros(len(a), dtype=torch.float64)
    with torch.cuda.device_of(a):
        return _norms(a.contiguous(), d.contiguous(), _Layer(a.shape[2], d.shape[2], a.shape[1]), False, gram)


def grad_sqnorm_conv(
    a: Tensor, d: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    gram: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`fastfisher.ops.reference.grad_sqnorm_conv`.

    Raises:
        ValueError: shapes, dtypes or options that do not match, or a dtype without kernels.
    """
    dimensions = len(kernel)
    numbers = 1 <= dimensions <= 3 and all(len(x) == dimensions for x in (stride, padding, dilation))
    check(numbers, "kernel, stride, padding and dilation: expected 1 to 3 numbers each, all as many")
    _check(a, d, dimensions + 2, "examples")
    divides = groups >= 1 and a.shape[1] % groups == d.shape[1] % groups == 0
    check(divides, f"groups: expected a divisor of the channels, got {groups}")
    size, kernel3, stride3, dilation3, output = (
        (*[1] * (3 - dimensions), *values) for values in (a.shape[2:], kernel, stride, dilation, d.shape[2:])
    )
    padding3 = (*[0] * (3 - dimensions), *padding)
    for n, k, s, p, m, out in zip(size, kernel3, stride3, padding3, dilation3, output, strict=True):
        fits = min(k, s, m, out) >= 1 and p >= 0 and (out - 1) * s + (k - 1) * m + 1 <= n + 2 * p
        check(fits, "d: its size does not fit the input, kernel, stride, padding and dilation")
    padded = tuple(n + 2 * p for n, p in zip(size, padding3, strict=True))
    check(a.shape[1] * math.prod(padded) < 2**31, "a: expected fewer than 2^31 elements an example, with its padding")
    layer = _Layer(
        a.shape[1] // groups * math.prod(kernel3), d.shape[1] // groups, math.prod(output), groups, math.prod(kernel3),
        kernel3[1:], padded, output[1:], stride3, dilation3,
    )  # fmt: skip
    bias = d.flatten(2).sum(2, dtype=torch.float64).square().sum(1)
    if 0 in (len(a), layer.inputs, layer.outputs):
        return torch.zeros_like(bias), bias
    with torch.cuda.device_of(a):
        # The padding is written once, so that no load has to check whether it is inside.
        around = [p for p in reversed(padding) for _ in range(2)]
        a = torch.nn.functional.pad(a, around) if any(padding) else a
        return _norms(a.contiguous(), d.contiguous(), layer, True, gram), bias


def channel_products(a: Tensor, d: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.channel_products`.

    Raises:
        ValueError: shapes or dtypes that do not match, or a dtype without kernels.
    """
    _check(a, d, 3, "size")
    check(a.shape == d.shape, "a and d: expected the same size and dtype on one device")
    fits = center.numel() == a.shape[1] and center.dtype == a.dtype and center.device == a.device
    check(fits, f"center: expected {a.shape[1]} numbers of the dtype of a, got {center.numel()}")
    products, sums = torch.zeros(2, *a.shape[:2], dtype=torch.float64, device=a.device)
    if a.numel():
        tile = channel_tile(a.shape[2])
        with torch.cuda.device_of(a):
            _channel_products[(triton.cdiv(products.numel(), tile.rows),)](
                a.contiguous(), d.contiguous(), center.contiguous(), products, sums, products.numel(), a.shape[1],
                a.shape[2], COMPUTE=compute_type(a.dtype), ROWS=tile.rows, SIZE=tile.size, MULTIPLE=tile.multiple,
                num_warps=4,
            )  # fmt: skip
    return products, sums


def _configurations() -> list[Configuration]:
    found = []
    sizes = dict.fromkeys(_SIZES, "i32")
    for dtype, precision in [(torch.float32, "tf32"), *((dtype, "ieee") for dtype in TYPES)]:
        kind = f"*{TYPES[dtype]}"
        for convolution in (False, True):
            constants = {"CONVOLUTION": convolution, "PRECISION": precision, "ACCUMULATE": compute_type(dtype)}
            for tile in sorted({direct_tile(dtype, precision, n, m) for n in (32, 64) for m in (16, 32, 64)}):
                signature = {"a": kind, "d": kind, "chosen": "*i1", "partial": "*fp64", **sizes}
                shape = {"OUTPUTS": tile.rows, "INPUTS": tile.columns, "POSITIONS": tile.depth}
                found.append(Configuration(_direct, signature, {**constants, **shape}, tile.warps))
            for tile in sorted({gram_tile(dtype, precision, n) for n in (16, 32, 64)}):
                signature = {"a": kind, "d": kind, "partial": "*fp64", "diagonal": "*fp64", **sizes}
                shape = {"POSITIONS": tile.rows, "DEPTH": tile.depth}
                found.append(Configuration(_gram, signature, {**constants, **shape}, tile.warps))
    for dtype, name in TYPES.items():
        for part in sorted({channel_tile(n) for n in (31, 32, 255, 256)}):
            signature = dict.fromkeys(["a", "d", "center"], f"*{name}")
            signature |= {"products": "*fp64", "sums": "*fp64", "rows": "i32", "channels": "i32", "size": "i32"}
            constants = {
                "COMPUTE": compute_type(dtype),
                "ROWS": part.rows,
                "SIZE": part.size,
                "MULTIPLE": part.multiple,
            }
            found.append(Configuration(_channel_products, signature, constants, num_warps=4))
    return found


CONFIGURATIONS = _configurations()
