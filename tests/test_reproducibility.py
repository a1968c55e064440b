"""What has the same bits under which change: the rows of docs/reproducibility.md that no other test has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastfisher
from fastfisher import FisherPenalty, ops
from fastfisher.engine.layers import base
from tests.support.networks import SmallResNet
from tests.support.operators import KEY, OPERATORS, cases, needs_kernels

ROOT = Path(__file__).parent.parent


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; it is as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LOGITS, PLANES, SEQUENCES, IMAGES = normal(600, 300), normal(40, 40, 41), normal(30, 50, 33), normal(30, 6, 20, 20)
CONVOLUTION = ([3, 3], [1, 1], [1, 1], [1, 1], 1)


@needs_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_the_same_bits_for_any_number_of_threads(name: str, threads: Callable[[int], None]) -> None:
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        results = [(getattr(ops, name)(*arguments), arguments) for arguments in cases()[name]]  # some write to these
        found.append([x for x in tree_leaves(results) if isinstance(x, Tensor)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


BY_EXAMPLE: dict[str, Callable[[int], Any]] = {
    "sample_cross_entropy": lambda n: ops.sample_cross_entropy(LOGITS[:n], KEY, 1.0),
    "sample_binary_cross_entropy": lambda n: ops.sample_binary_cross_entropy(LOGITS[:n], KEY, 1.0, 5),
    "rademacher_cotangent": lambda n: [ops.rademacher_cotangent(LOGITS[:n], KEY, 1.0)],
    "gate_max_pool": lambda n: ops.gate_max_pool(PLANES[:n], 2, 2, 2, 2, False),
    "grad_sqnorm_linear": lambda n: [ops.grad_sqnorm_linear(SEQUENCES[:n], SEQUENCES[:n], g) for g in (False, True)],
    "grad_sqnorm_conv": lambda n: ops.grad_sqnorm_conv(IMAGES[:n], IMAGES[:n], *CONVOLUTION, True),
    "channel_products": lambda n: ops.channel_products(SEQUENCES[:n], SEQUENCES[:n], SEQUENCES[0, :, 0]),
}


@needs_kernels
@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_an_example_has_the_same_bits_whatever_comes_after_it(name: str) -> None:
    whole = BY_EXAMPLE[name](30)
    for n in (1, 7, 29):
        for part, of in zip(BY_EXAMPLE[name](n), whole, strict=True):
            assert torch.equal(part, of[:n])


X, Y = normal(12, 3, 9, 9), torch.arange(12) % 10


@pytest.mark.parametrize(
    "options",
    [{}, {"gates": "free"}, {"mixed": True}, {"method": "double_backprop"}, {"labels": "rademacher"}],
    ids=str,
)
def test_the_same_key_gives_a_step_the_same_bits(options: dict[str, Any], one_thread: None) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(SmallResNet(), nn.Dropout(0.3))
        penalty = FisherPenalty(model, 0.1, every=1, generator=torch.Generator().manual_seed(seed), **options)
        penalty.backward(X, Y)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.rand(3)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_step_has_other_last_bits_with_other_threads(threads: Callable[[int], None]) -> None:
    """PyTorch's convolutions split their sums by thread: what is promised is the value up to rounding."""
    found = []
    for count in (1, 3):
        threads(count)
        torch.manual_seed(0)
        model = SmallResNet().double()
        penalty = FisherPenalty(model, 0.1, every=1, generator=torch.Generator().manual_seed(1))
        penalty.backward(X.double(), Y)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    # A finite difference with a step of 1e-7 turns the rounding of 1e-16 into 1e-9.
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7 * float(found[0].abs().max()))


def test_the_size_of_a_chunk_changes_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    torch.manual_seed(0)
    model = SmallResNet().double()
    found = []
    for elements in (1, 1 << 10, 1 << 22):
        monkeypatch.setattr(base, "CHUNK_ELEMENTS", elements)
        covariance = fastfisher.gradient_covariance(model, (X.double(), Y))
        found.append(torch.tensor([covariance.trace, *covariance.eigenvalues], dtype=torch.float64))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12 * float(found[0].max()))


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reproducibility.md").read_text())
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
