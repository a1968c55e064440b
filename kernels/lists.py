"""perturb, probe_dot, axpy_diff and sum_squares: operators on a whole list of tensors, one launch for each dtype.

The networks of interest have hundreds of small tensors, and a launch costs more than most of them. So the kernels read
from a table in device memory where each tensor lies, and every program looks up the tensor that its tile belongs to.

The tables. The layout has for each tensor its first tile, the index of its first element, and its size; a second table
has the tensors' addresses in each list. A program loads the first tiles of 128 tensors at once and counts those at or
before its own; a binary search would wait for one load after the other, and a map from tiles to tensors would grow with
the parameters. Layouts are few, one for each list of sizes, and kept for good. Parameters and gradients come back at
the same addresses step after step, so the last tables of addresses are kept: one is built on the host and copied, from
pinned memory and without waiting, only when a list is new. Inside a CUDA graph neither holds: a copy would read host
memory that is gone when the graph is replayed, and gradients have addresses of their own. There the addresses travel as
arguments of kernels (PyTorch's foreach), which the graph keeps, into memory that the graph owns.

The probes. Sixteen Philox calls serve a group of 2,048 signs or 64 normal numbers (reference.probe), and a tensor may
begin anywhere in a group. Tiles therefore follow the groups, not the tensors: the first and the last tile of a tensor
are partly masked, and no element waits for another thread's word. A block is laid out with the calls of a group side by
side, so that a thread that holds one column makes one call for all of it: 32 signs, or 4 normal numbers.

Widths. axpy_diff and sum_squares take whole tiles of tensors that begin at multiples of 16 bytes in 16-byte words, and
others element by element. Where probes are, a thread that held neighbouring elements would have to make four calls.

The sums. Each program adds what it sees in float64 and stores it; the partial sums are then added by PyTorch, in an
order that depends on their number alone. There are no atomics: the bits are the same every time.

Tile sizes and warps are not yet measured.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.checks import TYPES, check, check_dtype, check_key, compute_type
from fastfisher.kernels.compile import Configuration
from fastfisher.kernels.philox import philox

SIGNS, NORMALS = tl.constexpr(2048), tl.constexpr(512)
"""Elements of a block, which a program works on at once: a group of signs, eight groups of normal numbers."""
TILE = tl.constexpr(8192)
"""Elements of a tile, the share of one program: so many that finding the tensor and storing the sum cost little."""


@triton.jit
def _tensor_of(layout, tensors, tile):
    """Which tensor a tile belongs to: the last one whose first tile is not after it."""
    count = 0
    for begin in range(0, tensors, 128):
        lanes = begin + tl.arange(0, 128)
        first_tiles = tl.load(layout + lanes, mask=lanes < tensors, other=0x7FFFFFFFFFFFFFFF)
        count += tl.sum((first_tiles <= tile).to(tl.int32))
    return count - 1


@triton.jit
def _share(layout, tensors, BLOCK: tl.constexpr):
    """This program's tensor, the first block and the end of its tile, the tensor's first element, and its size."""
    tile = tl.program_id(0)
    tensor = _tensor_of(layout, tensors, tile)
    local = tile - tl.load(layout + tensor)
    first = tl.load(layout + tensors + tensor)
    size = tl.load(layout + 2 * tensors + tensor)
    blocks = (first % BLOCK + size + BLOCK - 1) // BLOCK
    begin = local * (TILE // BLOCK)
    return tensor, begin, tl.minimum(begin + TILE // BLOCK, blocks), first, size


@triton.jit
def _address(addresses, tensors, tensor, number, DTYPE: tl.constexpr):
    """Where the tensor lies in the list of that number."""
    return tl.load(addresses + number * tensors + tensor).to(tl.pointer_type(DTYPE))


@triton.jit
def _extent(block, first, size, BLOCK: tl.constexpr):
    """Where a block begins in its tensor, and which of the block's elements the tensor has: from, up to."""
    origin = block * BLOCK - first % BLOCK
    return origin, tl.maximum(-origin, 0).to(tl.int32), tl.minimum(size - origin, BLOCK).to(tl.int32)


