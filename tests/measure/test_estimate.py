"""Error bars of few examples: Student's quantile, and how often the printed interval holds the trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import fastfisher
from fastfisher.measure.estimate import TraceEstimate, student_quantile
from tests.measure.test_traces import images, small_network

scipy_stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 59, 1000])
def test_the_quantile_is_students(degrees: int, level: float) -> None:
    expected = scipy_stats.t.ppf((1 + level) / 2, degrees)
    assert student_quantile(level, degrees) == pytest.approx(expected, rel=1e-9)
    assert student_quantile(level, degrees + 0.9) == pytest.approx(expected, rel=1e-9)  # rounded down, to be safe


def test_no_and_many_degrees_of_freedom() -> None:
    assert student_quantile(0.95, 0) == student_quantile(0.95, math.nan) == math.inf
    assert student_quantile(0.95, math.inf) == pytest.approx(1.959964, rel=1e-6)


def test_what_is_printed() -> None:
    estimate = TraceEstimate(10.0, 1.0, 5, 1, "made", degrees=4)
    assert estimate.interval() == pytest.approx((10 - 2.776445, 10 + 2.776445), rel=1e-6)
    assert str(estimate) == "10 ± 1 (made, 5 examples; 95 %: 7.224 to 12.78)"
    assert str(TraceEstimate(10.0, 0.0, 5, 0, "made")) == "10 ± 0 (made, 5 examples)"
    for level in (0.0, 1.0, "0.95", float("nan")):
        with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
            estimate.interval(level)  # type: ignore[arg-type]


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(10, 20), act(), nn.Linear(20, 5)).double() for act in (nn.ReLU, nn.Tanh)]
    x = torch.randn(8000, 10, generator=generator, dtype=torch.float64)
    return {"convolutional": (small_network(), images(8000, seed=5)), "relu": (layers[0], x), "tanh": (layers[1], x)}


@pytest.mark.parametrize("examples", [4, 6, 8, 16])
@pytest.mark.parametrize("name", ["convolutional", "relu", "tanh"])
def test_intervals_of_few_examples_hold_the_trace(name: str, examples: int) -> None:
    """Of 400 batches, whose share within a true 95 % interval has a standard error of 1.1 %."""
    model, x = networks()[name]
    truth = float(fastfisher.per_example_grad_norms(model, x, labels="exact").mean())
    generator = torch.Generator().manual_seed(2)
    held = 0
    for repeat in range(400):
        batch = x[examples * repeat : examples * (repeat + 1)]
        low, high = fastfisher.trace_fisher(model, batch, generator=generator).interval()
        held += low <= truth <= high
    assert 0.90 * 400 <= held <= 0.99 * 400, held


@pytest.mark.parametrize("draws", [2, 4])
@pytest.mark.parametrize("labels", ["rademacher", "sampled"])
def test_intervals_over_draws_hold_the_trace_of_the_examples(labels: Any, draws: int) -> None:
    model, x = networks()["relu"]
    generator = torch.Generator().manual_seed(2)
    held = 0
    truth = fastfisher.per_example_grad_norms(model, x[:3200], labels="exact").view(400, 8).mean(1)
    for repeat in range(400):
        batch = x[8 * repeat : 8 * (repeat + 1)]
        low, high = fastfisher.trace_fisher(model, batch, labels=labels, draws=draws, generator=generator).interval()
        held += low <= float(truth[repeat]) <= high
    assert 0.90 * 400 <= held <= 0.99 * 400, held


def test_intervals_of_few_probes_hold_the_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    options: dict[str, Any] = {"method": "hutchinson", "generator": torch.Generator().manual_seed(1)}
    truth = fastfisher.trace_hessian(model, x, y, probes=4000, **options).value
    held = 0
    for _ in range(200):
        low, high = fastfisher.trace_hessian(model, x, y, probes=5, **options).interval()
        held += low <= truth <= high
    assert 0.90 * 200 <= held <= 0.99 * 200, held
