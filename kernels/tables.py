"""perturb, probe_dot, axpy_diff and sum_squares: operators on a whole list of tensors, one launch for each dtype.

The networks of interest have hundreds of small tensors, and a launch costs more than most of them. So the kernels read
from a table in device memory where each tensor lies, and every program looks up the tensor that its tile belongs to.

The table. For each tensor its first tile, the index of its first element, its size, and its address in each list. A
program loads the first tiles of 128 tensors at once and counts those at or before its own; a binary
search would wait for one load after the other, and a map from tiles to tensors would grow with the parameters.
Parameters and gradients come back at the same addresses step after step, so tables are kept: one is built on the host
and copied, from pinned memory and without waiting, only when a list is new. Inside a CUDA graph neither holds: a copy
would read host memory that is gone when the graph is replayed, and gradients have addresses of their own. There the
words of the table travel as arguments of (PyTorch's foreach) kernels, which the graph keeps, into memory that the graph
owns.

The probes. Sixteen Philox calls serve a group of 2,048 signs or 64 normal numbers (reference.probe), and a tensor may
begin anywhere in a group. Tiles therefore follow the groups, not the tensors: the first and the last tile of a tensor
are partly masked, and no element waits for another thread's word. A block is laid out with the calls of a group side by
side, so that a thread that holds one column makes one call for all of it: 32 signs, or 4 normal numbers.

The sums. Each program adds what it sees in float64 and stores it; the partial sums are then added by PyTorch, in an
order that depends on their number alone. There are no atomics: the bits are the same every time.

Tile sizes and warps are not yet measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.checks import TYPES, check, check_dtype, check_key
from fastfisher.kernels.compile import Configuration
from fastfisher.kernels.philox import philox

SIGNS, NORMALS = tl.constexpr(2048), tl.constexpr(512)
"""Elements of a block, which a program works on at once: a group of signs, eight groups of normal numbers."""
TILE = tl.constexpr(8192)
"""Elements of a tile, the share of one program: enough that the search for the tensor and the partial sum are small."""


@triton.jit
def _tensor_of(table, tensors, tile):
    """Which tensor a tile belongs to: the last one whose first tile is not after it."""
    count = 0
    for begin in range(0, tensors, 128):
        lanes = begin + tl.arange(0, 128)
        first_tiles = tl.load(table + lanes, mask=lanes < tensors, other=0x7FFFFFFFFFFFFFFF)
        count += tl.sum((first_tiles <= tile).to(tl.int32))
    return count - 1


@triton.jit
def _share(table, tensors, BLOCK: tl.constexpr):
    """This program's tensor, the first block and the end of its tile, the tensor's first element, and its size."""
    tile = tl.program_id(0)
    tensor = _tensor_of(table, tensors, tile)
    local = tile - tl.load(table + tensor)
    first = tl.load(table + tensors + tensor)
    size = tl.load(table + 2 * tensors + tensor)
    blocks = (first % BLOCK + size + BLOCK - 1) // BLOCK
    begin = local * (TILE // BLOCK)
    return tensor, begin, tl.minimum(begin + TILE // BLOCK, blocks), first, size


@triton.jit
def _address(table, tensors, tensor, number, DTYPE: tl.constexpr):
    """Where the tensor lies in the list of that number."""
    return tl.load(table + (3 + number) * tensors + tensor).to(tl.pointer_type(DTYPE))


@triton.jit
def _extent(block, first, size, BLOCK: tl.constexpr):
    """Where a block begins in its tensor, and which of the block's elements the tensor has: from, up to."""
    origin = block * BLOCK - first % BLOCK
    return origin, tl.maximum(-origin, 0).to(tl.int32), tl.minimum(size - origin, BLOCK).to(tl.int32)


