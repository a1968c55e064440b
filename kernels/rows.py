"""Softmax, row by row: a draw with its loss and gradient, that gradient's derivative, and the Rademacher cotangent.
Last, the draw of labels 0 and 1, for which every element is a row of its own.

At the least, the input is read once and the result written once. Three forms come close to that:

* Rows of up to 1,024 columns: one warp takes a row, or several narrower ones. It waits for no other.
* Up to 16,384 columns: a row stays in registers, 32 elements to a thread, a warp to every 1,024 columns.
* Above: two passes over a row, 4,096 columns at a time. The second goes backwards and finds in the cache what the first
  read last; where all rows in flight fit there, memory is again read once. float64, in which nobody trains, takes this
  form from 513 columns on, for want of registers.

The draw is an inverse CDF, in tiles of 1,024 columns: word 0 of the row's Philox call picks a tile by the tiles' sums,
word 1 an element inside it. The tiles' running sum is in float64, so that all 32 bits of word 0 count; in a tile,
float32 tells 1,024 elements apart. A tile that was picked out of several is read once more, from the cache: this costs
less than a running sum of the whole row. The start of that tile has to be a scalar: as a tensor of one element it would
give a tensor of 1,024 pointers, which Triton 3.6 hands between threads through shared memory, in 4,600 instructions. In
a row of one tile the running sum has two levels. Sums are trees of fixed shape: a row's result depends on nothing but
the row.

Rows of a multiple of 8 columns begin at multiples of 16 bytes and are read and written in such words. Other rows of two
passes begin their blocks at the boundary before the row; only their first and last block need a mask.

A row without a softmax (NaN, +inf, or nothing above -inf) cannot be reported without stalling the stream: its loss and
gradient are NaN and its label is -1.

Where one form ends and the next begins was chosen so that none spills a register; none of it is measured yet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.blocks import load_block, store_block
from fastfisher.kernels.checks import TYPES, check, check_dtype, check_key
from fastfisher.kernels.compile import Configuration
from fastfisher.kernels.philox import philox, uniform

TILE = 1024
"""Columns per tile of the search, as in reference.py: part of the definition of a draw."""

MAX_COLUMNS = 2**18
NARROW = (16, 128, 512)
"""The widths to which rows below a tile are padded."""
NARROW_BYTES = 2048
"""How much of such rows a warp computes with."""
GROUP = tl.constexpr(128)
"""Columns per group of the search in a row of one tile."""
WIDE = (1, 2, 4, 8, 16)
"""The numbers of tiles to which longer rows are padded, a warp each."""
STEP_TILES = 4
"""The tiles that a step of the two passes takes."""
STEPS = MAX_COLUMNS // (STEP_TILES * TILE)
LOOPED_WARPS = 16
"""The warps that take such a row. With 32, one block to a multiprocessor, none but float64's cotangent spills: which is
faster is to be decided on a GPU. (``plan`` keeps what it has chosen: clear its cache after a change.)"""


# ---- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def to_compute(x):
    """In float64 what is float64, and everything else in float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def exponential(x):
    """exp(x) for x up to 0, to 1 + |x| / 43 units in the last place and the error of the GPU's exp2.

    ``tl.exp`` is 2^y with y = x log2(e) rounded, which alone costs up to |x| / 2 units: the same error for all columns
    that share a logit, so the sum of a row does not average it out. Here the remainder of that rounding, exact in a
    fused multiply-add, is put back to first order.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # From -200 down exp is 0; the remainder of -inf would be NaN.
        x = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)
        power = x * 1.4426950408889634
        weight = tl.exp2(power)
        return tl.fma(weight, tl.fma(power, -0.6931471805599453, x), weight)


@triton.jit
def quotient(x, y):
    """x / y correctly rounded, which `/` is in float64 only: in float32 it errs by 2 units in the last place."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.math.div_rn(x, y)