@triton.jit
def _radius(word):
    """sqrt(-2 log u) with u = (word + 1/2) / 2³², to 2 units in the last place, as in csrc/cpu/lists.cpp.

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
    """The cosine and sine of 2π word / 2³², by quadrants, as in csrc/cpu/lists.cpp."""
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
    layout, addresses, tensors, key, eps: tl.float64, reads,
    DTYPE: tl.constexpr, COMPUTE: tl.constexpr, GAUSSIAN: tl.constexpr,
):  # fmt: skip
    """out = x + eps z, or eps z where x is not read; the lists are out and x."""
    BLOCK: tl.constexpr = NORMALS if GAUSSIAN else SIGNS
    tensor, begin, end, first, size = _share(layout, tensors, BLOCK)
    out, x = _address(addresses, tensors, tensor, 0, DTYPE), _address(addresses, tensors, tensor, 1, DTYPE)
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
def _probe_dot(layout, addresses, tensors, key, partial, DTYPE: tl.constexpr, GAUSSIAN: tl.constexpr):
    """partial[tile] = Σ z x over the tile."""
    BLOCK: tl.constexpr = NORMALS if GAUSSIAN else SIGNS
    tensor, begin, end, first, size = _share(layout, tensors, BLOCK)
    x = _address(addresses, tensors, tensor, 0, DTYPE)
    sums = tl.zeros((BLOCK // 64, 16), tl.float64)
    for block in range(begin, end):
        w0, w1, w2, w3 = _words(key, first // BLOCK + block, GAUSSIAN)
        origin, low, high = _extent(block, first, size, BLOCK)
        for half in range(2):  # not unrolled, as in _perturb
            a, z, b, other_z = _probes(tl.where(half == 0, w0, w2), tl.where(half == 0, w1, w3), half, GAUSSIAN)
            sums += _products(x + origin, low, high, a, z)
            sums += _products(x + origin, low, high, b, other_z)
    tl.store(partial + tl.program_id(0), tl.sum(sums))


@triton.jit
def _pointer(address, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """The tensor at an address, which for a whole tile is a multiple of 16: then the compiler is told so."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(x, places, high, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(x + places)
    else:
        return tl.load(x + places, mask=places < high, other=0.0)


@triton.jit
def _axpy_diff_tile(
    out, a, b, factor, begin, end, size, WHOLE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr
):
    """One tile of _axpy_diff, whose tensors lie at these addresses: the sum over it."""
    out, a, b = _pointer(out, WHOLE, DTYPE), _pointer(a, WHOLE, DTYPE), _pointer(b, WHOLE, DTYPE)
    sums = tl.zeros((SIGNS,), tl.float64)
    for block in range(begin, end):
        places = block * SIGNS + tl.arange(0, SIGNS)
        difference = _load(a, places, size, WHOLE).to(COMPUTE) - _load(b, places, size, WHOLE).to(COMPUTE)
        difference = tl.where(factor == 0, 0.0, difference)  # a NaN must not come through a factor of 0
        target = (_load(out, places, size, WHOLE).to(COMPUTE) + factor.to(COMPUTE) * difference).to(DTYPE)
        if WHOLE:
            tl.store(out + places, target)
        else:
            tl.store(out + places, target, mask=places < size)
        sums += difference.to(tl.float64) * difference.to(tl.float64)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["tensors"])
