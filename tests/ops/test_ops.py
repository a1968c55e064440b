"""What every operator is held to: opcheck, one random stream, the same bits for any threads, every SIMD level."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastfisher import ops
from fastfisher.ops import reference
from tests.support.operators import (
    KEY,
    OPERATORS,
    cases,
    needs_kernels,
)


@needs_kernels
def test_every_schema_has_a_function() -> None:
    compiled = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastfisher::")
    }
    assert compiled == set(OPERATORS) == set(cases())


@needs_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    for arguments in cases()[name]:
        if name in (
            "sample_cross_entropy",
            "sample_binary_cross_entropy",
            "softmax_hessian_product",
        ):  # those with a derivative
            arguments = tree_map_only(Tensor, lambda x: x.requires_grad_(x.is_floating_point()), arguments)
        torch.library.opcheck(getattr(torch.ops.fastfisher, name).default, arguments)


@needs_kernels
def test_philox_words_are_equal_in_cpp_and_pytorch() -> None:
    from fastfisher import _native

    for seed, offset in [(0, 0), (1, 2), (2**63 + 5, 2**33 + 1)]:
        for element in [0, 1, 2**31, 2**32 + 3, 2**40]:
            key = torch.tensor([seed - (seed >> 63 << 64), offset])
            words = reference.philox(key, torch.tensor(element)).tolist()
            assert list(_native.philox(seed, offset, element)) == words
    # Salmon et al.'s known answer for counter and key zero.
    assert reference.philox(torch.tensor([0, 0]), torch.tensor(0)).tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


def test_norms_and_cotangents_have_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    a, d, logits = torch.randn(9, 8, 8, 8), torch.randn(9, 40, 8, 8), torch.randn(500, 300)
    args = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([
                *ops.grad_sqnorm_conv(a, d, *args, True),
                *ops.grad_sqnorm_conv(a, d, *args, False),
                ops.grad_sqnorm_linear(a.flatten(2), d.flatten(2)[:, :8], True),
                *ops.channel_products(a.flatten(2), a.flatten(2), a[0, :, 0, 0]),
                ops.rademacher_cotangent(logits, KEY, 1.0),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_simd_level_gives_the_same_labels(level: str) -> None:
    program = (
        "import torch; from fastfisher import ops, _native; from tests.support.operators import KEY, logits_for\n"
        "print(_native.simd_level())\n"
        "for c in (10, 1000, 5000):\n"
        "    nll, labels, d = ops.sample_cross_entropy(logits_for(c, torch.float32), KEY, 1.0)\n"
        "    x = logits_for(c, torch.float64); e = (x.softmax(1) - torch.nn.functional.one_hot(labels, c))\n"
        "    print(labels.tolist(), bool((d - e).abs().max() < 3e-7))\n"
        "x = logits_for(1000, torch.float32); nll, labels, d = ops.sample_binary_cross_entropy(x, KEY, 1.0)\n"
        "e = x.double().sigmoid() - labels\n"
        "print(labels.sum(1).tolist(), bool((d - e).abs().max() < 3e-7))\n"
        "y = torch.arange(-40., 45.); out, bits = ops.gate_relu(y)\n"
        "assert torch.equal(out, y.relu()) and torch.equal(ops.gate_apply(y, bits), out)\n"
        "x = torch.randn(3, 40, 41); pool = (2, 2, 2, 2, False)\n"
        "from fastfisher.ops import reference\n"
        "assert all(map(torch.equal, ops.gate_max_pool(x, *pool), reference.gate_max_pool(x, *pool)))\n"
    )
    lines = {}
    for chosen in (level, ""):
        environment = {**os.environ, "FASTFISHER_SIMD_LEVEL": chosen}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        lines[chosen] = run.stdout.splitlines()
    assert lines[level][0] in (level, "baseline")
    assert lines[level][1:] == lines[""][1:]
    assert "False" not in run.stdout


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_simd_level_has_the_same_norms(level: str) -> None:
    program = (
        "import torch; from fastfisher import ops; from fastfisher.ops import reference; torch.manual_seed(0)\n"
        "for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):\n"
        "    a, d = torch.randn(3, 7, 9, 8, dtype=dtype), torch.randn(3, 37, 9, 8, dtype=dtype)\n"
        "    args = ([3, 3], [1, 1], [1, 1], [1, 1], 1)\n"
        "    for gram in (False, True):\n"
        "        found, expected = (m.grad_sqnorm_conv(a, d, *args, gram) for m in (ops, reference))\n"
        "        for x, y in zip(found, expected):\n"
        "            torch.testing.assert_close(x, y, rtol=rtol, atol=0)\n"
        "    x, key = torch.randn(4, 1500, dtype=dtype), torch.tensor([1, 2])\n"
        "    found, expected = (m.rademacher_cotangent(x, key, 1.0) for m in (ops, reference))\n"
        "    torch.testing.assert_close(found, expected)\n"
    )
    environment = {**os.environ, "FASTFISHER_SIMD_LEVEL": level}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
