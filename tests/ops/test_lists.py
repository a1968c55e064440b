"""The operators on lists of tensors against reference.py: values, distribution, splits, threads, errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

import fastfisher
from fastfisher import ops
from fastfisher.ops import reference
from tests.support.operators import (
    DISTRIBUTIONS,
    DTYPES,
    KEY,
    NORMAL_ERROR,
    SIGNIFICANCE,
    needs_kernels,
    scalar,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000, 2**16 + 5])
def test_differences_and_sums_agree_with_the_reference(numel: int, dtype: torch.dtype) -> None:
    a, b, out = (torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(3))
    a[::7], a[1::7] = 0, 0
    expected, found = [out.clone(), a.clone()], [out.clone(), a.clone()]
    size = reference.axpy_diff(expected, [a, b], [b, a], scalar(0.3))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ops.axpy_diff(found, [a, b], [b, a], scalar(0.3)), size, rtol=tolerance, atol=0)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ops.sum_squares([a, b]), reference.sum_squares([a, b]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("module", [ops, reference])
def test_a_difference_times_0_is_not_looked_at(module: Any) -> None:
    out, b = torch.randn(40), torch.randn(40)
    a = b + 1
    a[3], a[5] = math.nan, math.inf
    before = out.clone()
    assert module.axpy_diff([out], [a], [b], scalar(0.0)) == 0
    assert torch.equal(out, before)


@needs_kernels
def test_combines_check_everything_before_writing() -> None:
    out = [torch.zeros(3), torch.zeros(4)]
    with pytest.raises(ValueError, match="out and b: expected the same size"):
        ops.axpy_diff(out, [torch.ones(3), torch.ones(4)], [torch.zeros(3), torch.zeros(5)], scalar(1.0))
    with pytest.raises(ValueError, match="scale: expected a float64 scalar"):
        ops.axpy_diff(out, out, out, torch.ones(2, dtype=torch.float64))
    assert not out[0].any()


@pytest.mark.filterwarnings("error::fastfisher.SlowPathWarning")
@needs_kernels
def test_tensors_that_lie_otherwise_in_memory_take_the_fast_path() -> None:
    a, b = (torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    out = a.clone() + 1
    cases = [(out, a, b), (out, a.contiguous(), b), (out.contiguous(), a, b), (out[0, 0].t(), a[0, 0].t(), b[0, 0].t())]
    for target, x, y in cases:
        found, expected = target.clone(), target.clone()
        sizes = [m.axpy_diff([t], [x], [y], scalar(0.3)) for m, t in ((ops, found), (reference, expected))]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*sizes)
        torch.testing.assert_close(ops.sum_squares([x]), reference.sum_squares([x]))
        z, zero = (torch.empty(x.shape) for _ in range(2))
        for m, t in ((ops, z), (reference, zero)):
            m.perturb([t], [x], KEY, 0.3, "rademacher")
        torch.testing.assert_close(z, zero)


@needs_kernels
def test_targets_with_gaps_are_written_by_the_reference_which_says_so() -> None:
    x, out = torch.randn(4, 3), torch.zeros(4, 6)[:, ::2]
    with pytest.warns(
        fastfisher.SlowPathWarning, match="axpy_diff runs its PyTorch reference: a tensor of out has gaps"
    ):
        ops.axpy_diff([out], [x], [torch.zeros_like(x)], scalar(2.0))
    torch.testing.assert_close(out, 2 * x)
    with pytest.warns(fastfisher.SlowPathWarning, match="perturb runs its PyTorch reference: a tensor of out is not"):
        ops.perturb([out], [x], KEY, 0.0, "gaussian")
    torch.testing.assert_close(out, x)


def test_sums_have_the_same_bits_for_any_number_of_threads() -> None:
    x = [torch.randn(3 * 2**16 + 11), torch.randn(7)]
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums.append(float(ops.sum_squares(x)))
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1


# ---- probes ---------------------------------------------------------------------------------------------------------

# Empty, one, broken vectors, more than one tile, more than one task of the reduction.
SIZES = [3, 0, 1, 17, 2050, 2**16 + 5]
FIRST = [0, 5, 2**34 + 777]


def tensors_for(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in SIZES]


def probe(numel: int, key: Tensor, distribution: str, first: int = 0) -> Tensor:
    out = torch.empty(numel)
    ops.perturb([out], [], key, 1.0, distribution, first)
    return out


@pytest.mark.parametrize("first", FIRST)
def test_signs_are_those_of_the_reference(first: int) -> None:
    numel = 2**17 + 3
    assert torch.equal(
        probe(numel, KEY, "rademacher", first).double(), reference.probe(numel, KEY, "rademacher", first)
    )


@pytest.mark.parametrize("first", FIRST)
def test_normal_numbers_are_those_of_the_reference_within_rounding(first: int) -> None:
    expected = reference.probe(2**18 + 3, KEY, "gaussian", first)
    found = probe(len(expected), KEY, "gaussian", first).double()
    assert float((found - expected).abs().max()) <= NORMAL_ERROR * float(expected.abs().max())
    # the tails are in the sample, and right
    assert float(expected.abs().max()) > 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_both_operators_agree_with_the_reference(distribution: str, dtype: torch.dtype) -> None:
    tensors = tensors_for(dtype)
    for given in (tensors, []):
        found, expected = ([torch.full_like(t, float("nan")) for t in tensors] for _ in range(2))
        ops.perturb(found, given, KEY, 0.3, distribution)
        reference.perturb(expected, given, KEY, 0.3, distribution)
        rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 0.0
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=rounding, atol=2 * rounding + 7 * NORMAL_ERROR)
    dot, exact = ops.probe_dot(tensors, KEY, distribution), reference.probe_dot(tensors, KEY, distribution)
    size = float(ops.sum_squares(tensors).sqrt())
    assert abs(float(dot - exact)) <= (7 * NORMAL_ERROR * size if distribution == "gaussian" else 1e-12 * size)
    assert dot.dtype == torch.float64 and dot.shape == ()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_probe_depends_on_key_and_element_alone(distribution: str) -> None:
    whole = probe(10_000, KEY, distribution)
    pieces = [torch.empty(n) for n in (1, 2047, 0, 3, 4000, 3949)]
    ops.perturb(pieces, [], KEY, 1.0, distribution)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(probe(5000, KEY, distribution, first=5000), whole[5000:])
    assert torch.equal(probe(10_000, KEY.clone(), distribution), whole)
    for other in (KEY + torch.tensor([1, 0]), KEY + torch.tensor([0, 1]), KEY + torch.tensor([0, 2**32])):
        assert not torch.equal(probe(10_000, other, distribution), whole)
    x = torch.randn(10_000)
    dot = ops.probe_dot([x], KEY, distribution)
    torch.testing.assert_close(dot, (x.double() * whole.double()).sum(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_bits_for_any_number_of_threads(distribution: str) -> None:
    tensors = tensors_for(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = [torch.empty_like(t) for t in tensors]
            ops.perturb(out, tensors, KEY, 0.3, distribution)
            results.append([*out, ops.probe_dot(tensors, KEY, distribution)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_theta_is_only_read(distribution: str) -> None:
    tensors = tensors_for(torch.float32)
    before = [t.clone() for t in tensors]
    ops.perturb([torch.empty_like(t) for t in tensors], tensors, KEY, 1e-3, distribution)
    ops.probe_dot(tensors, KEY, distribution)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_signs_are_fair_and_independent() -> None:
    z = probe(2**22, KEY, "rademacher")
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    # Bytes of eight neighbours, and of eight signs from the same Philox call (16 apart): 256 equal cells.
    bits = (z > 0).long()
    weights = 2 ** torch.arange(8)
    for octets in (bits.view(-1, 8), bits.view(-1, 8, 16).transpose(1, 2).reshape(-1, 8)):
        counts = torch.bincount((octets * weights).sum(1), minlength=256)
        assert scipy.stats.chisquare(counts.numpy()).pvalue > SIGNIFICANCE


def test_normal_numbers_are_normal_and_independent() -> None:
    z = probe(2**21, KEY, "gaussian").double()
    n = len(z)
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > SIGNIFICANCE
    # Moments against their standard errors: Var(z) = 1, Var(z²) = 2, Var(z³) = 15, Var(z⁴) = 96.
    quantile = scipy.stats.norm.isf(SIGNIFICANCE / 2)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((z**power).mean()) - mean) < quantile * (variance / n) ** 0.5
    # The two of a pair lie 16 apart, those of neighbouring calls 1 apart, those of two groups 64.
    for lag in (1, 16, 32, 64):
        for x in (z, z.square() - 1):
            correlation = float((x[lag:] * x[:-lag]).mean()) / float(x.square().mean())
            assert abs(correlation) < quantile * n**-0.5


@needs_kernels
def test_every_simd_level_gives_the_same_probes() -> None:
    program = (
        "import torch; from tests.ops.test_lists import KEY, probe; from fastfisher.ops import reference\n"
        "print(probe(5000, KEY, 'rademacher').int().tolist())\n"
        "print(float((probe(5000, KEY, 'gaussian') - reference.probe(5000, KEY, 'gaussian')).abs().max()) < 3e-6)\n"
    )
    lines = set()
    for level in ("baseline", "avx2", ""):
        environment = {**os.environ, "FASTFISHER_SIMD_LEVEL": level}
        lines.add(
            subprocess.run(
                [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(lines) == 1 and "False" not in lines.pop()


def test_bad_arguments_are_named_and_nothing_is_written() -> None:
    x = [torch.zeros(3)]
    with pytest.raises(ValueError, match='distribution: expected "gaussian" or "rademacher", got "uniform"'):
        ops.probe_dot(x, KEY, "uniform")
    if ops.UNAVAILABLE is None:
        out = [torch.zeros(3), torch.zeros(2)]
        with pytest.raises(ValueError, match="out and tensors: expected the same size and dtype"):
            ops.perturb(out, [torch.ones(3), torch.ones(4)], KEY, 1.0, "gaussian")
        with pytest.raises(ValueError, match="lists of one length, got 2 and 1"):
            ops.perturb(out, x, KEY, 1.0, "gaussian")
        with pytest.raises(ValueError, match="first: expected 0 or more"):
            ops.perturb(out, [], KEY, 1.0, "gaussian", -1)
        assert not any(t.any() for t in out)
