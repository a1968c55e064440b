"""The Triton kernels on lists of tensors against reference.py, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.jit import _normalize_ty

from fastfisher.kernels import lists
from fastfisher.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * (DEVICE == "cuda")
# The interpreter rounds bfloat16 wrongly.
DTYPES = [torch.float32, torch.float64, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
DISTRIBUTIONS = ["gaussian", "rademacher"]
# Nothing, one, one less than a Philox call's share, a block of normal numbers, a group of signs less or more one, a
# tile more one; and tensors that begin anywhere in a group.
SIZES = [3, 0, 1, 127, 512, 2047, 2048, 2049, 8193, 0]
# In the first group, within a group and a call, beyond 32 bits.
FIRST = [0, 5, 2**34 + 777]
KEYS = [torch.tensor([1234, 2**40 + 7]), torch.tensor([-1, -(2**62)])]  # all bits of the seed, high bits of the offset
SCALE = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
# A radius, a sine and their product, each within 2 units in the last place; no normal number exceeds 6.8.
NORMAL_ERROR = 6 * 2.0**-24


def tensors_for(dtype: torch.dtype, seed: int = 1, sizes: list[int] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for n in sizes]


def probe(numel: int, key: Tensor, distribution: str, first: int = 0) -> Tensor:
    out = torch.empty(numel, device=DEVICE)
    lists.perturb([out], [], key.to(DEVICE), 1.0, distribution, first)
    return out


@pytest.mark.parametrize("key", KEYS, ids=["plain", "high bits"])
@pytest.mark.parametrize("first", FIRST)
def test_the_probe_is_that_of_the_reference(first: int, key: Tensor) -> None:
    numel = 20_000
    signs = reference.probe(numel, key, "rademacher", first)
    assert torch.equal(probe(numel, key, "rademacher", first).double().cpu(), signs)
    normal = reference.probe(numel, key, "gaussian", first)
    found = probe(numel, key, "gaussian", first).double().cpu()
    assert float((found - normal).abs().max()) <= NORMAL_ERROR * float(normal.abs().max())
    assert float(normal.abs().max()) > 3.5  # the tails are in the sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturb_and_probe_dot_agree_with_the_reference(distribution: str, dtype: torch.dtype) -> None:
    tensors, key = tensors_for(dtype), KEYS[0].to(DEVICE)
    before = [x.clone() for x in tensors]
    for given in (tensors, []):
        found, expected = ([torch.full_like(x, float("nan")) for x in tensors] for _ in range(2))
        lists.perturb(found, given, key, 0.3, distribution, 5)
        reference.perturb(expected, given, key, 0.3, distribution, 5)
        rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 0.0
        normal = 7 * NORMAL_ERROR if distribution == "gaussian" else 1e-16
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=rounding, atol=2 * rounding + normal)
    dot = lists.probe_dot(tensors, key, distribution, 5)
    exact = reference.probe_dot(tensors, key, distribution, 5)
    size = float(reference.sum_squares(tensors).sqrt())
    assert dot.dtype == torch.float64 and dot.shape == () and dot.device == key.device
    assert abs(float(dot - exact)) <= (7 * NORMAL_ERROR if distribution == "gaussian" else 1e-12) * size
    assert all(map(torch.equal, tensors, before))  # read, not written


def test_a_difference_times_0_is_not_looked_at() -> None:
    out, b = torch.randn(5000), torch.randn(5000)
    a = b + 1
    a[3], a[4500] = float("nan"), float("inf")
    before = out.clone()
    assert lists.axpy_diff([out], [a], [b], torch.zeros((), dtype=torch.float64)) == 0
    assert torch.equal(out, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combines_err_at_most_twice_what_pytorch_errs(dtype: torch.dtype) -> None:
    out, a, b = (tensors_for(dtype, seed) for seed in (1, 2, 3))
    pytorch, found = [x.clone() for x in out], [x.clone() for x in out]
    rounded = reference.axpy_diff(pytorch, a, b, SCALE)  # the differences are rounded to the dtype first
    mine = lists.axpy_diff(found, a, b, SCALE)
    exact, size = [], numpy.longdouble(0)  # 64 bits of mantissa judge float64 too
    for x, y, z in zip(out, a, b, strict=True):
        x, y, z = (numpy.asarray(w.double().cpu()).astype(numpy.longdouble) for w in (x, y, z))
        exact.append(x + numpy.longdouble(0.3) * (y - z))
        size += ((y - z) ** 2).sum()
    for x, y, truth in zip(found, pytorch, exact, strict=True):
        if len(truth) == 0:
            continue
        error, theirs = (float(numpy.abs(z.double().cpu().numpy() - truth).max()) for z in (x, y))
        # Half a unit in the last place is granted: where PyTorch's result happens to be representable, it has no error.
        assert error <= 2 * theirs + torch.finfo(dtype).eps / 2 * float(numpy.abs(truth).max())
    assert mine.dtype == torch.float64 and mine.shape == ()
    error, theirs = (abs(float(numpy.longdouble(float(x)) / size - 1)) for x in (mine, rounded))
    assert error <= 2 * theirs + 1e-13  # squares of rounded differences, or of exact ones; 1e-13 for the summing
    torch.testing.assert_close(lists.sum_squares(a), reference.sum_squares(a), rtol=1e-13, atol=0)


def test_lists_of_several_dtypes_count_their_elements_over_the_whole_list() -> None:
    key = KEYS[0].to(DEVICE)
    dtypes = [torch.float32, torch.float16, torch.float32, torch.float64, torch.float16]
    tensors = [tensors_for(dtype, sizes=[n])[0] for dtype, n in zip(dtypes, [700, 3000, 0, 33, 2100], strict=True)]
    for distribution in DISTRIBUTIONS:
        out, expected = ([torch.empty_like(x) for x in tensors] for _ in range(2))
        lists.perturb(out, tensors, key, 0.5, distribution)
        reference.perturb(expected, tensors, key, 0.5, distribution)
        for x, y in zip(out, expected, strict=True):
            rounding = 2 * torch.finfo(x.dtype).eps
            torch.testing.assert_close(x, y, rtol=rounding, atol=rounding + 7 * NORMAL_ERROR)
        difference = lists.probe_dot(tensors, key, distribution) - reference.probe_dot(tensors, key, distribution)
        assert abs(float(difference)) <= 7 * NORMAL_ERROR * float(reference.sum_squares(tensors).sqrt())
    torch.testing.assert_close(lists.sum_squares(tensors), reference.sum_squares(tensors), rtol=1e-13, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_probe_depends_on_key_and_element_alone(distribution: str) -> None:
    key = KEYS[0].to(DEVICE)
    whole = probe(10_000, key, distribution)
    pieces = [torch.empty(n, device=DEVICE) for n in (1, 2047, 0, 3, 4000, 3949)]
    lists.perturb(pieces, [], key, 1.0, distribution)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(probe(5000, key, distribution, first=5000), whole[5000:])
    for other in ([1, 0], [0, 1], [0, 2**32], [2**32, 0]):
        assert not torch.equal(probe(10_000, key + torch.tensor(other, device=DEVICE), distribution), whole)


def test_the_same_bits_twice() -> None:
    out, a, b = (tensors_for(torch.float32, seed) for seed in (1, 2, 3))
    results = []
    for _ in range(2):
        copies, key = [x.clone() for x in out], KEYS[0].to(DEVICE)
        results.append([
            lists.axpy_diff(copies, a, b, SCALE), lists.sum_squares(a), *copies,
            *(lists.probe_dot(a, key, distribution) for distribution in DISTRIBUTIONS),
        ])  # fmt: skip
    assert all(map(torch.equal, *results))


def test_strided_tensors_are_read_in_their_logical_order() -> None:
    x, key = torch.randn(60, 50, device=DEVICE).t(), KEYS[0].to(DEVICE)
    for distribution in DISTRIBUTIONS:
        dot = lists.probe_dot([x], key, distribution)
        assert torch.equal(dot, lists.probe_dot([x.contiguous()], key, distribution))
    torch.testing.assert_close(lists.sum_squares([x]), reference.sum_squares([x]))
    with pytest.raises(ValueError, match="out and tensors: expected contiguous tensors, tensor 0 is not"):
        lists.perturb([torch.empty_like(x)], [x], key, 1.0, "gaussian")


def test_tensors_that_begin_between_multiples_of_16_bytes() -> None:
    # Whole tiles of aligned tensors are read in 16-byte words; here a list has both, and one tensor of each list.
    for dtype in (torch.float32, torch.float16):
        out, a, b = ([x, x.clone()[1:]] for x in (tensors_for(dtype, seed, [2 * 8192])[0] for seed in (1, 2, 3)))
        a = [a[0].clone()[1:], a[1]]
        out, b = [out[0].clone()[:-1], out[1]], [b[0].clone()[:-1], b[1]]
        expected = [x.clone() for x in out]
        size = reference.axpy_diff([x.double() for x in out], [x.double() for x in a], [x.double() for x in b], SCALE)
        reference.axpy_diff(expected, a, b, SCALE)
        torch.testing.assert_close(lists.axpy_diff(out, a, b, SCALE), size, rtol=1e-6, atol=0)
        for x, y in zip(out, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(lists.sum_squares(a), reference.sum_squares(a), rtol=1e-13, atol=0)


def test_lists_without_elements() -> None:
    empty, key = [torch.empty(0, device=DEVICE)], KEYS[0].to(DEVICE)
    lists.perturb(empty, [], key, 1.0, "gaussian")
    for total in (
        lists.probe_dot(empty, key, "gaussian"),
        lists.sum_squares(empty),
        lists.axpy_diff(empty, empty, empty, SCALE),
    ):
        assert float(total) == 0.0


def test_bad_arguments_are_named_and_nothing_is_written() -> None:
    out, key = [torch.zeros(3, device=DEVICE), torch.zeros(2, device=DEVICE)], KEYS[0].to(DEVICE)
    with pytest.raises(ValueError, match='distribution: expected "gaussian" or "rademacher", got "uniform"'):
        lists.probe_dot(out, key, "uniform")
    with pytest.raises(ValueError, match="out and tensors: expected the same size and dtype"):
        lists.perturb(out, [x.double() + 1 for x in out], key, 1.0, "gaussian")
    with pytest.raises(ValueError, match="lists of one length, got 2 and 1"):
        lists.perturb(out, out[:1], key, 1.0, "gaussian")
    with pytest.raises(ValueError, match="first: expected 0 or more"):
        lists.perturb(out, [], key, 1.0, "gaussian", -1)
    with pytest.raises(ValueError, match="key: expected a contiguous int64 tensor of 2 elements"):
        lists.perturb(out, [], key[:1], 1.0, "gaussian")
    with pytest.raises(ValueError, match="out and b: expected the same size"):
        lists.axpy_diff(out, [x + 1 for x in out], out[::-1], SCALE)
    with pytest.raises(ValueError, match="tensors: expected at least one tensor"):
        lists.sum_squares([])
    with pytest.raises(ValueError, match="tensors: expected float32, float64, bfloat16 or float16"):
        lists.sum_squares([torch.zeros(3, dtype=torch.int64)])
    assert not any(x.any() for x in out)


def test_numbers_of_python_reach_the_kernels_in_float64() -> None:
    # Unless it is annotated, Triton passes a Python number as float32, and its interpreter does not.
    for configuration in lists.CONFIGURATIONS:
        for name, kind in configuration.signature.items():
            if kind == "fp64":
                assert _normalize_ty(configuration.kernel.fn.__annotations__[name]) == "fp64"


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [lists.SIGNS.value, lists.NORMALS.value])
def test_tiles_cover_every_element_once(block: int) -> None:
    generator = numpy.random.default_rng(0)
    sizes = [int(n) for n in generator.choice([0, 1, 100, 2047, 2048, 2049, 8192, 30_000], size=300)]
    firsts = [5 + sum(sizes[:i]) for i in range(len(sizes))]
    words, tiles = lists.layout_words(sizes, firsts, block)
    columns = numpy.array(words).reshape(3, len(sizes))
    first_tiles = columns[0]
    assert columns[1].tolist() == firsts and columns[2].tolist() == sizes
    covered = [0] * len(sizes)
    for tile in range(tiles):
        tensor = int((first_tiles <= tile).sum()) - 1  # what a program does
        begin = (tile - first_tiles[tensor]) * lists.TILE.value - firsts[tensor] % block
        covered[tensor] += max(0, min(sizes[tensor], begin + lists.TILE.value) - max(0, begin))
        assert sizes[tensor] > begin  # no tile is idle
    assert covered == sizes


def test_a_program_finds_its_tensor_among_more_than_it_loads_at_once() -> None:
    tensors = [torch.full((n % 3,), float(n), device=DEVICE) for n in range(150)]
    assert float(lists.sum_squares(tensors)) == sum(n % 3 * n**2 for n in range(150))


def test_tables_are_built_once_for_a_list() -> None:
    lists._addresses.cache_clear()
    lists._layouts.clear()
    tensors = tensors_for(torch.float32)
    for _ in range(3):
        lists.sum_squares(tensors)
    assert lists._addresses.cache_info().misses == len(lists._layouts) == 1
    lists.sum_squares([x.clone() for x in tensors])
    assert lists._addresses.cache_info().misses == 2 and len(lists._layouts) == 1


def test_what_a_graph_writes_is_what_is_copied() -> None:
    words = (0, 1, -1, 2**40 + 1, 2**62, 2**63 - 1)
    device = torch.device(DEVICE)
    assert lists._copied(words, device).tolist() == lists._written(words, device).tolist() == list(words)