@triton.jit
def _radius(word):
    """sqrt(-2 log u) with u = (word + 1/2) / 2³², to 2 units in the last place, as in csrc/cpu/probes.cpp.

    Above sqrt(1/2) the distance to 1 is taken from the word's complement, so that no digit is lost there.
    """
    near_one = word >= 0xB504F334
    shifted = (word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - 0x3F3504F3
    mantissa = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    distance = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * -2.3283064365386963e-10
    f = tl.where(near_one, distance, mantissa - 1.0)
    exponent = tl.where(near_one, 0, (shifted >> 23) - 32).to(tl.float32)
    p = f * 7.0376836292e-2 - 1.1514610310e-1  # Cephes' logf
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    tail = p * f * square + exponent * -2.12194440e-4 - 0.5 * square
    return tl.sqrt_rn(-2.0 * (tail + f + exponent * 0.693359375))


@triton.jit
def _directions(word):
    """The cosine and sine of 2π word / 2³², by quadrants, as in csrc/cpu/probes.cpp."""
    quadrant = (word + 0x20000000) >> 30  # rounded, modulo 4
    angle = (word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    square = angle * angle
    sine = ((square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1) * square * angle + angle
    cosine = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * (square * square) - 0.5 * square + 1.0
    odd = (quadrant & 1) != 0
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine), tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def _words(key, block, GAUSSIAN: tl.constexpr):
    """The four words of every Philox call that serves a block: 16 calls for signs, 16 for each 64 normal numbers."""
    if GAUSSIAN:
        calls = block * 128 + tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    else:
        calls = block * 16 + tl.arange(0, 16)[None, :]
    return philox(key, calls)


@triton.jit
def _probes(first, second, half, GAUSSIAN: tl.constexpr):
    """Half a block, in two parts, from two words of its calls: their places in the block, and their probe."""
    calls = tl.arange(0, 16)[None, :]
    if GAUSSIAN:
        groups = tl.arange(0, 8)[:, None]
        radius = _radius(first)
        cosine, sine = _directions(second)
        places, z, other_z = groups * 64 + half * 32 + calls, radius * cosine, radius * sine
        other_places = places + 16
    else:
        bits = tl.arange(0, 32)[:, None]
        places = half * 1024 + bits * 16 + calls
        bits = bits.to(tl.uint32)
        z = (((first >> bits) << 31) | 0x3F800000).to(tl.float32, bitcast=True)
        other_z = (((second >> bits) << 31) | 0x3F800000).to(tl.float32, bitcast=True)
        other_places = places + 512
    return places, z, other_places, other_z


@triton.jit
def _perturb_places(out, x, reads, low, high, factor, places, z, DTYPE: tl.constexpr):
    inside = (places >= low) & (places < high)
    value = tl.load(x + places, mask=inside & (reads != 0), other=0.0).to(factor.dtype)
    tl.store(out + places, (value + factor * z.to(factor.dtype)).to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["tensors", "reads"])
def _perturb(
    table, tensors, key, eps: tl.float64, reads, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """out = x + eps z, or eps z where x is not read; the lists are out and x."""
    BLOCK: tl.constexpr = NORMALS if GAUSSIAN else SIGNS
    tensor, begin, end, first, size = _share(table, tensors, BLOCK)
    out, x = _address(table, tensors, tensor, 0, DTYPE), _address(table, tensors, tensor, 1, DTYPE)
    factor = tl.full((1, 1), eps, COMPUTE)
    for block in range(begin, end):
        w0, w1, w2, w3 = _words(key, first // BLOCK + block, GAUSSIAN)
        origin, low, high = _extent(block, first, size, BLOCK)
        for half in range(2):  # not unrolled: the probes of a whole block do not fit in the registers
            a, z, b, other_z = _probes(tl.where(half == 0, w0, w2), tl.where(half == 0, w1, w3), half, GAUSSIAN)
            _perturb_places(out + origin, x + origin, reads, low, high, factor, a, z, DTYPE)
            _perturb_places(out + origin, x + origin, reads, low, high, factor, b, other_z, DTYPE)


@triton.jit
def _products(x, low, high, places, z):
    value = tl.load(x + places, mask=(places >= low) & (places < high), other=0.0)
    return value.to(tl.float64) * z.to(tl.float64)


@triton.jit(do_not_specialize=["tensors"])
def _probe_dot(table, tensors, key, partial, DTYPE: tl.constexpr, GAUSSIAN: tl.constexpr):
    """partial[tile] = Σ z x over the tile."""
    BLOCK: tl.constexpr = NORMALS if GAUSSIAN else SIGNS
    tensor, begin, end, first, size = _share(table, tensors, BLOCK)
    x = _address(table, tensors, tensor, 0, DTYPE)
    sums = tl.zeros((BLOCK // 64, 16), tl.float64)
    for block in range(begin, end):
        w0, w1, w2, w3 = _words(key, first // BLOCK + block, GAUSSIAN)
        origin, low, high = _extent(block, first, size, BLOCK)
        for half in range(2):  # as above
            a, z, b, other_z = _probes(tl.where(half == 0, w0, w2), tl.where(half == 0, w1, w3), half, GAUSSIAN)
            sums += _products(x + origin, low, high, a, z)
            sums += _products(x + origin, low, high, b, other_z)
    tl.store(partial + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=["tensors"])
def _axpy_diff(table, tensors, scale, partial, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """out += scale (a - b), partial[tile] = Σ (a - b)² over the tile; the lists are out, a and b."""
    tensor, begin, end, first, size = _share(table, tensors, SIGNS)
    out = _address(table, tensors, tensor, 0, DTYPE)
    a, b = _address(table, tensors, tensor, 1, DTYPE), _address(table, tensors, tensor, 2, DTYPE)
    factor = tl.load(scale).to(COMPUTE)
    places = tl.arange(0, SIGNS)
    sums = tl.zeros((SIGNS,), tl.float64)
    for block in range(begin, end):
        origin, _, high = _extent(block, first, size, SIGNS)
        inside = places < high
        difference = tl.load(a + origin + places, mask=inside, other=0.0).to(COMPUTE)
        difference -= tl.load(b + origin + places, mask=inside, other=0.0).to(COMPUTE)
        target = tl.load(out + origin + places, mask=inside, other=0.0).to(COMPUTE) + factor * difference
        tl.store(out + origin + places, target.to(DTYPE), mask=inside)
        sums += difference.to(tl.float64) * difference.to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=["tensors"])
def _sum_squares(table, tensors, partial, DTYPE: tl.constexpr):
    """partial[tile] = Σ x² over the tile."""
    tensor, begin, end, first, size = _share(table, tensors, SIGNS)
    x = _address(table, tensors, tensor, 0, DTYPE)
    places = tl.arange(0, SIGNS)
    sums = tl.zeros((SIGNS,), tl.float64)
    for block in range(begin, end):
        origin, _, high = _extent(block, first, size, SIGNS)
        value = tl.load(x + origin + places, mask=places < high, other=0.0).to(tl.float64)
        sums += value * value
    tl.store(partial + tl.program_id(0), tl.sum(sums))


# ---- the table -------------------------------------------------------------------------------------------------------


def table_words(
    sizes: Sequence[int], firsts: Sequence[int], addresses: Sequence[Sequence[int]], block: int
) -> tuple[list[int], int]:
    """The words of a table, column by column, and the number of its tiles.

    Args:
        sizes: the elements of each tensor.
        firsts: the index of each tensor's first element in the probe; its blocks begin at multiples of ``block`` of
            that index.
        addresses: for each list, the address of each tensor.
        block: the elements of a block.
    """
    first_tiles, tiles = [], 0
    for size, first in zip(sizes, firsts, strict=True):
        first_tiles.append(tiles)
        tiles += -(-(first % block + size) // TILE.value) if size else 0
    return [*first_tiles, *firsts, *sizes, *(address for column in addresses for address in column)], tiles


@functools.lru_cache(maxsize=64)
def _kept_table(
    device: torch.device, stream: int, sizes: tuple[int, ...], firsts: tuple[int, ...],
    addresses: tuple[tuple[int, ...], ...], block: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """A table in device memory and its number of tiles; ``stream`` is the one that the copy is ordered in."""
    words, tiles = table_words(sizes, firsts, addresses, block)
    table = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), tiles


def _table_of_graph(
    device: torch.device, sizes: tuple[int, ...], firsts: tuple[int, ...], addresses: tuple[tuple[int, ...], ...],
    block: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """The same for a CUDA graph that is being captured: written anew by kernels whose arguments are the words."""
    words, tiles = table_words(sizes, firsts, addresses, block)
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), words)
    return table, tiles


def _table(device: torch.device, *layout: Any) -> tuple[Tensor, int]:
    if device.type != "cuda":
        return _kept_table(device, 0, *layout)
    if torch.cuda.is_current_stream_capturing():
        return _table_of_graph(device, *layout)
    return _kept_table(device, torch.cuda.current_stream(device).cuda_stream, *layout)


class _Launch(NamedTuple):
    """The tensors of one dtype."""

    dtype: torch.dtype
    tensors: int
    table: Tensor
    tiles: int


def _launches(lists: Sequence[Sequence[Tensor]], block: int, first: int | None = None) -> list[_Launch]:
    """One launch for each dtype in lists of tensors of equal sizes; ``first``: where in a probe the elements begin."""
    device = lists[0][0].device
    groups: dict[torch.dtype, tuple[list[int], list[int]]] = {}
    for i, tensor in enumerate(lists[0]):
        places, firsts = groups.setdefault(tensor.dtype, ([], []))
        places.append(i)
        firsts.append(first or 0)
        first = None if first is None else first + tensor.numel()
    launches = []
    for dtype, (places, firsts) in groups.items():
        sizes = tuple(lists[0][i].numel() for i in places)
        addresses = tuple(tuple(tensors[i].data_ptr() for i in places) for tensors in lists)
        table, tiles = _table(device, sizes, tuple(firsts), addresses, block)
        if tiles:
            launches.append(_Launch(dtype, len(places), table, tiles))
    return launches


def _partials(launches: list[_Launch], device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A place for the sum of every tile, and the places of each launch."""
    counts = [launch.tiles for launch in launches]
    partial = torch.empty(sum(counts), dtype=torch.float64, device=device)
    return partial, partial.split(counts)


# ---- the operators ---------------------------------------------------------------------------------------------------


def _stored(dtype: torch.dtype) -> tl.dtype:
    return tl.dtype(TYPES[dtype])


def _compute(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _block(distribution: str) -> int:
    return (NORMALS if distribution == "gaussian" else SIGNS).value


def _check_list(tensors: Sequence[Tensor], name: str) -> None:
    check(len(tensors) > 0, f"{name}: expected at least one tensor")
    for tensor in tensors:
        check_dtype(tensor, name)
        check(tensor.device == tensors[0].device, f"{name}: expected tensors on one device")


def _check_pairs(first: Sequence[Tensor], second: Sequence[Tensor], names: str) -> None:
    """Raises ValueError unless the lists match tensor by tensor, and are contiguous."""
    check(len(first) == len(second), f"{names}: expected lists of one length, got {len(first)} and {len(second)}")
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        check(
            x.numel() == y.numel() and x.dtype == y.dtype and x.device == y.device,
            f"{names}: expected the same size and dtype on one device, got {x.numel()} {x.dtype} on {x.device} and "
            f"{y.numel()} {y.dtype} on {y.device}",
        )
        check(x.is_contiguous() and y.is_contiguous(), f"{names}: expected contiguous tensors, tensor {i} is not")


def _check_probe(key: Tensor, distribution: str, first: int, device: torch.device) -> None:
    expected = 'distribution: expected "gaussian" or "rademacher"'
    check(distribution in ("gaussian", "rademacher"), f'{expected}, got "{distribution}"')
    check(first >= 0, f"first: expected 0 or more, got {first}")
    check_key(key, device)


def perturb(
    out: list[Tensor], tensors: list[Tensor], key: Tensor, eps: float, distribution: str, first: int = 0
) -> None:
    """See :func:`fastfisher.reference.perturb`.

    Raises:
        ValueError: no tensors, lists that do not match, tensors that are not contiguous, a dtype without kernels, or a
            bad key, distribution or ``first``.
    """
    _check_list(out, "out")
    _check_pairs(out, tensors or out, "out and tensors")
    _check_probe(key, distribution, first, out[0].device)
    with torch.cuda.device_of(out[0]):
        for launch in _launches([out, tensors or out], _block(distribution), first):
            _perturb[(launch.tiles,)](
                launch.table, launch.tensors, key, eps, int(bool(tensors)), DTYPE=_stored(launch.dtype),
                COMPUTE=_compute(launch.dtype), GAUSSIAN=distribution == "gaussian", num_warps=2,
            )  # fmt: skip


def probe_dot(tensors: list[Tensor], key: Tensor, distribution: str, first: int = 0) -> Tensor:
    """See :func:`fastfisher.reference.probe_dot`.

    Raises:
        ValueError: no tensors, a dtype without kernels, or a bad key, distribution or ``first``.
    """
    _check_list(tensors, "tensors")
    _check_probe(key, distribution, first, tensors[0].device)
    dense = [x.contiguous() for x in tensors]
    with torch.cuda.device_of(key):
        launches = _launches([dense], _block(distribution), first)
        partial, parts = _partials(launches, key.device)
        for launch, part in zip(launches, parts, strict=True):
            _probe_dot[(launch.tiles,)](
                launch.table, launch.tensors, key, part, DTYPE=_stored(launch.dtype),
                GAUSSIAN=distribution == "gaussian", num_warps=2,
            )  # fmt: skip
    return partial.sum()


def axpy_diff(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor) -> Tensor:
    """See :func:`fastfisher.reference.axpy_diff`.

    Raises:
        ValueError: no tensors, lists that do not match, tensors that are not contiguous, or a dtype without kernels.
    """
    _check_list(out, "out")
    _check_pairs(out, a, "out and a")
    _check_pairs(out, b, "out and b")
    if scale.numel() != 1 or scale.dtype != torch.float64:
        raise ValueError(f"scale: expected a float64 scalar, got {scale.dtype} of shape {tuple(scale.shape)}")
    with torch.cuda.device_of(out[0]):
        launches = _launches([out, a, b], SIGNS.value)
        partial, parts = _partials(launches, out[0].device)
        for launch, part in zip(launches, parts, strict=True):
            _axpy_diff[(launch.tiles,)](
                launch.table, launch.tensors, scale, part, DTYPE=_stored(launch.dtype), COMPUTE=_compute(launch.dtype),
                num_warps=4,
            )  # fmt: skip
    return partial.sum()


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """See :func:`fastfisher.reference.sum_squares`.

    Raises:
        ValueError: no tensors, or a dtype without kernels.
    """
    _check_list(tensors, "tensors")
    dense = [x.contiguous() for x in tensors]
    with torch.cuda.device_of(dense[0]):
        launches = _launches([dense], SIGNS.value)
        partial, parts = _partials(launches, dense[0].device)
        for launch, part in zip(launches, parts, strict=True):
            _sum_squares[(launch.tiles,)](launch.table, launch.tensors, part, DTYPE=_stored(launch.dtype), num_warps=4)
    return partial.sum()


def _configurations() -> list[Configuration]:
    found = []
    table = {"table": "*i64", "tensors": "i32"}
    for dtype in TYPES:
        kind = _stored(dtype)
        compute = {"DTYPE": kind, "COMPUTE": _compute(dtype)}
        for gaussian in (False, True):
            signature = {**table, "key": "*i64", "eps": "fp64", "reads": "i32"}
            found.append(Configuration(_perturb, signature, {**compute, "GAUSSIAN": gaussian}, num_warps=2))
            signature = {**table, "key": "*i64", "partial": "*fp64"}
            found.append(Configuration(_probe_dot, signature, {"DTYPE": kind, "GAUSSIAN": gaussian}, num_warps=2))
        found.append(Configuration(_axpy_diff, {**table, "scale": "*fp64", "partial": "*fp64"}, compute, num_warps=4))
        found.append(Configuration(_sum_squares, {**table, "partial": "*fp64"}, {"DTYPE": kind}, num_warps=4))
    return found


CONFIGURATIONS = _configurations()
