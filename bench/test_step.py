"""A training step with the penalty against a plain one: SGD with momentum, 128 images of 3x32x32, float32.

In units of a forward F and a backward B = 2F, a plain step is F + B = 3. Floors: finite differences that share the
forward 2F + 3B = 8/3 of a step; mixed and GP 2F + 2B = 2; every tenth step (9·3 + 8)/30 = 1.17; double backprop 3.0,
if the second backward costs what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.conftest import Bar
from bench.networks import critic, network
from fastfisher import FisherPenalty, GradientPenalty

# name: (options of FisherPenalty, bar without BatchNorm, bar with it)
STEPS: dict[str, tuple[dict[str, Any], float | None, float | None]] = {
    "finite difference": ({"every": 1}, 2.8, 2.7),
    "finite difference, free gates": ({"every": 1, "gates": "free"}, 2.8, 2.7),
    "finite difference, central": ({"every": 1, "difference": "central"}, None, None),
    "finite difference, mixed": ({"every": 1, "mixed": True}, 2.1, None),
    "finite difference, half of the batch": ({"every": 1, "examples": 64}, None, None),
    "GP, finite difference": ({"every": 1, "labels": "true"}, 2.1, None),
    "GP_x, finite difference": ({"every": 1, "labels": "true", "wrt": "inputs"}, None, None),
    "double backprop": ({"every": 1, "method": "double_backprop"}, 3.3, None),
}


def steps(name: str, options: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A plain step and one with the penalty, of the same network and optimiser."""
    torch.manual_seed(0)
    model = network(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    penalty = FisherPenalty(model, 0.01, **options)

    def plain() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def penalised() -> None:
        optimizer.zero_grad()
        penalty.backward(x, y)
        optimizer.step()

    return plain, penalised


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["SimpleCNN", "VGG-11", "ResNet + BN"])
def test_step(name: str, step: str, compare: Any) -> None:
    options, bar, bar_with_norm = STEPS[step]
    plain, penalised = steps(name, options)
    promised = bar_with_norm if name == "ResNet + BN" else bar
    rounds = 5 if name == "VGG-11" else 9
    compare(
        "one training step",
        f"{name}, {step}",
        penalised,
        {"a plain step": (plain, Bar(promised, False))},
        rounds=rounds,
    )


@pytest.mark.parametrize("name", ["SimpleCNN", "VGG-11", "ResNet + BN"])
def test_every_tenth_step(name: str, compare: Any) -> None:
    plain, penalised = steps(name, {"every": 10})
    # Ten steps each: one that recomputes the penalty and nine that reuse it.
    compare(
        "one training step",
        f"{name}, finite difference, every 10 (average)",
        penalised,
        {"a plain step": (plain, Bar(1.2, False))},
        rounds=3 if name == "VGG-11" else 5,
        repeat=10,
    )


@pytest.mark.parametrize("by_hand", [False, True], ids=["GradientPenalty", "double backprop by hand"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_gradient_of_a_critic_in_its_inputs(activation: type[nn.Module], by_hand: bool, compare: Any) -> None:
    """GP_x of a network with one output, (‖∂D/∂x‖ − 1)² as in WGAN-GP; the mean output is trained."""
    torch.manual_seed(0)
    model = critic(activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(128, 3, 32, 32)
    penalty = GradientPenalty(model, lambda out, _: out[:, 0], 0.01, wrt="inputs", of=lambda n: (n - 1) ** 2)

    def plain() -> None:
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()

    def ours() -> None:
        optimizer.zero_grad()
        penalty.backward(x)
        optimizer.step()

    def theirs() -> None:
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        (g,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        (out.mean() + 0.01 * (g.flatten(1).norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()

    compare(
        "one training step",
        f"critic with {activation.__name__}, GP_x, {'double backprop by hand' if by_hand else 'finite difference'}",
        theirs if by_hand else ours,
        {"a plain step": (plain, Bar(None if by_hand else 2.2, False))},
        rounds=9,
    )
