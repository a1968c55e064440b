"""A capture is compared with the ordinary gradient once: what it refuses, what it lets pass, and what it costs."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import per_example_grad_norms
from fastfisher.engine import completeness
from tests.measure.test_traces import data_for, per_example_gradients

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")]


class Network(nn.Module):
    """[N, 6] to logits [N, 4] with ``function`` between two layers; counts its forwards."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 6), nn.Linear(6, 4), function
        self.gain, self.forwards = nn.Parameter(torch.ones(6)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.second(torch.tanh(self.function(self, self.first(x))))


COUPLED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the mean of the batch": lambda m, h: h - h.mean(0),
    "statistics of the batch": lambda m, h: F.batch_norm(h * m.gain, None, None, training=True),
    "attention over the batch": lambda m, h: (h @ h.mT).softmax(-1) @ h,
    "another example": lambda m, h: h + h.roll(1, 0) * m.gain,
    "a running state": lambda m, h: h.cumsum(0),
}


@pytest.mark.parametrize("name", COUPLED)
def test_examples_that_influence_each_other_are_refused(name: str) -> None:
    torch.manual_seed(0)
    x, y = data_for((6,))
    model = Network(COUPLED[name]).double()
    for measure in (
        lambda: per_example_grad_norms(model, x, y, labels="true"),
        lambda: fastfisher.trace_fisher(model, x),
        lambda: fastfisher.grad_inner_products(model, (x, y), (x, y)),
        lambda: fastfisher.gradient_covariance(model, (x, y)),
    ):
        with pytest.raises(ValueError, match=r"model: expected (examples that do not influence|per-example gradients)"):
            measure()


def test_a_gradient_that_is_not_that_of_the_layers_is_refused_by_name() -> None:
    torch.manual_seed(0)
    x, y = data_for((6,))

    class Wrong(Network):
        """Its second forward, which is watched, leaves a use of the first layer out of the gradient."""

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            h = self.first(x)
            return self.second(torch.tanh(h + (h.detach() if self.forwards == 2 else h)))

    with pytest.raises(ValueError, match=r"add up to the ordinary gradient, got others for first\.weight, first\.bias"):
        per_example_grad_norms(Wrong(lambda m, h: h).double(), x, y, labels="true")


def test_random_forwards_pass() -> None:
    torch.manual_seed(0)
    x, y = data_for((6,))
    for function in (
        lambda m, h: F.dropout(h, 0.5, training=True),
        lambda m, h: h + torch.rand_like(h) * m.gain,
    ):
        model = Network(function).double()
        torch.manual_seed(1)
        found = per_example_grad_norms(model, x, y, labels="true")
        torch.manual_seed(1)
        assert torch.equal(found, per_example_grad_norms(model, x, y, labels="true"))
        torch.manual_seed(1)
        torch.testing.assert_close(found, per_example_grad_norms(model, x, y, labels="true", verify=False))


def test_forwards_that_nothing_can_repeat_are_said() -> None:
    random.seed(0)
    x, y = data_for((6,))
    model = Network(lambda m, h: h * (1 + random.random())).double()
    with pytest.warns(UserWarning, match="two forwards of the same batch gave different logits"):
        per_example_grad_norms(model, x, y, labels="true")
    slow = Network(lambda m, h: torch.cdist(h, m.gain[None] * (1 + random.random())) * h).double()
    with pytest.raises(ValueError, match="gain have no formula"):
        per_example_grad_norms(slow, x, y, labels="true")


def test_random_numbers_beside_what_has_no_formula_are_refused() -> None:
    x, y = data_for((6,))
    model = Network(lambda m, h: F.dropout(torch.cdist(h, m.gain[None]) * h, 0.5, training=True)).double()
    for verify in (True, False):
        with pytest.raises(ValueError, match="a forward without random numbers"):
            per_example_grad_norms(model, x, y, labels="true", verify=verify)


def test_it_is_done_once_for_each_kind_of_batch() -> None:
    torch.manual_seed(0)
    x, y = data_for((6,), 7)
    model = Network(lambda m, h: h * m.gain).double()

    def forwards(n: int, **options: Any) -> int:
        before = model.forwards
        per_example_grad_norms(model, x[:n], y[:n], labels="true", **options)
        return model.forwards - before

    assert [forwards(5), forwards(5), forwards(4), forwards(4), forwards(5)] == [4, 1, 4, 1, 1]
    assert forwards(5, params=[model.gain]) == 4
    assert [forwards(7, verify=False), forwards(7), forwards(7)] == [1, 4, 1]


def test_a_loss_is_another_where_what_it_calls_is_another() -> None:
    """The same lambda around a loss of single examples and around a contrastive one, of which there are no norms."""
    torch.manual_seed(0)
    x, y = data_for((6,))
    alone = functools.partial(F.cross_entropy, reduction="none")

    def against_the_others(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z @ z.mT, y.new_tensor(range(len(y))), reduction="none")

    class Either(nn.Module):
        def __init__(self, function: Callable[..., Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return self.function(z, y)

    ways: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
        "closed over": lambda function: lambda z, y: function(z, y),
        "a default": lambda function: lambda z, y, of=function: of(z, y),
        "partial": lambda function: functools.partial(lambda of, z, y: of(z, y), function),
        "a module": Either,
    }
    for name, around in ways.items():
        model = Network(lambda _, h: h).double()
        per_example_grad_norms(model, x, y, labels="true", loss=around(alone))
        before = model.forwards
        per_example_grad_norms(model, x, y, labels="true", loss=around(alone))
        assert model.forwards == before + 1, name  # made anew, it is the same one
        with pytest.raises(ValueError, match="its examples influence each other"):
            per_example_grad_norms(model, x, y, labels="true", loss=around(against_the_others))


def test_batches_of_ever_new_lengths_do_not_stay_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completeness, "SHAPES", 2)
    torch.manual_seed(0)
    model = Network(lambda m, h: h[h[:, 0].argsort()][h[:, 0].argsort().argsort()] * m.gain).double()
    x, y = data_for((6,))
    counts = []
    for n in (5, 4, 3, 2):
        before = model.forwards
        found = per_example_grad_norms(model, x[:n], y[:n], labels="true")
        counts.append(model.forwards - before)
        expected = per_example_gradients(model, x[:n], y[:n])
        wanted = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert counts[0] > counts[2] and counts[3] <= counts[2]


PRECISIONS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)]


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16", "float16", "autocast"])
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    dtype, autocast = request.param
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        yield dtype


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_difference(precision: torch.dtype, seed: int) -> None:
    """Deep networks with kinks, whose gradients of single parameters may cancel to nothing."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU())]
    attention = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    model = nn.Sequential(attention, *layers, nn.Flatten(), nn.Linear(4 * 32, 4)).to(precision)
    x, y = torch.randn(16, 4, 32, dtype=precision), torch.randint(4, (16,))
    assert per_example_grad_norms(model, x, y, labels="true").isfinite().all()


def test_ordinary_state_is_left_alone() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.layer(x)

    x, y = data_for((6,))
    model = Moves().double()
    state = torch.get_rng_state()
    per_example_grad_norms(model, x, y, labels="true")
    assert float(model.count) == 0 and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
