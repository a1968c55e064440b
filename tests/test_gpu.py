"""What needs a GPU: the penalty and the draws on CUDA tensors agree with the CPU (``make gpu``)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import FisherPenalty, ops
from fastfisher.penalise.outcome import Captured
from fastfisher.training.config import TrainConfig
from fastfisher.training.loop import train
from fastfisher.training.networks import build_network
from tests.support.networks import flat, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning"),
]


def test_labels_equal_those_of_the_cpu() -> None:
    logits, key = torch.randn(500, 1000), torch.tensor([3, 4])
    _, expected = fastfisher.sample_cross_entropy(logits, key=key)
    _, found = fastfisher.sample_cross_entropy(logits.cuda(), key=key.cuda())
    assert (found.cpu() != expected).float().mean() < 0.01


def test_a_row_without_a_softmax_is_marked() -> None:
    logits = torch.randn(5, 10)
    logits[2] = float("nan")
    nll, labels = fastfisher.sample_cross_entropy(logits.cuda(), reduction="none")
    assert labels[2] == -1 and nll[2].isnan() and nll[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_the_penalty_equals_that_of_the_cpu(method: str) -> None:
    torch.manual_seed(0)
    model = build_network("simple_cnn", in_channels=3, image_size=32, classes=10).double()
    x, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,))
    twin = copy.deepcopy(model).cuda()
    exact = fastfisher.penalty(model, x, labels=labels)
    found = fastfisher.penalty(twin, x.cuda(), labels=labels.cuda(), method=method, difference="central")
    expected = flat(list(torch.autograd.grad(exact, list(model.parameters()))))
    assert relative_error(flat(list(torch.autograd.grad(found, list(twin.parameters())))).cpu(), expected) < 1e-5


# ---- lists of tensors, and norms of per-example gradients ------------------------------------------------------------

KEY = torch.tensor([1234, 2**40 + 7])


def on_lists(tensors: list[Tensor], key: Tensor) -> list[Tensor]:
    """What the operators on lists make of tensors and of others, made here, at addresses of their own."""
    out, doubled = [torch.empty_like(x) for x in tensors], [2 * x for x in tensors]
    ops.perturb(out, tensors, key, 0.1, "gaussian")
    total = ops.axpy_diff(out, doubled, tensors, torch.tensor(0.5, dtype=torch.float64).cuda())
    return [*out, total, ops.probe_dot(doubled, key, "rademacher"), ops.sum_squares(doubled)]


def lists(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).cuda() for n in (5, 0, 3000, 1, 40_000, 2049)]


def norms(a: Tensor, d: Tensor) -> list[Tensor]:
    """What the operators on per-example gradients make of a[N, C, H, W] and d of the same size."""
    same = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    flat, other = a.flatten(2), d.flatten(2)
    return [
        *(x for gram in (False, True) for x in ops.grad_sqnorm_conv(a, d, *same, gram)),
        *(ops.grad_sqnorm_linear(flat, other, gram) for gram in (False, True)),
        *ops.channel_products(flat, other, a[0, :, 0, 0]),
    ]


def test_a_graph_with_lists_of_tensors_follows_its_inputs() -> None:
    key, tensors = KEY.cuda(), lists(1)
    on_lists(tensors, key)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = on_lists(tensors, key)
    for seed in (2, 3):
        for x, y in zip(tensors, lists(seed), strict=True):
            x.copy_(y)
        key += 1
        for x in results:
            x.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, results, on_lists(tensors, key)))


def test_a_graph_with_norms_follows_its_inputs() -> None:
    a, d = torch.randn(4, 8, 10, 10, device="cuda"), torch.randn(4, 8, 10, 10, device="cuda")
    norms(a, d)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = norms(a, d)
    a.mul_(2).add_(1)
    graph.replay()
    assert all(map(torch.equal, results, norms(a, d)))


def test_tables_that_were_let_go_are_built_anew() -> None:
    key = KEY.cuda()
    kept = [lists(seed) for seed in range(100)]  # more than are kept
    first = [on_lists(tensors, key) for tensors in kept]
    for tensors, expected in zip(kept, first, strict=True):
        assert all(map(torch.equal, on_lists(tensors, key), expected))


@pytest.mark.parametrize("name", ["simple_cnn", "vgg11"])
def test_the_trace_equals_that_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model = build_network(name, in_channels=3, image_size=32, classes=10).double()
    x, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,))
    expected = fastfisher.per_example_grad_norms(model, x, labels, labels="true")
    found = fastfisher.per_example_grad_norms(copy.deepcopy(model).cuda(), x.cuda(), labels.cuda(), labels="true")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=0)


# ---- training steps --------------------------------------------------------------------------------------------------

STEPS = [
    {"every": 1},
    {"every": 3},
    {"every": 1, "mixed": True},
    {"every": 1, "labels": "true"},
    {"every": 2, "gates": "free"},
    {"every": 2, "labels": "rademacher"},
    {"every": 2, "method": "double_backprop"},
]


class WithDropout(nn.Module):
    """Batch normalisation, ReLU, max-pool, and dropout where it may be."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 49, 10)
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(F.max_pool2d(self.norm(self.conv(x)).relu(), 2)).flatten(1))


def trained(
    graphs: bool, options: dict[str, Any], rate: float = 0.0, *, autocast: bool = False, channels_last: bool = False
) -> list[Tensor]:
    """Parameters and buffers after steps of which most are replayed, none waiting for the GPU."""
    torch.manual_seed(0)
    model = WithDropout(rate).cuda()
    x, y = torch.randn(32, 3, 16, 16, device="cuda"), torch.randint(10, (32,), device="cuda")
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    penalty = FisherPenalty(model, 0.1, graphs=graphs, generator=torch.Generator().manual_seed(1), **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    torch.manual_seed(2)
    for step in range(8 * penalty.every):
        rows = torch.arange(16, device="cuda") + step % 3
        inputs, targets = x[rows], y[rows]
        optimizer.zero_grad()
        # The first step compiles and draws the key; a capture synchronises on its own.
        torch.cuda.set_sync_debug_mode("error" if step > 5 * penalty.every or (not graphs and step) else "default")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                penalty.backward(inputs, targets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
    if graphs:
        assert isinstance(penalty._runner, Captured) and penalty._runner.steps.captured
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("options", STEPS, ids=str)
def test_captured_steps_train_as_launched_ones_do(options: dict[str, Any]) -> None:
    launched, replayed = (trained(graphs, copy.deepcopy(options)) for graphs in (False, True))
    for a, b in zip(launched, replayed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"every": 1}, {"every": 3}], ids=str)
def test_captured_steps_serve_autocast_channels_last_and_dropout(options: dict[str, Any]) -> None:
    for arguments in ({"autocast": True}, {"channels_last": True}, {"rate": 0.3}):
        assert all(x.isfinite().all() for x in trained(True, options, **arguments))


@pytest.mark.parametrize("options", [{"method": "FP", "penalty_every": 3}, {"mixup": 0.4}], ids=str)
def test_the_training_script_on_a_gpu(options: dict[str, Any], tmp_path: Path) -> None:
    records = []
    for graphs in ("on", "off"):
        config = TrainConfig(
            out=str(tmp_path / graphs), epochs=2, batch_size=64, lr=0.01, graphs=graphs, augment="crop_flip",
            device="cuda", **options,
        )  # fmt: skip
        assert train(config) == "finished"
        lines = (tmp_path / graphs / "metrics.jsonl").read_text().splitlines()
        records.append(json.loads(lines[-1]))
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-2)
