"""ReLU and max-pool by gates against PyTorch's own: the same values and gradients, to the last bit, however used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fastfisher
from fastfisher.engine.fused import forward
from fastfisher.engine.fused.forward import Fused
from fastfisher.engine.gates import record_gates

Network = Callable[[Tensor], Tensor]

# Each reason why the gradient of a ReLU before a max-pool may not be what the max-pool sent.
USES: dict[str, Network] = {
    "pool alone": lambda x: F.max_pool2d(x.relu(), 2),
    "pool of a product": lambda x: F.max_pool2d(x.relu() * 2, 2),
    "output used before": lambda x: (y := x.relu()).square().sum() + F.max_pool2d(y, 2).sum(),
    "output used after": lambda x: F.max_pool2d(y := x.relu(), 2).sum() + y.square().sum(),
    "two pools": lambda x: F.max_pool2d(y := x.relu(), 2).sum() + F.max_pool2d(y, 3).square().sum(),
    "three uses": lambda x: (y := x.relu()).sum() + F.max_pool2d(y, 2).square().sum() + F.max_pool2d(y, 4).sum(),
    "pool changed in place": lambda x: F.max_pool2d(x.relu(), 2).mul_(3),
    "relu in place": lambda x: F.max_pool2d(F.relu(x * 1, inplace=True), 2),
    "relu in place of a view": lambda x: F.max_pool2d(F.relu((x * 1)[:, 1:], inplace=True), 2),
    "relu of a part": lambda x: F.max_pool2d(x[:, :, 1:, ::2].relu(), 2),
    "relu of relu": lambda x: F.max_pool2d(x.relu().relu(), 2),
    "overlapping pool": lambda x: F.max_pool2d(x.relu(), 3, 2),
    "padded pool": lambda x: F.max_pool2d(x.relu(), 3, 2, 1),
    "pool with indices": lambda x: F.max_pool2d(x.relu(), 2, return_indices=True)[0],
    "adaptive pool": lambda x: F.adaptive_max_pool2d(x.relu(), 3),
    # A gradient passes a leaky ReLU's closed gates, so a pool after it gates nothing. Multiples of 1/4 add up exactly.
    "leaky": lambda x: F.leaky_relu(x, 0.25),
    "pool of leaky": lambda x: F.max_pool2d(F.leaky_relu(x, 0.25), 2),
    "leaky in place": lambda x: F.max_pool2d(F.leaky_relu(x * 1, 0.25, inplace=True), 2),
    "leaky in place by its name": lambda x: torch.nn.functional.leaky_relu_(x * 1, 0.5) * 2,
    "leaky in place of a part": lambda x: F.leaky_relu((x * 1)[:, :, 1:, ::2], 0.25, True),
    "leaky by keyword": lambda x: F.leaky_relu(input=x, negative_slope=2.0).relu(),
    "leaky of leaky, then relu": lambda x: F.max_pool2d(F.leaky_relu(F.leaky_relu(x, -0.5), 0.25).relu(), 2),
    "leaky of slope 0": lambda x: F.leaky_relu(x, 0.0),
    "pool of a plane": lambda x: F.max_pool2d(x[0].relu(), (2, 1), (1, 3)),
}


def value_and_gradients(network: Network, x: Tensor, hook: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """The output's weighted sum, its gradient, and the gradient of that gradient's weighted sum."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = network(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view(out.shape)
    value = (out * out * weights).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.linspace(1, 2, x.numel()).view(x.shape)).square().sum(), x)
    return value.detach(), gradient.detach(), second


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients_are_those_of_pytorch(use: str, layout: torch.memory_format) -> None:
    x = torch.randint(-4, 5, (3, 4, 8, 10)).float().to(memory_format=layout)  # small integers: sums are exact
    expected = value_and_gradients(USES[use], x)

    def fused(x: Tensor) -> Tensor:
        with Fused():
            return USES[use](x)

    for found, wanted in zip(value_and_gradients(fused, x), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("use", USES)
def test_a_replay_is_the_recorded_forward_where_it_was_recorded(use: str) -> None:
    x = torch.randint(-4, 5, (3, 4, 8, 10)).float()
    with record_gates() as gates:
        USES[use](x.clone())

    def replayed(x: Tensor) -> Tensor:
        with gates.replay():
            return USES[use](x)

    for found, wanted in zip(value_and_gradients(replayed, x), value_and_gradients(USES[use], x), strict=True):
        assert torch.equal(found, wanted)


def test_hooks_between_relu_and_pool_change_the_gradient() -> None:
    def hooked(x: Tensor) -> Tensor:
        y = x.relu()
        out = F.max_pool2d(y, 2)
        y.register_hook(lambda grad: grad + 1)
        return out

    def fused(x: Tensor) -> Tensor:
        with Fused():
            return hooked(x)

    x = torch.randint(-4, 5, (2, 3, 6, 6)).float()
    expected = value_and_gradients(hooked, x)
    for found, wanted in zip(value_and_gradients(fused, x), expected, strict=True):
        assert torch.equal(found, wanted)


def test_second_derivatives_by_gradgradcheck() -> None:
    # Distinct multiples of 1/16 away from 0: no kink within the steps of the check.
    x = ((torch.randperm(2 * 2 * 4 * 6) - 47.5) / 16).view(2, 2, 4, 6).double().requires_grad_()

    def fused(x: Tensor) -> Tensor:
        with Fused():
            return F.max_pool2d((x + x * x / 20).relu(), 2)

    assert torch.autograd.gradcheck(fused, x)
    assert torch.autograd.gradgradcheck(fused, x)


def test_an_output_may_be_changed_in_place() -> None:
    x = torch.randn(2, 3, 8, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(memory_format=layout).requires_grad_()
        with Fused():  # PyTorch's own ReLU keeps its output and would refuse
            changed = F.max_pool2d(leaf.relu().sub_(0.5), 2)
        expected = F.max_pool2d(leaf.relu() - 0.5, 2)
        assert torch.equal(changed, expected)
        gradients = [torch.autograd.grad(out.square().sum(), leaf)[0] for out in (changed, expected)]
        assert torch.equal(*gradients)


def test_a_second_backward_through_a_kept_graph_is_the_first() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with Fused():
        y = F.max_pool2d(x.relu(), 2)
    (first,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(first, second)


def test_small_tensors_go_through_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's share of a call would be more than the kernels save."""
    monkeypatch.setattr(forward, "FUSED_ELEMENTS", 100)
    for count, name in ((99, "ReluBackward0"), (100, "_GateBackward")):
        with Fused() as fused:
            out = torch.randn(count, requires_grad=True).relu()
        assert out.grad_fn is not None and out.grad_fn.name() == name
        assert fused.met_large == (count == 100)


def test_a_forward_without_large_tensors_is_not_watched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "FUSED_ELEMENTS", 100)
    entered: list[int] = []
    monkeypatch.setattr(Fused, "__enter__", lambda self: entered.append(1) or TorchFunctionMode.__enter__(self))
    penalty = fastfisher.FisherPenalty(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), alpha=0.0)
    for rows, times in ((10, 1), (10, 1), (30, 2), (30, 3), (10, 3)):  # the ReLU takes 5 elements a row
        penalty.backward(torch.randn(rows, 4), torch.arange(rows) % 3)
        assert len(entered) == times


def test_what_a_leaky_relu_keeps_is_bits() -> None:
    x = torch.randn(1024, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t), record_gates() as gates:
        F.leaky_relu(x, 0.2)
    assert [t.untyped_storage().nbytes() for t in kept] == [x.numel() // 8]
    assert gates.entries[0].saved.bits.data_ptr() == kept[0].data_ptr()


def test_what_is_kept_is_bits_and_indices() -> None:
    """Of a ReLU and a pool of 2x2: 1/8 byte and 4/4 bytes an element, not 4 and 8/4 (the input of a pool is what the
    ReLU keeps)."""
    x = torch.randn(4, 3, 16, 16, requires_grad=True)

    def bytes_kept(context: Any) -> int:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t), context:
            F.max_pool2d(x.relu(), 2)
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    assert bytes_kept(contextlib.nullcontext()) == x.numel() * 6
    assert bytes_kept(Fused()) == x.numel() * 9 // 8
