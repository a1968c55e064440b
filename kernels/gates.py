"""ReLU, leaky or not, and max-pool with what their backward and replay need: a bit per element, 32 per choice.

They are bound by memory: each kernel reads its input once and writes its output once. Two things need care.

* Places in planes: a program finds its first plane in 64 bits, once; the rest is arithmetic in 32 bits.
* The transpose of a max-pool adds up where windows overlap. Which do is not known here; float atomics would give other
  bits in every run, and a sort costs more than the pool. So one warp owns a plane. It takes 32 outputs at a time, in
  their order, and counts for each the equal indices before it among the 32; those that count 0 are added at once, then
  those that count 1, and so on. Windows that do not overlap take one turn. Sums are in the order of the outputs, as on
  the CPU.

Indices are not checked, which would stall the stream: one outside its plane yields NaN in gate_take and is dropped in
gate_put.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.blocks import load_block, store_block
from fastfisher.kernels.checks import TYPES, check, check_dtype
from fastfisher.kernels.compile import Configuration

BLOCK = 1024
"""Elements per program."""
AT_ONCE = 32
"""Outputs that a warp puts at once."""


# ---- ReLU -----------------------------------------------------------------------------------------------------------


@triton.jit
def shut(value, slope, LEAKY: tl.constexpr):
    """What a closed gate makes of an element: 0, or its multiple in a leaky ReLU."""
    if LEAKY:
        amount = tl.full([1, 1], slope, tl.float64)
        if value.dtype == tl.float64:
            below = value * amount
        else:
            below = (value.to(tl.float32) * amount.to(tl.float32)).to(value.dtype)
    else:
        below = tl.zeros_like(value)
    return below


@triton.jit(do_not_specialize=["numel"])
def relu(x, out, bits, slope: tl.float64, numel: tl.int64, LEAKY: tl.constexpr, BLOCK: tl.constexpr):
    """max(x, 0), where NaN passes, or leaky_relu(x, slope), where it does not, and its gates, 32 to a word."""
    word = tl.program_id(0).to(tl.int64) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    bit = tl.arange(0, 32)[None, :]
    place = word[:, None] * 32 + bit
    whole = (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel
    value = load_block(x + place, place < numel, whole, 0.0, "")
    passes = value > 0
    if not LEAKY:
        passes = passes | (value != value)
    store_block(out + place, tl.where(passes, value, shut(value, slope, LEAKY)), place < numel, whole, "")
    packed = tl.sum(passes.to(tl.int32) << bit, 1)  # distinct powers of two: their sum has all their bits
    tl.store(bits + word, packed, mask=word * 32 < numel)


@triton.jit(do_not_specialize=["numel"])
def apply(x, bits, out, slope: tl.float64, numel: tl.int64, LEAKY: tl.constexpr, BLOCK: tl.constexpr):
    """x where its gate is open, else 0, or x slope where LEAKY."""
    word = tl.program_id(0).to(tl.int64) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    bit = tl.arange(0, 32)[None, :]
    place = word[:, None] * 32 + bit
    gates = tl.load(bits + word, mask=word * 32 < numel, other=0)
    whole = (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel
    value = load_block(x + place, place < numel, whole, 0.0, "")
    open = ((gates[:, None] >> bit) & 1) != 0
    store_block(out + place, tl.where(open, value, shut(value, slope, LEAKY)), place < numel, whole, "")


# ---- max-pool -------------------------------------------------------------------------------------------------------


@triton.jit
def planes_of(outputs, BLOCK: tl.constexpr):
    """Of this program's outputs, over all planes: the plane of the first, each one's planes past it, and its place."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    plane = first // outputs
    local = (first - plane * outputs).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    count = outputs.to(tl.uint32)
    past = local // count
    return plane, past.to(tl.int32), (local - past * count).to(tl.int32)


