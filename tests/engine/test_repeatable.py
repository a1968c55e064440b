"""A forward that cannot be repeated is refused, by name, before anything has changed; any other one is not."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FisherPenalty, penalty
from tests.support.networks import SmallResNet, flat, relative_error

X, Y = torch.randn(16, 20, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


class Noisy(nn.Module):
    """Multiplies its input by what ``draw`` gives."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw()


class Remembering(nn.Module):
    """Keeps a state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRUCell(8, 8), None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x, self.state)
        self.state = out.detach()
        return out


def counter() -> Callable[[], float]:
    seen = collections.deque([0.0])

    def draw() -> float:
        seen.append(seen[-1] + 1.0)
        return seen[-1]

    return draw


OWN = torch.Generator().manual_seed(1)
UNREPEATABLE: dict[str, Callable[[], nn.Module]] = {
    "random": lambda: Noisy(random.random),
    "NumPy": lambda: Noisy(lambda: numpy.random.default_rng().uniform(1, 2)),
    "a generator of its own": lambda: Noisy(lambda: torch.rand(8, generator=OWN)),
    "a counter": lambda: Noisy(counter()),
    "a state": Remembering,
}


def around(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Sequential(nn.Identity(), middle), nn.Linear(8, 4))


@pytest.mark.parametrize("gates", ["frozen", "free"])
@pytest.mark.parametrize("name", UNREPEATABLE)
def test_what_cannot_be_repeated_is_refused(name: str, gates: Any) -> None:
    model = around(UNREPEATABLE[name]())
    regularizer = FisherPenalty(model, 0.1, every=1, gates=gates)
    state = torch.get_rng_state()
    for _ in range(2):  # not only the first time
        # Where what was detached is replayed, the state is that of the first call from then on.
        where = "its logits" if (name, gates) == ("a state", "frozen") else r"the output of module '2\.1"
        with pytest.raises(ValueError, match=rf"model: its forward cannot be repeated.*{where}"):
            regularizer.backward(X, Y)
    assert regularizer.steps == 0 and regularizer.value is None
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="its forward cannot be repeated"):
        penalty(model, X, method="finite_difference", gates=gates)
    FisherPenalty(model, 0.1, every=1, gates=gates, method="double_backprop").backward(X, Y)  # the way out
    FisherPenalty(model, 0.1, every=1, gates=gates, verify=False).backward(X, Y)  # at one's own risk


def test_another_path_is_named() -> None:
    class Coin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if random.random() < 0.5:
                    x = layer(x).relu()
            return x

    random.seed(0)
    with pytest.raises(ValueError, match=r"'layers\.\d', which was called in place of 'layers\.\d'"):
        FisherPenalty(Coin(), 0.1, every=1).backward(X, Y)


def test_once_for_each_kind_of_batch() -> None:
    calls = []
    model = around(nn.Dropout(0.5))
    model.register_forward_hook(lambda *_: calls.append(1))
    regularizer = FisherPenalty(model, 0.1, every=1)
    for x, expected in ((X, 7), (X, 2), (X[:8], 7), (X[:8], 2), (X, 2)):
        calls.clear()
        regularizer.backward(x, Y[: len(x)])
        assert len(calls) == expected
    model.eval()
    calls.clear()
    regularizer.backward(X, Y)
    assert len(calls) == 7, "other modes may take other paths"
    other = FisherPenalty(model, 0.1, every=1, verify=False)
    calls.clear()
    other.backward(X[:5], Y[:5])
    assert len(calls) == 2


def test_torch_s_own_random_numbers_are_repeated() -> None:
    class Deep(nn.Module):
        """Dropout, stochastic depth, noise, and a relaxed choice."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers, self.last = (
                nn.Linear(20, 16),
                nn.ModuleList(nn.Linear(16, 16) for _ in range(4)),
                nn.Linear(16, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(torch.tanh(self.first(x)), 0.3)
            for layer in self.layers:
                if torch.rand(()) < 0.6:
                    x = x + torch.tanh(layer(x)) * torch.bernoulli(torch.full((len(x), 1), 0.7))
            return self.last(x + 0.1 * torch.randn_like(x)) + F.gumbel_softmax(x, hard=True)[:, :4]

    torch.manual_seed(2)
    model = Deep().double()
    labels = torch.arange(16) % 4
    found = []
    for options in ({"method": "double_backprop"}, {"method": "finite_difference", "difference": "central"}):
        torch.manual_seed(5)
        value = penalty(model, X.double(), labels=labels, **options)
        found.append(flat(list(torch.autograd.grad(value, [p for p in model.parameters()], allow_unused=True))))
    assert relative_error(found[1], found[0]) < 1e-6


class Scaled(nn.Module):
    """Divides by a running scale that the forward moves before it is used."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), 3.0))
        self.first, self.last, self.how = nn.Linear(20, 16), nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.how == "assigned":
            self.scale = 0.5 * self.scale + 0.5 * z.detach().abs().mean()
        elif self.how == "in place":
            self.scale.mul_(0.5).add_(z.detach().abs().mean(), alpha=0.5)
        else:
            with torch.no_grad():
                self.scale.copy_(0.5 * self.scale + 0.5 * z.abs().mean())
        return self.last(torch.tanh(z / self.scale))


BUFFERED: dict[str, Callable[[], nn.Module]] = {
    "assigned": lambda: Scaled("assigned"),
    "in place": lambda: Scaled("in place"),
    "under no_grad": lambda: Scaled("under no_grad"),
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(20, 16)), nn.Tanh(), nn.Linear(16, 4)),
    "parametrized spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(20, 16)), nn.ReLU(), nn.Linear(16, 4)
    ),
    "batch norm without affine": lambda: nn.Sequential(
        nn.Linear(20, 16), nn.BatchNorm1d(16, affine=False), nn.Tanh(), nn.Linear(16, 4)
    ),
}


@pytest.mark.parametrize("way", ["backward", "term", "examples"])
@pytest.mark.parametrize("name", BUFFERED)
def test_the_second_forward_starts_from_the_buffers_of_the_first(name: str, way: str) -> None:
    def gradient(**options: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = BUFFERED[name]().double()
        x = X.double()
        if way == "examples":
            options["examples"] = 8
        regularizer = FisherPenalty(model, 5.0, every=1, labels="true", **options)
        if way == "term":
            with regularizer.watching() as forward:
                loss = F.cross_entropy(model(x), Y)
            (loss + regularizer.term(forward, Y)).backward()
        else:
            regularizer.backward(x, Y)
        return flat([p.grad for p in model.parameters()]), list(model.buffers())

    found, buffers = gradient(difference="central")
    exact, expected = gradient(method="double_backprop")
    assert relative_error(found, exact) < 1e-6
    for buffer, other in zip(buffers, expected, strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12)


def test_a_network_of_the_tests_repeats() -> None:
    torch.manual_seed(0)
    model = SmallResNet()
    FisherPenalty(model, 0.1, every=1).backward(torch.randn(8, 3, 12, 12), torch.arange(8))