@triton.jit
def finite(maximum):
    """What to subtract from a row or tile before the exponential: where all is masked, 0 in place of -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def first_above(weights, target):
    """In the last dimension, the first index whose running sum exceeds the target; never one of zero weight.

    A running sum made in parallel may fall by a rounding error where a weight is 0: the weights themselves are asked.
    Where rounding leaves nothing above the target, it is the last index of positive weight.
    """
    axis: tl.constexpr = len(weights.shape) - 1
    size: tl.constexpr = weights.shape[axis]
    index = tl.arange(0, size)
    above = tl.cumsum(weights, axis) > target
    order = tl.where(above, index, 2 * size - index)  # the others come after all that are above, the last one first
    first = tl.min(tl.where(weights > 0, order, 2 * size), axis)
    return tl.where(first < size, first, 2 * size - first)


@triton.jit
def first_above_in_groups(weights, sums, target):
    """The same over all of ``weights[groups, size]`` in turn, whose groups have these sums.

    The running sum is that of the groups, then that of one group: an addition for each element, not a step of a scan.
    """
    group_index = tl.arange(0, weights.shape[0])
    group = first_above(sums, target)
    before = tl.sum(tl.where(group_index < group, sums, 0.0))
    # The group's weights, as the sum of them and zeros.
    chosen = tl.sum(tl.where((group_index == group)[:, None], weights, 0.0), 0)
    return group * weights.shape[1] + first_above(chosen, target - before)


@triton.jit
def tile_of(tile_sums, word):
    """The tile that word 0 picks by the tiles' sums."""
    tile_sums = tile_sums.to(tl.float64)
    return first_above(tile_sums, uniform(word, tl.float64) * tl.sum(tile_sums))


@triton.jit
def boundary(row, columns):
    """The last multiple of 8 elements at or before a row's start, so that 16 bytes are read at once; how far before."""
    start = row * columns
    before = start // 8 * 8
    return before, (start - before).to(tl.int32)


