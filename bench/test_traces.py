"""Tr(F) against a plain forward and backward of the same batch: 128 images of 3x32x32, float32, BatchNorm in eval mode.

In units of a forward F, data gradients D and weight gradients W, a plain step is F + D + W. Per-example norms need F, D
and, where a layer's gradient is squared as it is made, about W; layers of few positions cost far less than W (their
inner products), which is why VGG-11 comes in below one.

The peers (``bench/peers.py``) get their labels given, and so do a little less than ``trace_fisher``. What each of them
gives is compared with ``per_example_grad_norms`` before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from bench import peers
from bench.conftest import ROWS, Bar, Refusal
from bench.networks import network
from fastfisher import ops
from fastfisher.engine.layers.base import Layout
from fastfisher.engine.layers.conv import Conv
from fastfisher.engine.layers.linear import gram_is_cheaper

BARS: dict[str, dict[str, float]] = {
    "SimpleCNN": {"sampled": 1.05, "rademacher": 1.05, "exact": 6.8},
    "VGG-11": {"sampled": 0.85, "rademacher": 0.85, "exact": 5.0},
    "ResNet + BN": {"sampled": 1.10, "rademacher": 1.10, "exact": 8.5},
}
# Name, the package it needs, the call.
PEERS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor], peers.Norms]]] = {
    "batch-of-one loop": ("torch", peers.loop),
    "vmap(grad) in chunks of 8": ("torch", peers.vmap),
    "BackPACK, BatchL2Grad": ("backpack", peers.backpack),
    "Opacus, norms of ghost clipping": ("opacus", peers.opacus),
    "NNGeometry, trace of PMatDiag": ("nngeometry", peers.nngeometry),
    "ASDL, trace of the diagonal": ("asdl", peers.asdl),
}
WRONG = {
    # Where an output has few positions it sums the squares over the positions instead of squaring the sum.
    ("VGG-11", "ASDL, trace of the diagonal"): "wrong number: squares each position of a convolution",
}


def group(name: str) -> str:
    """The table of one network."""
    return f"Tr(F), {name}"


def batch(name: str, examples: int = 128) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in eval mode, and data."""
    torch.manual_seed(0)
    return network(name).eval(), torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A forward and backward of the mean loss."""

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return run


@pytest.mark.parametrize("labels", ["sampled", "rademacher", "exact"])
@pytest.mark.parametrize("name", BARS)
def test_trace_fisher(name: str, labels: Any, compare: Any) -> None:
    model, x, y = batch(name)
    rounds = (2 if name == "VGG-11" else 3) if labels == "exact" else 5 if name == "VGG-11" else 9
    compare(
        group(name),
        f"**fastfisher.trace_fisher, {labels} labels**",
        lambda: fastfisher.trace_fisher(model, x, labels=labels),
        {"a plain forward and backward": (plain(model, x, y), Bar(BARS[name][labels], False))},
        rounds=rounds,
    )


@pytest.mark.parametrize("labels", ["sampled", "rademacher"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("name", BARS)
def test_other_likelihoods_cost_what_the_categorical_one_does(
    name: str, likelihood: Any, labels: Any, compare: Any
) -> None:
    model, x, _ = batch(name)
    categorical = lambda: fastfisher.trace_fisher(model, x, labels=labels)  # noqa: E731
    compare(
        group(name),
        f"**fastfisher.trace_fisher, {likelihood} likelihood, {labels} labels**",
        lambda: fastfisher.trace_fisher(model, x, labels=labels, likelihood=likelihood),
        {"the categorical one": (categorical, Bar(1.05, False))},
        rounds=5 if name == "VGG-11" else 9,
    )


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", BARS)
def test_peer(name: str, peer: str, compare: Any) -> None:
    package, norms = PEERS[peer]
    pytest.importorskip(package, reason=f"{peer}: pip install .[peers]")
    model, x, y = batch(name)
    few = x[:4], y[:4]
    try:
        found = norms(model, *few)()
    except NotImplementedError as error:
        assert "BatchNorm" in str(error), error
        ROWS.append(Refusal(group(name), peer, "refuses BatchNorm"))
        return
    ours = fastfisher.per_example_grad_norms(model, *few, labels="true")
    ours = ours if found.dim() else ours.sum()
    error = float((found - ours).abs().max() / ours.abs().max())
    remark = WRONG.get((name, peer))
    assert (error > 1e-4) == (remark is not None), error
    compare(
        group(name),
        f"{peer} ({remark})" if remark else peer,
        norms(model, x, y),
        {"a plain forward and backward": (plain(model, x, y), Bar(None, False))},
        rounds=2 if name == "VGG-11" else 4,
        warmup=0 if name == "VGG-11" else 1,  # there some take 10 s and more
    )


def test_examples_cost_the_same_each(compare: Any) -> None:
    """5,000 examples of SimpleCNN in batches of 125 against 1,000 of them, each per 1,000."""
    model, x, _ = batch("SimpleCNN", 5000)
    compare(
        group("SimpleCNN"),
        "**5,000 examples, rademacher labels**",
        lambda: fastfisher.trace_fisher(model, x, batch_size=125),
        {"1,000 examples, five times": (lambda: [thousand(model, x) for _ in range(5)], Bar(1.05, False))},
        rounds=2,
        warmup=1,
    )


def thousand(model: nn.Module, x: Tensor) -> None:
    fastfisher.trace_fisher(model, x[:1000], batch_size=125)


# channels, outputs, size, kernel, stride, padding
CONVOLUTIONS = [
    (32, 32, 32, 3, 1, 0), (64, 128, 16, 3, 1, 1), (128, 256, 8, 3, 1, 1), (512, 512, 4, 3, 1, 1),
    (512, 512, 2, 3, 1, 1), (64, 64, 8, 3, 1, 1), (32, 64, 16, 1, 2, 0), (16, 32, 32, 3, 2, 1), (256, 64, 14, 1, 1, 0),
]  # fmt: skip
LINEAR = [(4, 64, 64), (64, 64, 256), (64, 768, 768), (128, 768, 3072), (256, 256, 10), (256, 256, 256)]
# positions, inputs, outputs


def best(function: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of some calls on one thread."""
    found = []
    for _ in range(7):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_the_cheaper_form_of_a_convolution_is_chosen(shape: tuple[int, ...], one_thread: Any) -> None:
    """A wrong choice may cost at most 10 %."""
    channels, outputs, size, kernel, stride, padding = shape
    a, weight = torch.randn(16, channels, size, size), torch.randn(outputs, channels, kernel, kernel)
    d = torch.randn_like(F.conv2d(a, weight, None, stride, padding))
    layer = Conv(a, weight, None, {"weight": weight}, stride, padding, 1, 1)
    layer.layout = Layout(16, 0)
    chosen = layer.way(a[:, None], d[:, None])
    seconds = {
        way: best(
            lambda gram=gram: ops.grad_sqnorm_conv(a, d, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], 1, gram)
        )
        for way, gram in (("direct", False), ("gram", True))
    }
    assert seconds[chosen] <= 1.1 * min(seconds.values()), (chosen, seconds)


@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_the_cheaper_form_of_a_linear_layer_is_chosen(shape: tuple[int, int, int], one_thread: Any) -> None:
    """A wrong choice may cost at most 10 %."""
    positions, inputs, outputs = shape
    a, d = torch.randn(16, positions, inputs), torch.randn(16, positions, outputs)
    seconds = [best(lambda gram=gram: ops.grad_sqnorm_linear(a, d, gram)) for gram in (False, True)]
    assert seconds[gram_is_cheaper(positions, inputs, outputs, a.device)] <= 1.1 * min(seconds), seconds
