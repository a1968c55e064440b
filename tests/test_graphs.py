"""Captured steps without a GPU: a capture that calls the step again stands in for CUDA's, and tensors without values
show that no step waits for one. ``tests/test_gpu.py`` has the real graphs."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from fastfisher import FisherPenalty
from fastfisher.graphs import WARM_UP, CapturedSteps
from fastfisher.model import known_of
from fastfisher.penalty import AdaptiveStep

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    return [x for item in value.values() for x in tensors_of(item)] if isinstance(value, dict) else []


class Recapture:
    """As CUDA: nothing happens at the capture, and a replay writes to the memory of its result."""

    def __init__(self, penalty: FisherPenalty) -> None:
        self.penalty = penalty
        self.captures = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        self.captures += 1
        step = self.penalty.settings.step
        state = [*self.penalty.model.buffers(), *tensors_of(self.penalty._reused or {})]
        state += [
            x for x in (self.penalty._key, step._rho if isinstance(step, AdaptiveStep) else None) if x is not None
        ]
        before, random = [x.clone() for x in state], torch.get_rng_state()
        result = function()
        for x, value in zip(state, before, strict=True):
            x.copy_(value)
        torch.set_rng_state(random)

        class Graph:
            def replay(self) -> None:
                for x, value in zip(tensors_of(result), tensors_of(function()), strict=True):
                    x.copy_(value)

        return Graph(), result


class Small(nn.Module):
    """Two convolutions, a batch normalisation, ReLU, max-pool and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.linear = nn.Linear(4 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.linear(F.max_pool2d(x + self.second(x).relu(), 2).flatten(1))


class Dropping(nn.Module):
    """Dropout of elements and of channels, a batch normalisation, ReLU and max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 9, 10)
        self.channels, self.elements = nn.Dropout2d(0.3), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.channels(self.conv(x))).relu(), 2)
        return self.linear(F.dropout(self.elements(x), 0.1, self.training, True).flatten(1))


OPTIONS: list[dict[str, Any]] = [
    {"every": 1},
    {"every": 4, "start": 1},
    {"every": 3, "labels": "uniform"},
    {"every": 2, "labels": "rademacher"},
    {"every": 1, "labels": "true"},
    {"every": 1, "labels": "true", "wrt": "inputs"},
    {"every": 1, "mixed": True},
    {"every": 2, "difference": "central"},
    {"every": 1, "gates": "free"},
    {"every": 2, "examples": 5},
    {"every": 2, "method": "double_backprop"},
]


def train(penalty: FisherPenalty, steps: int) -> list[Tensor]:
    """Parameters, buffers, and what every step said."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(penalty.model.parameters(), 0.05, momentum=0.9)
    said = []
    for i in range(steps):
        rows = torch.arange(8) + i % 4
        optimizer.zero_grad()
        said.append(penalty.backward(X[rows], Y[rows]))
        optimizer.step()
        said.append(torch.zeros(()) if penalty.value is None else penalty.value)
    return [*said, *penalty.model.parameters(), *penalty.model.buffers()]


@pytest.mark.parametrize("network", [Small, Dropping])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replayed_steps_are_the_steps(options: dict[str, Any], network: type[nn.Module]) -> None:
    if network is Dropping and options.get("gates") == "free":
        pytest.skip("refused, see below")
    torch.manual_seed(0)
    model = network().train()
    plain = FisherPenalty(model, 0.2, generator=torch.Generator().manual_seed(1), **copy.deepcopy(options))
    twin = FisherPenalty(copy.deepcopy(model), 0.2, generator=torch.Generator().manual_seed(1), **options)
    recapture = Recapture(twin)
    twin._captured = CapturedSteps(recapture)
    steps = (WARM_UP + 2) * plain.every + plain.start
    for expected, found in zip(train(plain, steps), train(twin, steps), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    kinds = 1 if plain.every == 1 else 2  # with a new penalty, and without
    assert recapture.captures == kinds


def test_gradients_that_the_caller_accumulates_are_kept() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    penalty = FisherPenalty(model, 0.0)
    penalty._captured = CapturedSteps(Recapture(penalty))
    for _ in range(WARM_UP):
        penalty.backward(X, Y)
    model.zero_grad()
    losses = [penalty.backward(x, Y[:6]) for x in (X[:6], X[6:])]
    for _ in range(2 * WARM_UP):
        model.zero_grad()
        losses = [penalty.backward(x, Y[:6]) for x in (X[:6], X[6:])]
    found = [p.grad for p in model.parameters()]
    wanted = [F.cross_entropy(model(x), Y[:6]) for x in (X[:6], X[6:])]
    for a, b in zip(losses, wanted, strict=True):
        torch.testing.assert_close(a, b.detach())
    for a, b in zip(found, torch.autograd.grad(sum(wanted), list(model.parameters())), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)


def test_what_a_step_depends_on_is_captured_anew() -> None:
    model = Small()
    penalty = FisherPenalty(model, 0.1, every=1)
    recapture = Recapture(penalty)
    penalty._captured = CapturedSteps(recapture)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        model.eval,
        lambda: setattr(penalty, "alpha", 0.2),
        lambda: next(model.parameters()).requires_grad_(False),
        model.double,
    ]
    for number, change in enumerate(changes, start=1):
        change()
        x = X.to(next(model.parameters()).dtype)
        for _ in range(WARM_UP + 2):
            penalty.backward(x, Y)
        assert recapture.captures == number
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(WARM_UP + 1):
            penalty.backward(x, Y)
    assert recapture.captures == len(changes) + 1


class Random(nn.Module):
    """A forward that draws numbers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.draw(x))


@pytest.mark.parametrize(
    ("name", "gates", "draw"),
    [
        ("rand_like", "frozen", lambda x: x + torch.rand_like(x)),
        ("bernoulli", "free", lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))),
        ("dropout", "free", lambda x: F.dropout(x)),
        ("alpha_dropout", "frozen", lambda x: F.alpha_dropout(x, training=True)),
        ("dropout1d", "frozen", lambda x: F.dropout1d(x)),
        ("scaled_dot_product_attention", "frozen", lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)),
    ],
)
def test_other_random_functions_are_refused_by_name(name: str, gates: Any, draw: Any) -> None:
    penalty = FisherPenalty(Random(draw), 0.1, gates=gates)
    penalty.backward(torch.randn(5, 4), torch.arange(5) % 3)
    penalty._captured = CapturedSteps(Recapture(penalty))
    penalty.steps = 0
    with pytest.raises(ValueError, match=f"graphs: {name} draws"):
        penalty.backward(torch.randn(5, 4), torch.arange(5) % 3)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="graphs: expected False with a model on cpu"):
        FisherPenalty(nn.Linear(2, 2), 0.1, graphs=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_step_waits_for_a_value(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: a step that reads one raises."""
    monkeypatch.setattr(FisherPenalty, "_judge", lambda *_: None)  # on a GPU it looks at the first penalty alone
    for name in ("labels", "penalty", "regularizer", "repeatable"):  # as on a GPU
        monkeypatch.setattr(sys.modules[f"fastfisher.{name}"], "looking_waits", lambda _: True)
    with FakeTensorMode():
        model, x, y = Small(), torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        fp = FisherPenalty(model, 0.1, **options)
        fp._captured = CapturedSteps(Recapture(fp))
        for step in (fp._penalised, fp._plain):
            outcome = step(x, y)
            assert {n for n, _ in model.named_parameters()} == set(outcome.total)
            fp._reused = outcome.reused or fp._reused
        if fp.settings.method == "finite_difference":  # whether the forward can be repeated is read a step later
            with pytest.raises(DataDependentOutputException):
                fp._penalised(x, y)
        known_of(model).clear()
        fp._penalised(x, y)
        with pytest.raises(DataDependentOutputException):
            float(outcome.loss)
