"""Convolutions in pieces against PyTorch's own, and which convolutions take pieces at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine.fused import convolution
from fastfisher.engine.fused.convolution import in_pieces, saving_memory

# Strides, padding, dilation and groups; a last piece that is shorter than the others; one, two and three dimensions.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": (F.conv1d, (7, 4, 30), (6, 4, 3), {"padding": 1}),
    "2d": (F.conv2d, (7, 4, 9, 10), (6, 4, 3, 3), {}),
    "2d, strided and dilated": (
        F.conv2d,
        (7, 4, 11, 10),
        (6, 4, 3, 2),
        {"stride": (2, 1), "dilation": 2, "padding": 1},
    ),
    "2d, more channels than are few": (F.conv2d, (5, 6, 9, 10), (4, 6, 3, 3), {"padding": 1}),
    "2d, one channel, gaps between windows": (
        F.conv2d,
        (5, 1, 11, 13),
        (3, 1, 2, 2),
        {"stride": 3, "dilation": (2, 1)},
    ),
    "2d, groups": (F.conv2d, (5, 4, 9, 10), (6, 2, 3, 3), {"groups": 2}),
    "3d": (F.conv3d, (5, 2, 5, 6, 7), (3, 2, 3, 3, 3), {"padding": 1}),
}


@pytest.fixture
def two_examples_a_piece(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, bool], None]:
    def set_sizes(x: Tensor, large: bool) -> None:
        monkeypatch.setattr(convolution, "PIECE_BYTES", 2 * x[0].numel() * x.element_size())
        monkeypatch.setattr(convolution, "LARGE_BYTES", 0 if large else 1 << 40)

    return set_sizes


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_those_of_pytorch(
    case: str, bias: bool, large: bool, two_examples_a_piece: Callable[[Tensor, bool], None]
) -> None:
    function, shape, weight_shape, options = CASES[case]
    leaves = [torch.randn(shape, dtype=torch.float64), torch.randn(weight_shape, dtype=torch.float64)]
    leaves += [torch.randn(weight_shape[0], dtype=torch.float64)] if bias else []
    leaves = [leaf.requires_grad_() for leaf in leaves]
    two_examples_a_piece(leaves[0], large)
    out, expected = in_pieces(function, leaves, options), function(*leaves, **options)
    assert out is not None and type(out.grad_fn).__name__ == "_ConvolutionBackward"
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, grad, create_graph=True)
    with saving_memory():
        found = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        differentiable = torch.autograd.grad(out, leaves, grad, create_graph=True)
    for gradients in (found, differentiable):
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    second, expected_second = (
        torch.autograd.grad(sum((g * g).sum() for g in gradients), leaves[:2]) for gradients in (differentiable, wanted)
    )
    for a, b in zip(second, expected_second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


def test_gradients_that_nobody_wants_are_not_made(two_examples_a_piece: Callable[[Tensor, bool], None]) -> None:
    x, weight = torch.randn(6, 2, 8, 8), torch.randn(3, 2, 3, 3)
    two_examples_a_piece(x, True)
    only_weight = in_pieces(F.conv2d, (x, weight.requires_grad_()), {})
    only_x = in_pieces(F.conv2d, (x.clone().requires_grad_(), weight.detach()), {})
    assert only_weight is not None and only_x is not None
    assert torch.equal(only_weight, only_x)
    only_weight.sum().backward()
    only_x.sum().backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_an_input_gradient_that_the_backward_is_not_for_is_not_made(
    large: bool, bias: bool, two_examples_a_piece: Callable[[Tensor, bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in PyTorch's own node: the input may require a gradient that this backward does not take."""
    x, weight = torch.randn(6, 5, 8, 8, requires_grad=True), torch.randn(3, 5, 3, 3, requires_grad=True)
    leaves = [x, weight, torch.randn(3, requires_grad=True)] if bias else [x, weight]
    two_examples_a_piece(x, large)
    scaled = [leaf * 1 for leaf in leaves]
    made: set[int] = set()
    backward = torch.ops.aten.convolution_backward

    def note(*args: Any) -> Any:
        made.update(place for place, wanted in enumerate(args[-1]) if wanted)
        return backward(*args)

    monkeypatch.setattr(convolution.torch.ops.aten, "convolution_backward", note)
    for tensors in (leaves, scaled):
        for wanted in ([0], [1], [0, 1], [len(leaves) - 1], list(range(len(leaves)))):
            chosen = [tensors[place] for place in wanted]
            for take in (
                lambda out, chosen: torch.autograd.grad(out.sum(), chosen, retain_graph=True),
                lambda out, chosen: torch.autograd.grad(out.sum(), chosen, create_graph=True),
                lambda out, chosen: out.sum().backward(inputs=chosen, retain_graph=True),
            ):
                out = in_pieces(F.conv2d, tensors, {})
                assert out is not None
                made.clear()
                with saving_memory():
                    take(out, chosen)
                assert (0 in made) == (0 in wanted) and set(wanted) <= made


@pytest.mark.parametrize(
    ("why", "shape", "options"),
    [
        ("small", (7, 4, 9, 10), {}),
        ("one example", (1, 4, 900, 1000), {}),
        ("no batch", (4, 900, 1000), {}),
        ("padding by name", (64, 4, 150, 200), {"padding": "same"}),
    ],
)
def test_what_is_left_to_pytorch(why: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    weight = torch.randn(4, 4, 3, 3)
    assert in_pieces(F.conv2d, (torch.zeros(shape), weight), options) is None, why
    large = torch.zeros(64, 4, 150, 200)
    assert in_pieces(F.conv2d, (large.to(memory_format=torch.channels_last), weight), {}) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert in_pieces(F.conv2d, (large, weight), {}) is None
    assert in_pieces(F.relu, (large,), {}) is None


@pytest.mark.parametrize("saving", [True, False])
@pytest.mark.parametrize(("channels", "by_fold"), [(1, True), (3, True), (4, True), (5, False)])
def test_the_gradient_in_few_channels_is_a_fold(
    channels: int, by_fold: bool, saving: bool, monkeypatch: pytest.MonkeyPatch,
    two_examples_a_piece: Callable[[Tensor, bool], None],
) -> None:  # fmt: skip
    """It errs at most twice as much as PyTorch's own does; with other channels PyTorch's own it is."""
    x, weight = torch.randn(7, channels, 20, 21), torch.randn(16, channels, 4, 4) / 8
    two_examples_a_piece(x, False)
    folds: list[int] = []
    fold = F.fold
    monkeypatch.setattr(F, "fold", lambda *args: folds.append(1) or fold(*args))

    def gradient(dtype: torch.dtype, ours: bool) -> Tensor:
        leaf, options = x.to(dtype).requires_grad_(), {"stride": 2, "padding": 1}
        out = in_pieces(F.conv2d, (leaf, weight.to(dtype)), options) if ours else None
        out = F.conv2d(leaf, weight.to(dtype), **options) if out is None else out
        with saving_memory() if saving else contextlib.nullcontext():
            (found,) = torch.autograd.grad(out.square().sum(), leaf)
        return found

    exact = gradient(torch.float64, False)
    found, pytorch = (gradient(torch.float32, ours).double() for ours in (True, False))
    assert bool(folds) == by_fold
    unit = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (pytorch - exact).abs().max() + unit