@triton.jit(do_not_specialize=["numel", "rows", "columns", "height", "width", "stride_height", "stride_width"])
def max_pool(
    x, values, indices, numel: tl.int64, rows: tl.int32, columns: tl.int32, height: tl.int32, width: tl.int32,
    stride_height: tl.int32, stride_width: tl.int32, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first maximum of each window, NaN above all, and its place in its plane: -1 where GATED and not above 0."""
    wide = (columns - width) // stride_width + 1
    outputs = (((rows - height) // stride_height + 1) * wide).to(tl.int64)
    plane, past, within = planes_of(outputs, BLOCK)
    output = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = output < numel
    corner = (within // wide * stride_height) * columns + within % wide * stride_width
    source = x + (plane + past) * (rows.to(tl.int64) * columns)
    best = tl.load(source + corner, mask=real, other=0.0)
    index = corner
    for i in tl.range(height):
        for j in tl.range(width):
            place = corner + i * columns + j
            value = tl.load(source + place, mask=real, other=0.0)
            larger = (value > best) | (value != value)
            best = tl.where(larger, value, best)
            index = tl.where(larger, place, index)
    if GATED:
        index = tl.where(best <= 0, -1, index)
    whole = (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel
    store_block(values + output, best, real, whole, "")
    store_block(indices + output, index, real, whole, "")


@triton.jit(do_not_specialize=["numel", "elements", "outputs"])
def take(x, indices, out, numel: tl.int64, elements: tl.int64, outputs: tl.int64, BLOCK: tl.constexpr):
    """Of each plane the elements at its indices: 0 at -1, NaN outside the plane."""
    plane, past, _ = planes_of(outputs, BLOCK)
    output = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    whole = (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel
    index = load_block(indices + output, output < numel, whole, -1, "")
    inside = (index >= 0) & (index < elements)
    value = tl.load(x + (plane + past) * elements + index, mask=inside, other=0.0)
    taken = tl.where(inside | (index == -1), value, float("nan"))
    store_block(out + output, taken, output < numel, whole, "")


@triton.jit(do_not_specialize=["elements", "outputs"])
def put(y, indices, out, elements: tl.int64, outputs: tl.int64, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """One plane of zeros, and its outputs added at their indices, in order."""
    plane = tl.program_id(0).to(tl.int64)
    target = out + plane * elements
    place = tl.arange(0, BLOCK)
    for first in tl.range(0, elements, BLOCK):
        zeros = tl.zeros([BLOCK], out.dtype.element_ty)
        tl.store(target + first + place, zeros, mask=first + place < elements)
    each = tl.arange(0, AT_ONCE)
    for first in tl.range(0, outputs, AT_ONCE):
        output = first + each
        index = tl.load(indices + plane * outputs + output, mask=output < outputs, other=-1)
        value = tl.load(y + plane * outputs + output, mask=output < outputs, other=0.0)
        inside = (index >= 0) & (index < elements)
        earlier = (index[:, None] == index[None, :]) & (each[:, None] > each[None, :])
        count = tl.where(inside, tl.sum(earlier.to(tl.int32), 1), -1)
        for turn in tl.range(tl.max(count) + 1):
            tl.debug_barrier()  # this turn reads what other threads wrote in the one before
            now = count == turn
            sum = tl.load(target + index, mask=now, other=0.0) + value
            tl.store(target + index, sum, mask=now)


# ---- host functions -------------------------------------------------------------------------------------------------


@functools.cache
def plan(operator: str, dtype: torch.dtype, chosen: bool = False) -> Configuration:
    """The configuration in which ``operator`` takes tensors of this dtype; ``chosen`` is its GATED or LEAKY."""
    kernel, signature, constants, warps = _KERNELS[operator]
    signature = {name: kind.replace("T", TYPES[dtype]) for name, kind in signature.items()}
    constants = {name: chosen if name in _CHOICES else value for name, value in constants.items()}
    return Configuration(kernel, signature, constants, num_warps=warps)


_CHOICES = ("GATED", "LEAKY")
_POOL = ("rows", "columns", "height", "width", "stride_height", "stride_width")
_KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "gate_relu": (
        relu,
        {"x": "*T", "out": "*T", "bits": "*i32", "slope": "fp64", "numel": "i64"},
        {"LEAKY": False, "BLOCK": BLOCK},
        4,
    ),
    "gate_apply": (
        apply,
        {"x": "*T", "bits": "*i32", "out": "*T", "slope": "fp64", "numel": "i64"},
        {"LEAKY": False, "BLOCK": BLOCK},
        4,
    ),
    "gate_max_pool": (
        max_pool,
        {"x": "*T", "values": "*T", "indices": "*i32", "numel": "i64", **dict.fromkeys(_POOL, "i32")},
        {"GATED": False, "BLOCK": BLOCK},
        4,
    ),
    "gate_take": (
        take,
        {"x": "*T", "indices": "*i32", "out": "*T", "numel": "i64", "elements": "i64", "outputs": "i64"},
        {"BLOCK": BLOCK},
        4,
    ),
    "gate_put": (
        put,
        {"y": "*T", "indices": "*i32", "out": "*T", "elements": "i64", "outputs": "i64"},
        {"BLOCK": BLOCK, "AT_ONCE": AT_ONCE},
        1,
    ),
}
"""The kernel of each operator, its arguments ("T" for the dtype), its constants and its warps."""

CONFIGURATIONS = [
    plan(operator, dtype, chosen)
    for operator, (_, _, constants, _) in _KERNELS.items()
    for dtype in TYPES
    for chosen in ((False, True) if constants.keys() & set(_CHOICES) else (False,))
]


def _launch(chosen: Configuration, programs: int, tensors: list[Tensor], *sizes: float) -> None:
    if programs == 0:
        return
    with torch.cuda.device_of(tensors[0]):
        chosen.kernel[(programs,)](
            *tensors, *sizes, **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages
        )


def _words(x: Tensor) -> int:
    return (x.numel() + 31) // 32


def _relu_into(x: Tensor, out: Tensor, negative_slope: float | None) -> Tensor:
    check(x.is_contiguous(), "x: expected a contiguous tensor")
    check_dtype(x, "x")
    bits = x.new_empty(_words(x), dtype=torch.int32)
    chosen = plan("gate_relu", x.dtype, negative_slope is not None)
    _launch(chosen, triton.cdiv(x.numel(), BLOCK), [x, out, bits], negative_slope or 0.0, x.numel())
    return bits


def gate_relu(x: Tensor, negative_slope: float | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.gate_relu`.

    Raises:
        ValueError: ``x`` is not contiguous, or its dtype no float.
    """
    out = torch.empty_like(x)
    return out, _relu_into(x, out, negative_slope)


def gate_relu_(x: Tensor, negative_slope: float | None = None) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_relu_`; errors as in :func:`gate_relu`."""
    return _relu_into(x, x, negative_slope)


def gate_apply(x: Tensor, bits: Tensor, negative_slope: float | None = None) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_apply`.

    Raises:
        ValueError: ``x`` is not contiguous, its dtype no float, or ``bits`` is not what it needs.
    """
    check(x.is_contiguous(), "x: expected a contiguous tensor")
    check_dtype(x, "x")
    good = bits.dtype == torch.int32 and bits.numel() == _words(x) and bits.is_contiguous()
    check(good, f"bits: expected a contiguous int32 tensor of {_words(x)} words, got {bits.numel()}")
    out = torch.empty_like(x)
    chosen = plan("gate_apply", x.dtype, negative_slope is not None)
    _launch(chosen, triton.cdiv(x.numel(), BLOCK), [x, bits, out], negative_slope or 0.0, x.numel())
    return out


def gate_max_pool(
    x: Tensor, height: int, width: int, stride_height: int, stride_width: int, gated: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.gate_max_pool`.

    Raises:
        ValueError: ``x`` is not contiguous (planes, height, width), its dtype no float, its planes smaller than the
            window or larger than an index, or a size or stride is below 1.
    """
    check(x.dim() == 3 and x.is_contiguous(), "x: expected a contiguous tensor (planes, height, width)")
    check(min(height, width, stride_height, stride_width) >= 1, "height, width and strides: expected >= 1")
    planes, rows, columns = x.shape
    check(
        rows >= height and columns >= width,
        f"x: expected planes of at least {height} x {width}, got {rows} x {columns}",
    )
    check(rows * columns < 2**31, "x: expected planes of at most 2^31 - 1 elements")
    check_dtype(x, "x")
    outputs = ((rows - height) // stride_height + 1) * ((columns - width) // stride_width + 1)
    values = x.new_empty(planes, outputs)
    indices = torch.empty_like(values, dtype=torch.int32)
    sizes = (values.numel(), rows, columns, height, width, min(stride_height, rows), min(stride_width, columns))
    chosen = plan("gate_max_pool", x.dtype, gated)
    _launch(chosen, triton.cdiv(values.numel(), BLOCK), [x, values, indices], *sizes)
    return values, indices


def _check_planes(x: Tensor, name: str, indices: Tensor) -> None:
    check(x.dim() == 2 and x.is_contiguous(), f"{name}: expected a contiguous tensor (planes, elements)")
    check_dtype(x, name)
    good = indices.dim() == 2 and len(indices) == len(x) and indices.dtype == torch.int32 and indices.is_contiguous()
    check(good, f"indices: expected a contiguous int32 tensor (planes, outputs) with {len(x)} planes")
    check(indices.shape[1] < 2**31, "indices: expected at most 2^31 - 1 outputs per plane")


def gate_take(x: Tensor, indices: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_take`. An index outside its plane yields NaN.

    Raises:
        ValueError: ``x`` or ``indices`` is not contiguous, of two dimensions, as many planes and its dtype.
    """
    _check_planes(x, "x", indices)
    out = x.new_empty(indices.shape)
    sizes = (out.numel(), x.shape[1], out.shape[1])
    _launch(plan("gate_take", x.dtype), triton.cdiv(out.numel(), BLOCK), [x, indices, out], *sizes)
    return out


def gate_put(y: Tensor, indices: Tensor, elements: int) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_put`. An element whose index lies outside its plane is dropped.

    Raises:
        ValueError: ``y`` or ``indices`` is not contiguous, of two dimensions, one shape and its dtype.
    """
    _check_planes(y, "y", indices)
    check(y.shape == indices.shape, "y and indices: expected one shape")
    out = y.new_empty(len(y), elements)
    _launch(plan("gate_put", y.dtype), len(y) if elements else 0, [y, indices, out], elements, y.shape[1])
    return out
