"""Parameters without a formula: one pass for all of them, never dearer than a loop over single examples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import per_example_grad_norms
from fastfisher.engine.one_by_one import by_vmap, gradients_of_each
from tests.measure.test_traces import data_for, per_example_gradients

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")]


class Distances(nn.Module):
    """Distances to learned points, which have no formula; several layers of them. Counts its forwards."""

    def __init__(self, width: int = 6, depth: int = 3, function: Callable[..., Any] = torch.cdist) -> None:
        super().__init__()
        self.points = nn.ParameterList(torch.randn(width, width) for _ in range(depth))
        self.head, self.function, self.forwards = nn.Linear(width, 4), function, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        for points in self.points:
            x = torch.tanh(self.function(x, points))
        return self.head(x)


def test_both_ways_give_the_gradients_of_single_examples() -> None:
    torch.manual_seed(0)
    model, (x, y) = Distances().double().eval(), data_for((6,))
    cotangent = (model(x).softmax(1) - F.one_hot(y, 4)).detach()
    expected = per_example_gradients(model, x, y)
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    names = [name for name in parameters if name.startswith("points")]
    for limit in (None, 2 * 3 * 36, 1):
        parts = list(gradients_of_each(model, x, parameters, names, cotangent, limit))
        assert len(parts) == {None: 1, 2 * 3 * 36: 3, 1: 5}[limit]
        for name in names:
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected[name])
    together = by_vmap(model, x, {name: parameters[name] for name in names}, cotangent)
    for name in names:
        torch.testing.assert_close(together[name], expected[name])


def test_one_forward_for_each_example_serves_all_parameters() -> None:
    torch.manual_seed(0)
    model, (x, y) = Distances(depth=5), data_for((6,))
    per_example_grad_norms(model, x.float(), y, labels="true")
    model.forwards = 0
    per_example_grad_norms(model, x.float(), y, labels="true")
    assert model.forwards == 1 + 5  # the capture's, and one for each example


def cost(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In units of a loop over single examples, process time; medians of alternating runs."""
    parameters = list(model.parameters())

    def loop() -> None:
        for i in range(len(x)):
            found = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
            sum(g.square().sum() for g in found)

    def measure() -> None:
        per_example_grad_norms(model, x, y, labels="true")

    times: list[list[float]] = [[], []]
    for _ in range(9):
        for run, found in zip((loop, measure), times, strict=True):
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    return statistics.median(times[1][2:]) / statistics.median(times[0][2:])


class OnlyEach(torch.autograd.Function):
    """A function without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.mT, x.mT @ grad


@pytest.mark.parametrize("function", [torch.cdist, OnlyEach.apply], ids=["distances", "a custom function"])
def test_never_dearer_than_a_loop(function: Any) -> None:
    torch.manual_seed(0)
    model = Distances(256, 4, function)
    x, y = torch.randn(32, 256), torch.randint(4, (32,))
    assert cost(model, x, y) <= 1.2


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_cost_less_than_a_loop(recurrent: Any) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = recurrent(32, 128, 2, batch_first=True), nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(x)[0].mean(1))

    torch.manual_seed(0)
    assert cost(Network(), torch.randn(16, 20, 32), torch.randint(4, (16,))) <= 1.0
