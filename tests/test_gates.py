"""Every gated function replays: the same values and gradients at θ, and linear in its input from there on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import SlowPathWarning
from fastfisher.gates import record_gates

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x * 1, inplace=True),
    "F.relu inplace by position": lambda x: F.relu(x * 1, True),
    "torch.relu": torch.relu,
    "Tensor.relu_ as a statement": lambda x: (lambda y: (y.relu_(), y)[1])(x * 1),
    "nn.ReLU inplace": lambda x: nn.ReLU(inplace=True)(x * 2),
    "relu channels last": lambda x: F.relu(x.to(memory_format=torch.channels_last)),
    "relu of a transpose": lambda x: F.relu(x.transpose(1, 3)),
    "relu6": lambda x: F.relu6(x * 4),
    "nn.ReLU6": lambda x: nn.ReLU6()(x * 4),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "nn.LeakyReLU inplace": lambda x: nn.LeakyReLU(0.1, inplace=True)(x * 1),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3])),
    "nn.PReLU": nn.PReLU(),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "nn.Hardtanh": lambda x: nn.Hardtanh(-0.5, 0.7)(x),
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp by name": lambda x: torch.clamp(x, max=0.4),
    "clamp with tensors": lambda x: torch.clamp(x, min=torch.zeros(8), max=torch.ones(8)),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max_": lambda x: (x * 1).clamp_max_(0.1),
    "abs": torch.abs,
    "abs()": abs,
    "max": torch.max,
    "max of a dimension": lambda x: x.max(1).values,
    "min of a dimension kept": lambda x: torch.min(x, dim=2, keepdim=True)[0],
    "max of two": lambda x: torch.max(x, x.flip(0)),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum with ties": lambda x: torch.minimum(x, x),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: torch.amin(x, dim=-1, keepdim=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "nn.MaxPool2d": nn.MaxPool2d(3, ceil_mode=True),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 3),
    "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(3),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_replay_is_the_recorded_linear_map(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    function = FUNCTIONS[name]
    x, direction = (torch.randn(4, 3, 8, 8, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    if isinstance(function, nn.Module):
        function.to(dtype)
    if name == "prelu":
        function = lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3], dtype=dtype))  # noqa: E731
    with record_gates() as gates:
        recorded = function(x)
    plain = function(x)
    assert len(gates.entries) == 1 and torch.equal(recorded, plain)
    with gates.replay():
        replayed = function(x)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(replayed, plain, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, x, cotangent)
    (found,) = torch.autograd.grad(replayed, x, cotangent)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    along = []
    with torch.no_grad():
        for t in (0, 1, 2):
            with gates.replay():
                along.append(function(x + t * direction))
    torch.testing.assert_close(along[0] + along[2], 2 * along[1], rtol=100 * tolerance, atol=100 * tolerance)


def test_a_user_s_own_forward_with_dropout_replays() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.5, training=True).relu()
            return torch.maximum(x.flatten(1) @ torch.ones(64, 6), torch.rand(6))

    torch.manual_seed(1)
    model, x = Own(), torch.randn(3, 64)
    with record_gates(model) as gates:
        first = model(x)
    state = torch.get_rng_state()
    with gates.replay():
        assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), first)


@pytest.mark.parametrize("frozen", [True, False])
def test_random_state_comes_back_after_an_exception(frozen: bool) -> None:
    with record_gates(frozen=frozen) as gates:
        torch.rand(3)
    torch.rand(5)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), gates.replay():
        torch.rand(3)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), state)


def test_another_path_is_an_error() -> None:
    x = torch.randn(4)
    with record_gates() as gates:
        x.relu()
        x.abs()
    with pytest.raises(RuntimeError, match="calls abs where the recorded one did not"), gates.replay():
        x.abs()
    with pytest.raises(RuntimeError, match="did not call abs"), gates.replay():
        x.relu()
    with pytest.raises(RuntimeError, match="calls relu where"), gates.replay():
        x.relu(), x.abs(), x.relu()
    with pytest.raises((RuntimeError, ValueError)), gates.replay():
        torch.randn(64).relu()


def test_what_cannot_be_recorded_is_said() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    with (
        pytest.warns(SlowPathWarning, match="module '0' without torch.compile"),
        record_gates(nn.Sequential(compiled)),
    ):
        pass
    with pytest.raises(ValueError, match="TorchScript"), record_gates(torch.jit.script(nn.Linear(2, 2))):
        pass
    with pytest.warns(UserWarning, match="does not reach hardswish"), record_gates():
        F.hardswish(torch.randn(3))


def test_relu_gates_take_a_bit_each() -> None:
    x = torch.randn(64, 1024)
    with record_gates() as gates:
        x.relu()
    bits = gates.entries[0].saved.bits
    assert bits.numel() * bits.element_size() * 8 == x.numel()
