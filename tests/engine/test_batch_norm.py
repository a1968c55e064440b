"""Batch normalisation by our own kernels against PyTorch's in float64, and what it must leave to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.engine.fused.batch_norm import by_batch
from fastfisher.engine.fused.forward import Fused

needs_kernels = pytest.mark.skipif(ops.UNAVAILABLE is not None, reason="needs the compiled kernels")


def derivatives(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Value, first and second derivatives of a function of a batch normalisation."""
    x = x.clone().requires_grad_()
    value = (model(x) ** 3).mean()
    first = torch.autograd.grad(value, [x, *model.parameters()], create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), [x, *model.parameters()])
    return [value, *first, *second]


@needs_kernels
def test_a_module_gives_the_derivatives_and_running_statistics_of_pytorch() -> None:
    ours, theirs = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) + 1
    for _ in range(2):
        with Fused():
            found = derivatives(ours, x)
        for a, b in zip(found, derivatives(theirs, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    with Fused():
        out = ours(x)
    (plain,) = torch.autograd.grad((out**3).mean(), ours.weight)  # without create_graph: by the kernel
    torch.testing.assert_close(plain, found[2], rtol=1e-10, atol=1e-12)


class Norm(nn.Module):
    """A batch normalisation, what follows it, and perhaps a second use of its output."""

    def __init__(self, after: Callable[[Tensor], Tensor], *, twice: bool) -> None:
        super().__init__()
        self.norm, self.after, self.twice = nn.BatchNorm2d(3), after, twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        also = 0.5 * y if self.twice else 0.0
        return self.after(y) + also


AFTER = {
    "relu": F.relu,
    "relu in place": nn.ReLU(inplace=True),
    "changed before the relu": lambda y: (y * 2).relu(),
    "pool after the relu": lambda y: F.interpolate(F.max_pool2d(F.relu(y), 2), scale_factor=2),
    "two relus": lambda y: F.relu(y) + F.relu(y) ** 2,
}


@needs_kernels
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("after", AFTER)
def test_a_relu_after_it_gives_the_derivatives_of_pytorch(after: str, twice: bool) -> None:
    torch.manual_seed(0)
    model = Norm(AFTER[after], twice=twice).double()
    x = torch.randn(4, 3, 6, 8, dtype=torch.float64) + 1
    expected = derivatives(model, x)
    with Fused():
        found = derivatives(model, x)
        value = (model(x) ** 3).mean()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    plain = torch.autograd.grad(value, list(model.parameters()))  # without create_graph: by the kernel
    for a, b in zip(plain, expected[2:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@needs_kernels
def test_threads_do_not_change_the_bits() -> None:
    x, weight = torch.randn(16, 12, 300), torch.randn(12)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            forward = ops.batch_norm(x, weight, None, 1e-5)
            results.append([*forward, *ops.batch_norm_backward(x, None, x, weight, *forward[1:], 1e-5)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    ("why", "x", "options"),
    [
        ("eval mode", torch.randn(4, 3, 5), {"training": False}),
        ("one value per channel", torch.randn(1, 3, 1), {"training": True}),
        ("strides", torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), {"training": True}),
        ("dtypes", torch.randn(4, 3, 5).bfloat16(), {"training": True, "weight": torch.ones(3)}),
    ],
)
def test_what_is_left_to_pytorch(why: str, x: Tensor, options: dict[str, Any]) -> None:
    assert by_batch(F.batch_norm, (x, None, None), options) is None, why
    assert by_batch(F.relu, (x,), {}) is None