def _axpy_diff(layout, addresses, tensors, scale, partial, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """out += scale (a - b), partial[tile] = Σ (a - b)² over the tile; the lists are out, a and b."""
    tensor, begin, end, _, size = _share(layout, tensors, SIGNS)
    out, a = tl.load(addresses + tensor), tl.load(addresses + tensors + tensor)
    b = tl.load(addresses + 2 * tensors + tensor)
    factor = tl.load(scale)
    if (begin * SIGNS + TILE <= size) & ((out | a | b) % 16 == 0):
        total = _axpy_diff_tile(out, a, b, factor, begin, begin + TILE // SIGNS, size, True, DTYPE, COMPUTE)
    else:
        total = _axpy_diff_tile(out, a, b, factor, begin, end, size, False, DTYPE, COMPUTE)
    tl.store(partial + tl.program_id(0), total)


@triton.jit
def _sum_squares_tile(x, begin, end, size, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """One tile of _sum_squares."""
    x = _pointer(x, WHOLE, DTYPE)
    sums = tl.zeros((SIGNS,), tl.float64)
    for block in range(begin, end):
        value = _load(x, block * SIGNS + tl.arange(0, SIGNS), size, WHOLE).to(tl.float64)
        sums += value * value
    return tl.sum(sums)


@triton.jit(do_not_specialize=["tensors"])
def _sum_squares(layout, addresses, tensors, partial, DTYPE: tl.constexpr):
    """partial[tile] = Σ x² over the tile."""
    tensor, begin, end, _, size = _share(layout, tensors, SIGNS)
    x = tl.load(addresses + tensor)
    if (begin * SIGNS + TILE <= size) & (x % 16 == 0):
        total = _sum_squares_tile(x, begin, begin + TILE // SIGNS, size, True, DTYPE)
    else:
        total = _sum_squares_tile(x, begin, end, size, False, DTYPE)
    tl.store(partial + tl.program_id(0), total)


# ---- the tables ------------------------------------------------------------------------------------------------------


def layout_words(sizes: Sequence[int], firsts: Sequence[int], block: int) -> tuple[list[int], int]:
    """The words of a layout, column by column, and the number of its tiles.

    Args:
        sizes: the elements of each tensor.
        firsts: the index of each tensor's first element in the probe; its blocks begin at multiples of ``block`` of
            that index.
        block: the elements of a block.
    """
    tiles = [-(-(first % block + size) // TILE.value) if size else 0 for size, first in zip(sizes, firsts, strict=True)]
    *first_tiles, total = itertools.accumulate(tiles, initial=0)
    return [*first_tiles, *firsts, *sizes], total


def _copied(words: Sequence[int], device: torch.device) -> Tensor:
    """The words in device memory, copied in the order of the current stream."""
    host = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _written(words: Sequence[int], device: torch.device) -> Tensor:
    """The same by kernels whose arguments are the words, for a graph that is being captured."""
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), words)
    return table


_layouts: dict[Any, tuple[Tensor, int]] = {}


def _layout(device: torch.device, capturing: bool, *sizes_firsts_block: Any) -> tuple[Tensor, int]:
    """A layout in device memory, and its number of tiles."""
    key = device, *sizes_firsts_block
    if key not in _layouts:
        words, tiles = layout_words(*sizes_firsts_block)
        if capturing:
            return _written(words, device), tiles
        _layouts[key] = _copied(words, device), tiles
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: from now on, any stream and any graph may read it
    return _layouts[key]


@functools.lru_cache(maxsize=64)
def _addresses(device: torch.device, stream: int, addresses: tuple[int, ...]) -> Tensor:
    """Addresses in device memory, for the stream of that number."""
    return _copied(addresses, device)


class _Launch(NamedTuple):
    """The tensors of one dtype: what every kernel is told of them, and the number of programs."""

    dtype: torch.dtype
    arguments: tuple[Tensor, Tensor, int]
    tiles: int


def _launches(lists: Sequence[Sequence[Tensor]], block: int, first: int | None = None) -> list[_Launch]:
    """One launch for each dtype in lists of tensors of equal sizes; ``first``: where in a probe the elements begin."""
    device = lists[0][0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    dtypes, sizes = [x.dtype for x in lists[0]], [x.numel() for x in lists[0]]
    firsts = [0] * len(sizes) if first is None else list(itertools.accumulate(sizes, initial=first))[:-1]
    pointers = [[x.data_ptr() for x in tensors] for tensors in lists]
    launches = []
    for dtype in dict.fromkeys(dtypes):
        chosen = [other == dtype for other in dtypes]
        some_sizes, some_firsts = (tuple(itertools.compress(column, chosen)) for column in (sizes, firsts))
        layout, tiles = _layout(device, capturing, some_sizes, some_firsts, block)
        some_pointers = tuple(itertools.chain.from_iterable(itertools.compress(column, chosen) for column in pointers))
        addresses = _written(some_pointers, device) if capturing else _addresses(device, stream, some_pointers)
        if tiles:
            launches.append(_Launch(dtype, (layout, addresses, len(some_sizes)), tiles))
    return launches


def _summed(
    lists: Sequence[Sequence[Tensor]], block: int, run: Callable[[_Launch, Tensor], Any], first: int | None = None
) -> Tensor:
    """The sum over all tiles: ``run`` makes a launch, whose programs write theirs to the tensor that it gets."""
    with torch.cuda.device_of(lists[0][0]):
        launches = _launches(lists, block, first)
        counts = [launch.tiles for launch in launches]
        partial = torch.empty(sum(counts), dtype=torch.float64, device=lists[0][0].device)
        for launch, part in zip(launches, partial.split(counts), strict=True):
            run(launch, part)
    return partial.sum()


# ---- the operators ---------------------------------------------------------------------------------------------------


def _stored(dtype: torch.dtype) -> tl.dtype:
    return tl.dtype(TYPES[dtype])


def _block(distribution: str) -> int:
    return (NORMALS if distribution == "gaussian" else SIGNS).value


def _check_list(tensors: Sequence[Tensor], name: str) -> None:
    check(len(tensors) > 0, f"{name}: expected at least one tensor")
    for tensor in {x.dtype: x for x in tensors}.values():
        check_dtype(tensor, name)
    check(len({x.get_device() for x in tensors}) == 1, f"{name}: expected tensors on one device")


def _facts(tensors: Sequence[Tensor]) -> tuple[list[int], list[torch.dtype], list[int]]:
    return [x.numel() for x in tensors], [x.dtype for x in tensors], [x.get_device() for x in tensors]


def _check_pairs(first: Sequence[Tensor], second: Sequence[Tensor], names: str) -> None:
    """Raises ValueError unless the lists match tensor by tensor, and are contiguous.

    It runs at each call, on hundreds of tensors: a message is made only where it is raised.
    """
    check(len(first) == len(second), f"{names}: expected lists of one length, got {len(first)} and {len(second)}")
    if _facts(first) != _facts(second):
        i = next(i for i, x in enumerate(first) if _facts([x]) != _facts([second[i]]))
        got = " and ".join(f"{x.numel()} {x.dtype} on {x.device}" for x in (first[i], second[i]))
        raise ValueError(f"{names}: expected the same size and dtype on one device, got {got}")
    for tensors in (first, second):
        dense = [x.is_contiguous() for x in tensors]
        if not all(dense):
            raise ValueError(f"{names}: expected contiguous tensors, tensor {dense.index(False)} is not")


def _check_probe(key: Tensor, distribution: str, first: int, device: torch.device) -> None:
    expected = 'distribution: expected "gaussian" or "rademacher"'
    check(distribution in ("gaussian", "rademacher"), f'{expected}, got "{distribution}"')
    check(first >= 0, f"first: expected 0 or more, got {first}")
    check_key(key, device)


def perturb(
    out: list[Tensor], tensors: list[Tensor], key: Tensor, eps: float, distribution: str, first: int = 0
) -> None:
    """See :func:`fastfisher.ops.reference.perturb`.

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
                *launch.arguments, key, eps, int(bool(tensors)), DTYPE=_stored(launch.dtype),
                COMPUTE=compute_type(launch.dtype), GAUSSIAN=distribution == "gaussian", num_warps=2,
            )  # fmt: skip


def probe_dot(tensors: list[Tensor], key: Tensor, distribution: str, first: int = 0) -> Tensor:
    """See :func:`fastfisher.ops.reference.probe_dot`.

    Raises:
        ValueError: no tensors, a dtype without kernels, or a bad key, distribution or ``first``.
    """
    _check_list(tensors, "tensors")
    _check_probe(key, distribution, first, tensors[0].device)

    def run(launch: _Launch, part: Tensor) -> None:
        constants = {"DTYPE": _stored(launch.dtype), "GAUSSIAN": distribution == "gaussian"}
        _probe_dot[(launch.tiles,)](*launch.arguments, key, part, **constants, num_warps=2)

    return _summed([[x.contiguous() for x in tensors]], _block(distribution), run, first)


def axpy_diff(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.axpy_diff`.

    Raises:
        ValueError: no tensors, lists that do not match, tensors that are not contiguous, or a dtype without kernels.
    """
    _check_list(out, "out")
    _check_pairs(out, a, "out and a")
    _check_pairs(out, b, "out and b")
    if scale.numel() != 1 or scale.dtype != torch.float64:
        raise ValueError(f"scale: expected a float64 scalar, got {scale.dtype} of shape {tuple(scale.shape)}")

    def run(launch: _Launch, part: Tensor) -> None:
        constants = {"DTYPE": _stored(launch.dtype), "COMPUTE": compute_type(launch.dtype)}
        _axpy_diff[(launch.tiles,)](*launch.arguments, scale, part, **constants, num_warps=4)

    return _summed([out, a, b], SIGNS.value, run)


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """See :func:`fastfisher.ops.reference.sum_squares`.

    Raises:
        ValueError: no tensors, or a dtype without kernels.
    """
    _check_list(tensors, "tensors")

    def run(launch: _Launch, part: Tensor) -> None:
        _sum_squares[(launch.tiles,)](*launch.arguments, part, DTYPE=_stored(launch.dtype), num_warps=4)

    return _summed([[x.contiguous() for x in tensors]], SIGNS.value, run)


def _configurations() -> list[Configuration]:
    found = []
    tables = {"layout": "*i64", "addresses": "*i64", "tensors": "i32"}
    for dtype in TYPES:
        kind = _stored(dtype)
        compute = {"DTYPE": kind, "COMPUTE": compute_type(dtype)}
        for gaussian in (False, True):
            signature = {**tables, "key": "*i64", "eps": "fp64", "reads": "i32"}
            found.append(Configuration(_perturb, signature, {**compute, "GAUSSIAN": gaussian}, num_warps=2))
            signature = {**tables, "key": "*i64", "partial": "*fp64"}
            found.append(Configuration(_probe_dot, signature, {"DTYPE": kind, "GAUSSIAN": gaussian}, num_warps=2))
        found.append(Configuration(_axpy_diff, {**tables, "scale": "*fp64", "partial": "*fp64"}, compute, num_warps=4))
        found.append(Configuration(_sum_squares, {**tables, "partial": "*fp64"}, {"DTYPE": kind}, num_warps=4))
    return found


CONFIGURATIONS = _configurations()