# ---- the sampled cross-entropy --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_row", "rows", "columns"])
def sample_narrow(
    logits, key, first_row: tl.int64, nll, labels, dlogits, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Draw, loss and gradient of ROWS rows of at most WIDTH columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = logits + row * columns
    column = tl.arange(0, WIDTH)[None, :]
    real = row < rows
    inside = real[:, None] & (column < columns)
    x = to_compute(tl.load(source[:, None] + column, mask=inside, other=float("-inf")))
    subtracted = finite(tl.max(x, 1))
    weights = exponential(x - subtracted[:, None])
    total = tl.sum(weights, 1)
    good = total > 0  # NaN for NaN and +inf, 0 where everything is -inf

    _, word, _, _ = philox(key, first_row + row)
    label = first_above(weights, (uniform(word, total.dtype) * total)[:, None])

    logit = to_compute(tl.load(source + label, mask=real & (label < columns), other=0.0))
    tl.store(nll + row, tl.where(good, tl.log(total) + (subtracted - logit), float("nan")), mask=real)
    tl.store(labels + row, tl.where(good, label, -1).to(tl.int64), mask=real)
    amount = tl.full([ROWS], scale, tl.float64).to(total.dtype)
    factor = tl.where(good, quotient(amount, total), float("nan"))
    gradient = weights * factor[:, None]
    gradient = tl.where(column == label[:, None], gradient - amount[:, None], gradient)
    tl.store((dlogits + row * columns)[:, None] + column, gradient, mask=inside)


@triton.jit
def store_outcome(source, nll, labels, row, columns, total, subtracted, label):
    """Writes the loss and label of a row, and tells whether it has a softmax."""
    good = total > 0
    logit = to_compute(tl.load(source + label, mask=label < columns, other=0.0))
    tl.store(nll + row, tl.where(good, tl.log(total) + (subtracted - logit), float("nan")))
    tl.store(labels + row, tl.where(good, label, -1).to(tl.int64))
    return good


@triton.jit
def label_in_tile(source, tile, columns, subtracted, word, WIDTH: tl.constexpr):
    """The column that word 1 picks in a tile. The tile's start is a scalar: see the head of this file."""
    start = tile * WIDTH
    column = start + tl.arange(0, WIDTH)
    chosen = to_compute(tl.load(source + column, mask=column < columns, other=float("-inf")))
    weights = exponential(chosen - subtracted)
    return start + first_above(weights, uniform(word, weights.dtype) * tl.sum(weights))


@triton.jit(do_not_specialize=["first_row", "rows", "columns"])
def sample_resident(
    logits, key, first_row: tl.int64, nll, labels, dlogits, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Draw, loss and gradient of one row that stays in registers, of TILES tiles of WIDTH columns."""
    columns = columns // MULTIPLE * MULTIPLE  # tells the compiler how rows are aligned: it loads as wide
    PARTS: tl.constexpr = TILES if TILES > 1 else WIDTH // GROUP
    SIZE: tl.constexpr = TILES * WIDTH // PARTS
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * columns
    column = tl.arange(0, PARTS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = to_compute(tl.load(source + column, mask=column < columns, other=float("-inf")))
    tile_word, element_word, _, _ = philox(key, first_row + row)  # computed while the row is loaded
    subtracted = finite(tl.max(x))
    weights = exponential(x - subtracted)
    sums = tl.sum(weights, 1)
    total = tl.sum(sums)

    if TILES == 1:
        label = first_above_in_groups(weights, sums, uniform(element_word, total.dtype) * total)
    else:
        label = label_in_tile(source, tile_of(sums, tile_word), columns, subtracted, element_word, WIDTH)

    good = store_outcome(source, nll, labels, row, columns, total, subtracted, label)
    amount = tl.full([1], scale, tl.float64).to(total.dtype)
    factor = tl.where(good, quotient(amount, total), float("nan"))
    gradient = weights * factor
    gradient = tl.where(column == label, gradient - amount, gradient)
    tl.store(dlogits + row * columns + column, gradient, mask=column < columns)


@triton.jit(do_not_specialize=["first_row", "rows", "columns"])
def sample_looped(
    logits, key, first_row: tl.int64, nll, labels, dlogits, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    STEPS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Draw, loss and gradient of one row in two passes, TILES tiles of WIDTH columns at a step."""
    columns = columns // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * columns
    column = tl.arange(0, TILES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    step_index = tl.arange(0, STEPS)
    steps = tl.cdiv(columns, TILES * WIDTH)
    step_max = to_compute(tl.full([STEPS], float("-inf"), logits.dtype.element_ty))
    tile_sums = tl.zeros([STEPS, TILES], step_max.dtype)
    following = tl.load(source + column, mask=column < columns, other=float("-inf"))
    for step in tl.range(steps):
        x = to_compute(following)  # the next step's logits are loaded while this one's are summed
        at = (step + 1) * TILES * WIDTH + column
        following = tl.load(source + at, mask=at < columns, other=float("-inf"))
        largest = tl.max(x)  # of this step alone; the sums are rescaled once, after the loop
        sums = tl.sum(exponential(x - finite(largest)), 1)
        step_max = tl.where(step_index == step, largest, step_max)
        tile_sums = tl.where((step_index == step)[:, None], sums[None, :], tile_sums)
    subtracted = finite(tl.max(step_max))
    tile_sums = tl.reshape(tile_sums * exponential(step_max - subtracted)[:, None], [STEPS * TILES])
    total = tl.sum(tile_sums)

    tile_word, element_word, _, _ = philox(key, first_row + row)
    label = label_in_tile(source, tile_of(tile_sums, tile_word), columns, subtracted, element_word, WIDTH)

    good = store_outcome(source, nll, labels, row, columns, total, subtracted, label)
    amount = tl.full([1], scale, tl.float64).to(total.dtype)
    factor = tl.where(good, quotient(amount, total), float("nan"))
    # Read for the last time, or written: evict these first, so that other rows stay in the cache.
    before, shift = boundary(row, columns)
    place = tl.arange(0, TILES * WIDTH)
    end = shift + columns
    steps = tl.cdiv(end, TILES * WIDTH)
    for step in tl.range(steps):
        begin = (steps - 1 - step) * TILES * WIDTH
        at = begin + place
        whole, inside = (begin >= shift) & (begin + TILES * WIDTH <= end), (at >= shift) & (at < end)
        x = to_compute(load_block(logits + before + at, inside, whole, float("-inf"), "evict_first"))
        gradient = exponential(x - subtracted) * factor
        gradient = tl.where(at - shift == label, gradient - amount, gradient)
        store_block(dlogits + before + at, gradient, inside, whole, "evict_first")


# ---- its derivative: (p⊙v − p (p·v))·scale, with p = dlogits/scale + onehot(label) -----------------------------------


@triton.jit
def probabilities(dlogits, inverse, column, label):
    """The softmax that a gradient came from."""
    return to_compute(dlogits) * inverse + tl.where(column == label, 1.0, 0.0)


@triton.jit(do_not_specialize=["rows", "columns"])
def product_resident(
    dlogits, labels, vector, out, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The product for ROWS rows of TILES * WIDTH columns that stay in registers."""
    columns = columns // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILES * WIDTH)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    start = row[:, None] * columns
    v = to_compute(tl.load(vector + start + column, mask=inside, other=0.0))
    amount = tl.full([ROWS, 1], scale, tl.float64)
    label = tl.load(labels + row, mask=row < rows, other=0)[:, None]
    d = tl.load(dlogits + start + column, mask=inside, other=0.0)
    p = probabilities(d, (1.0 / amount).to(v.dtype), column, label)
    mean = tl.sum(p * v, 1)[:, None]
    tl.store(out + start + column, (p * v - p * mean) * amount.to(v.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows", "columns"])
def product_looped(
    dlogits, labels, vector, out, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    STEPS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The product for one row in two passes, TILES * WIDTH columns at a step."""
    columns = columns // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    before, shift = boundary(row, columns)
    place = tl.arange(0, TILES * WIDTH)
    end = shift + columns
    steps = tl.cdiv(end, TILES * WIDTH)
    label = tl.load(labels + row)
    amount = tl.full([1], scale, tl.float64)
    sums = to_compute(tl.zeros([TILES * WIDTH], dlogits.dtype.element_ty))
    inverse = (1.0 / amount).to(sums.dtype)
    for step in tl.range(steps):  # no reduction inside the loop, so the compiler can start loads ahead
        begin = step * TILES * WIDTH
        at = begin + place
        whole, inside = (begin >= shift) & (begin + TILES * WIDTH <= end), (at >= shift) & (at < end)
        d = load_block(dlogits + before + at, inside, whole, 0.0, "")
        v = load_block(vector + before + at, inside, whole, 0.0, "")
        sums += probabilities(d, inverse, at - shift, label) * to_compute(v)
    mean = tl.sum(sums)
    for step in tl.range(steps):
        begin = (steps - 1 - step) * TILES * WIDTH
        at = begin + place
        whole, inside = (begin >= shift) & (begin + TILES * WIDTH <= end), (at >= shift) & (at < end)
        d = load_block(dlogits + before + at, inside, whole, 0.0, "evict_first")
        v = to_compute(load_block(vector + before + at, inside, whole, 0.0, "evict_first"))
        p = probabilities(d, inverse, at - shift, label)
        product = (p * v - p * mean) * amount.to(sums.dtype)
        store_block(out + before + at, product, inside, whole, "evict_first")


# ---- the Rademacher cotangent: (√p⊙ε − p⟨√p, ε⟩)·scale ---------------------------------------------------------------


@triton.jit(do_not_specialize=["first_call", "calls"])
def sign_words(key, words, first_call: tl.int64, calls: tl.int64, BLOCK: tl.constexpr):
    """The four words of each Philox call from the first on, one call for every 128 columns of a row.

    They go through memory, at 1/32 of an element each: made where they are used, every thread would make its own anew.
    """
    call = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox(key, first_call + call)
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    place = call[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(words + place, tl.reshape(pairs, [BLOCK, 4]).to(tl.int32, bitcast=True), mask=(call < calls)[:, None])


@triton.jit
def signs(words, column, inside):
    """Whether the sign of a column is negative: its bit in the row that ``words`` points to."""
    bits = tl.load(words + column // 32, mask=inside, other=0) >> (column % 32)
    return (bits & 1) != 0


@triton.jit
def signed(x, negative):
    """x with the sign that it is given."""
    return tl.where(negative, -x, x)


@triton.jit(do_not_specialize=["rows", "columns"])
def rademacher_resident(
    logits, words, out, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The cotangents of ROWS rows of TILES * WIDTH columns that stay in registers."""
    columns = columns // MULTIPLE * MULTIPLE
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, TILES * WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    x = to_compute(tl.load(logits + row * columns + column, mask=inside, other=float("-inf")))
    weights = exponential(x - finite(tl.max(x, 1))[:, None])
    total = tl.sum(weights, 1)[:, None]
    negative = signs(words + row * (tl.cdiv(columns, 128) * 4), column, inside)
    factor = tl.where(total > 0, quotient(1.0, total), float("nan"))
    mean = tl.sum(signed(tl.sqrt(weights), negative), 1)[:, None] * tl.sqrt(factor)
    amount = tl.full([ROWS, 1], scale, tl.float64).to(total.dtype)
    p = weights * factor
    tl.store(out + row * columns + column, (signed(tl.sqrt(p), negative) - p * mean) * amount, mask=inside)


@triton.jit(do_not_specialize=["rows", "columns"])
def rademacher_looped(
    logits, words, out, rows: tl.int64, columns: tl.int32, scale: tl.float64,
    STEPS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The cotangent of one row in two passes, TILES * WIDTH columns at a step."""
    columns = columns // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    source, target = logits + row * columns, out + row * columns
    words += row * (tl.cdiv(columns, 128) * 4)
    column = tl.arange(0, TILES * WIDTH)
    step_index = tl.arange(0, STEPS)
    steps = tl.cdiv(columns, TILES * WIDTH)
    step_max = to_compute(tl.full([STEPS], float("-inf"), logits.dtype.element_ty))
    step_sums, step_roots = tl.zeros_like(step_max), tl.zeros_like(step_max)
    following = tl.load(source + column, mask=column < columns, other=float("-inf"))
    for step in tl.range(steps):
        x = to_compute(following)
        here, at = step * TILES * WIDTH + column, (step + 1) * TILES * WIDTH + column
        following = tl.load(source + at, mask=at < columns, other=float("-inf"))
        largest = tl.max(x)
        weights = exponential(x - finite(largest))
        roots = signed(tl.sqrt(weights), signs(words, here, here < columns))
        step_max = tl.where(step_index == step, largest, step_max)
        step_sums = tl.where(step_index == step, tl.sum(weights), step_sums)
        step_roots = tl.where(step_index == step, tl.sum(roots), step_roots)
    subtracted = finite(tl.max(step_max))
    total = tl.sum(step_sums * exponential(step_max - subtracted))
    factor = tl.where(total > 0, quotient(1.0, total), float("nan"))
    # sqrt(exp(x - a)) = sqrt(exp(x - b)) exp((b - a) / 2)
    mean = tl.sum(step_roots * exponential((step_max - subtracted) / 2)) * tl.sqrt(factor)
    amount = tl.full([1], scale, tl.float64).to(total.dtype)
    for step in tl.range(steps):
        at = (steps - 1 - step) * TILES * WIDTH + column
        x = to_compute(tl.load(source + at, mask=at < columns, other=float("-inf"), eviction_policy="evict_first"))
        p = exponential(x - subtracted) * factor
        cotangent = (signed(tl.sqrt(p), signs(words, at, at < columns)) - p * mean) * amount
        tl.store(target + at, cotangent, mask=at < columns, eviction_policy="evict_first")


# ---- the sampled binary cross-entropy --------------------------------------------------------------------------------


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t from 0 to 1.

    In float32 the minimax polynomial of csrc/cpu/rows.cpp: the GPU's own logarithm errs by 2⁻²², however small t is. In
    float64 the rounding of 1 + t is put back to first order.
    """
    if t.dtype == tl.float64:
        shifted = 1.0 + t
        return tl.log(shifted) + (t - (shifted - 1.0)) / shifted
    else:
        q = t * -3.244024701e-3 + 1.985145919e-2
        q = q * t - 5.695952848e-2
        q = q * t + 1.060365438e-1
        q = q * t - 1.530559212e-1
        q = q * t + 1.967593879e-1
        q = q * t - 2.495413423e-1
        q = q * t + 3.332996368e-1
        q = q * t - 4.999990165e-1
        return tl.fma(q * t, t, t)


@triton.jit
def sample_binary_part(logits, nll, labels, dlogits, amount, places, inside, word):
    """Draw, loss and gradient of the elements at some places, a word of random bits for each.

    Of the two labels one has probability 1 / (1 + t), t = exp(-|z|), and the other, the rare one, t / (1 + t): nothing
    is lost by subtracting. The same holds of the draw, for which a word and its complement are alike.
    """
    z = to_compute(tl.load(logits + places, mask=inside, other=0.0))
    negative = z < 0
    size = tl.abs(z)
    t = exponential(-size)
    common_p = quotient(tl.full(t.shape, 1.0, t.dtype), t + 1.0)
    rare_p = t * common_p
    number = tl.where(negative, word, word ^ 0xFFFFFFFF).to(t.dtype) + 0.5
    rare = number < rare_p * 4294967296.0
    one = negative == rare
    loss = log1p_unit(t) + tl.where(rare, size, 0.0)
    gradient = tl.where(rare, common_p, rare_p) * amount.to(t.dtype)
    label = tl.where(one, 1.0, 0.0)
    tl.store(nll + places, loss, mask=inside)
    tl.store(labels + places, tl.where(z == z, label, -1.0), mask=inside)
    tl.store(dlogits + places, tl.where(one, -gradient, gradient), mask=inside)


@triton.jit(do_not_specialize=["first", "elements"])
def sample_binary(
    logits, key, first: tl.int64, nll, labels, dlogits, elements: tl.int64, scale: tl.float64, GROUPS: tl.constexpr
):
    """Draw, loss and gradient of GROUPS groups of 64 elements, whose words come of sixteen Philox calls.

    Blocks follow the groups, so the first is partly masked where ``first`` is no multiple of 64. The calls of a group
    lie side by side, and so do the elements that each word serves.
    """
    group = first // 64 + tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    call = tl.arange(0, 16)[None, :]
    w0, w1, w2, w3 = philox(key, group * 16 + call)
    amount = tl.full([1, 1], scale, tl.float64)
    for part in tl.static_range(4):
        places = group * 64 + (part * 16 + call) - first
        inside = (places >= 0) & (places < elements)
        word = w0 if part == 0 else w1 if part == 1 else w2 if part == 2 else w3
        sample_binary_part(logits, nll, labels, dlogits, amount, places, inside, word)


# ---- host functions -------------------------------------------------------------------------------------------------


@functools.cache
def plan(operator: str, dtype: torch.dtype, columns: int) -> Configuration:
    """The configuration in which ``operator`` takes rows of so many columns."""
    narrow, resident, looped, arguments = _KERNELS[operator]
    names = {"*T": f"*{TYPES[dtype]}", "*L": "*fp64" if dtype == torch.float64 else "*fp32"}
    types = {name: names.get(kind, kind) for name, kind in arguments.items()}
    signature = {**types, "rows": "i64", "columns": "i32", "scale": "fp64"}
    # Narrow rows are read whole by neighbouring threads, whatever they are aligned to; float64 need not be fast.
    multiple = 8 if columns % 8 == 0 and columns > NARROW[-1] and dtype != torch.float64 else 1
    if columns > (NARROW[-1] if dtype == torch.float64 else WIDE[-1] * TILE):
        constants = {"STEPS": STEPS, "TILES": STEP_TILES, "WIDTH": TILE, "MULTIPLE": multiple}
        return Configuration(looped, signature, constants, num_warps=LOOPED_WARPS)
    width = next((width for width in NARROW if columns <= width), TILE)
    tiles = next(tiles for tiles in WIDE if columns <= tiles * width)
    size = width * (8 if dtype == torch.float64 else 4)
    rows = max(1, NARROW_BYTES // size) if width < TILE else 1
    constants = {"ROWS": rows, "TILES": tiles, "WIDTH": width, "MULTIPLE": multiple}
    warps = tiles if width == TILE else max(1, size // NARROW_BYTES)
    return Configuration(narrow if rows > 1 else resident, signature, constants, num_warps=warps)


_KERNELS: dict[str, tuple[Any, Any, Any, dict[str, str]]] = {
    "sample_cross_entropy": (
        sample_narrow,
        sample_resident,
        sample_looped,
        {"logits": "*T", "key": "*i64", "first_row": "i64", "nll": "*L", "labels": "*i64", "dlogits": "*T"},
    ),
    "softmax_hessian_product": (
        product_resident,
        product_resident,
        product_looped,
        {"dlogits": "*T", "labels": "*i64", "vector": "*T", "out": "*T"},
    ),
    "rademacher_cotangent": (
        rademacher_resident,
        rademacher_resident,
        rademacher_looped,
        {"logits": "*T", "words": "*i32", "out": "*T"},
    ),
}
"""The kernels of each operator, for several rows, one row and a row in passes, and what they take: "*T" points to the
dtype of the rows, "*L" to that of a loss."""

_SIGN_CALLS = 256
_SIGNS = Configuration(
    sign_words, {"key": "*i64", "words": "*i32", "first_call": "i64", "calls": "i64"}, {"BLOCK": _SIGN_CALLS}
)

_GROUPS = 32
"""The groups of 64 elements that a program of ``sample_binary`` takes: 16 elements to a thread."""


@functools.cache
def plan_binary(dtype: torch.dtype) -> Configuration:
    """The configuration in which ``sample_binary_cross_entropy`` takes logits of a dtype."""
    kind, loss = f"*{TYPES[dtype]}", "*fp64" if dtype == torch.float64 else "*fp32"
    signature = {
        "logits": kind, "key": "*i64", "first": "i64", "nll": loss, "labels": kind, "dlogits": kind, "elements": "i64",
        "scale": "fp64",
    }  # fmt: skip
    return Configuration(sample_binary, signature, {"GROUPS": _GROUPS})


_EVERY_WIDTH = [*NARROW, *(TILE * tiles - odd for tiles in (*WIDE, 2 * WIDE[-1]) for odd in (0, 1))]
_DISTINCT = {
    str(configuration): configuration
    for operator in _KERNELS
    for dtype in TYPES
    for configuration in (plan(operator, dtype, columns) for columns in _EVERY_WIDTH)
}
CONFIGURATIONS = [_SIGNS, *_DISTINCT.values(), *map(plan_binary, TYPES)]


def _launch(operator: str, x: Tensor, arguments: list[Any], rows: int, columns: int, scale: float) -> None:
    chosen = plan(operator, x.dtype, columns)
    programs = triton.cdiv(rows, chosen.constants.get("ROWS", 1))
    if programs == 0:
        return
    with torch.cuda.device_of(x):
        chosen.kernel[(programs,)](
            x, *arguments, rows, columns, scale, **chosen.constants, num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )  # fmt: skip


def _check_rows(x: Tensor, name: str) -> tuple[int, int]:
    check(x.dim() == 2, f"{name}: expected 2 dimensions (N, C), got {x.dim()}")
    rows, columns = x.shape
    check(1 <= columns <= MAX_COLUMNS, f"{name}: expected 1 to {MAX_COLUMNS} classes, got {columns}")
    check_dtype(x, name)
    return rows, columns


def sample_cross_entropy(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.sample_cross_entropy`.

    Raises:
        ValueError: not 2 dimensions, more than 262,144 classes or none, a dtype that is no float, a scale of 0, or
            something that is no key on the device of the logits.
    """
    rows, columns = _check_rows(logits, "logits")
    check(scale != 0, "scale: expected a number other than 0")
    check_key(key, logits.device)
    x = logits.contiguous()
    nll = x.new_empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    labels, dlogits = x.new_empty(rows, dtype=torch.int64), torch.empty_like(x)
    _launch("sample_cross_entropy", x, [key, first, nll, labels, dlogits], rows, columns, scale)
    return nll, labels, dlogits


def softmax_hessian_product(dlogits: Tensor, labels: Tensor, vector: Tensor, scale: float) -> Tensor:
    """See :func:`fastfisher.ops.reference.softmax_hessian_product`. A row without a softmax, label -1, stays NaN.

    Raises:
        ValueError: not 2 dimensions, more than 262,144 classes or none, a dtype that is no float, tensors that differ
            in shape or dtype, or labels that are no int64 for each row.
    """
    rows, columns = _check_rows(dlogits, "dlogits")
    same = dlogits.shape == vector.shape and dlogits.dtype == vector.dtype
    check(same, "dlogits and vector: expected the same size and dtype")
    check(labels.dtype == torch.int64 and labels.numel() == rows, "labels: expected one int64 label per row")
    d, v = dlogits.contiguous(), vector.contiguous()
    out = torch.empty_like(d)
    _launch("softmax_hessian_product", d, [labels.contiguous(), v, out], rows, columns, scale)
    return out


def rademacher_cotangent(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> Tensor:
    """See :func:`fastfisher.ops.reference.rademacher_cotangent`. A row without a softmax is NaN.

    Raises:
        ValueError: as in :func:`sample_cross_entropy`, but any scale will do.
    """
    rows, columns = _check_rows(logits, "logits")
    check_key(key, logits.device)
    x = logits.contiguous()
    out = torch.empty_like(x)
    calls_per_row = triton.cdiv(columns, 128)
    calls = rows * calls_per_row
    if rows:
        words = torch.empty(4 * calls, dtype=torch.int32, device=x.device)
        with torch.cuda.device_of(x):
            sign_words[triton.cdiv(calls, _SIGN_CALLS),](
                key, words, first * calls_per_row, calls, **_SIGNS.constants, num_warps=_SIGNS.num_warps
            )
        _launch("rademacher_cotangent", x, [words, out], rows, columns, scale)
    return out


def sample_binary_cross_entropy(
    logits: Tensor, key: Tensor, scale: float, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.sample_binary_cross_entropy`. A NaN has NaN loss and label -1.

    Raises:
        ValueError: a dtype that is no float, a scale of 0, a negative ``first``, or something that is no key on the
            device of the logits.
    """
    check_dtype(logits, "logits")
    check(scale != 0, "scale: expected a number other than 0")
    check(first >= 0, f"first: expected 0 or more, got {first}")
    check_key(key, logits.device)
    x = logits.contiguous()
    dlogits = torch.empty_like(x, memory_format=torch.contiguous_format)
    labels = torch.empty_like(dlogits)
    nll = torch.empty_like(dlogits, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    programs = triton.cdiv(first % 64 + x.numel(), 64 * _GROUPS)
    if x.numel():
        chosen = plan_binary(x.dtype)
        with torch.cuda.device_of(x):
            chosen.kernel[(programs,)](
                x, key, first, nll, labels, dlogits, x.numel(), scale, **chosen.constants, num_warps=chosen.num_warps
            )
    return nll, labels, dlogits
