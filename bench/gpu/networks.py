"""Call 3: Tr(F) and training steps of whole networks, launched and in graphs, and the peers at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from bench import peers
from bench.gpu import bars
from bench.gpu.bars import LABELS, STEPS, TRACES
from bench.gpu.kernels import DTYPES, LARGE, key_on, logits_on
from bench.gpu.report import Figure
from bench.gpu.timing import Call, Rival, Setting, case, cost, faster, late, of_copy, race
from fastfisher import ops
from fastfisher.penalise.graphs import WARM_UP
from fastfisher.training.networks import build_network


@dataclass(frozen=True)
class Network:
    """A network of the paper, a small one of its kind for a dry run, and how many images it is measured on."""

    name: str
    small: str
    images: int = 5000


NETWORKS = {
    "SimpleCNN": Network("simple_cnn", "small_simple_cnn"),
    "VGG-11": Network("vgg11", "small_vgg11"),
    "WResNet-44-3": Network("wresnet44_3", "wresnet8_1"),
    # What a plain step of 5,000 images keeps for its backward is 89 GiB.
    "DenseNet-40-12": Network("densenet40_12", "densenet7_12", images=2000),
}
FEW = 20
"""Examples that a loop takes, to say what all would."""


def built(at: Setting, name: str, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network for 10 classes, images of 3x32x32 and labels."""
    torch.manual_seed(0)
    of, size = NETWORKS[name], 8 if at.dry else 32
    model = build_network(of.small if at.dry else of.name, in_channels=3, image_size=size, classes=10).to(at.device)
    examples = at.batch if at.dry else examples
    x, y = torch.randn(examples, 3, size, size), torch.randint(10, (examples,))
    return model, x.to(at.device), y.to(at.device)


def passes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A forward and backward of the mean loss."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


@case(3, TRACES, name=bars.NETWORKS, labels=LABELS)
def trace_fisher(at: Setting, name: str, labels: Any) -> Iterator[Figure]:
    """Tr(F) of 5,000 examples, of DenseNet 2,000, against a plain forward and backward of them, and against a loop."""
    model, x, y = built(at, name, NETWORKS[name].images)
    model.eval()
    few = min(FEW, len(x))

    def loop() -> None:
        for i in range(few):
            passes(model, x[i : i + 1], y[i : i + 1])

    yield from race(
        at,
        f"{name}, {labels} labels",
        lambda: fastfisher.trace_fisher(model, x, labels=labels),
        cost("a forward and backward", lambda: passes(model, x, y)),
        faster("a loop over examples", loop, times=len(x) / few),
        repeat=1,
    )


# ---- training steps -------------------------------------------------------------------------------------------------


def step(
    at: Setting, name: str, alpha: float = 0.0, *, every: int = 1, graphs: bool = False, compiled: bool = False
) -> Call:
    """A training step by SGD with momentum, with the penalty where ``alpha`` is not 0, past all its captures."""
    model, x, y = built(at, name, at.batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    penalty = fastfisher.FisherPenalty(model, alpha, every=every, graphs=graphs and not at.dry)  # the CPU has no graphs
    called = at.compiled(model) if compiled else model

    def run() -> None:
        optimizer.zero_grad()
        if alpha or graphs:
            penalty.backward(x, y)
        else:
            F.cross_entropy(called(x), y).backward()
        optimizer.step()

    if graphs:
        for _ in range(1 if at.dry else (WARM_UP + 2) * every):  # each kind of step is captured by then
            run()
    return run


def steps_race(at: Setting, name: str, ours: Call, *rivals: Rival) -> Iterator[Figure]:
    """Over ten steps each, so that one in ten that recomputes the penalty counts as much as it should."""
    yield from race(at, name, ours, *rivals, repeat=1 if at.dry else 10)


@case(3, STEPS, name=bars.NETWORKS)
def plain_steps(at: Setting, name: str) -> Iterator[Figure]:
    """Plain steps in graphs."""
    yield from steps_race(
        at, f"{name}, plain, graphs", step(at, name, graphs=True), faster("without graphs", step(at, name))
    )


@case(3, STEPS, name=bars.NETWORKS, every=(10, 1))
def penalty_steps(at: Setting, name: str, every: int) -> Iterator[Figure]:
    """Steps with the penalty, launched and in graphs, against plain ones of either kind."""
    plain, ours = step(at, name), step(at, name, 0.01, every=every)
    yield from steps_race(at, f"{name}, every {every}", ours, cost("a plain step", plain))
    yield from steps_race(
        at,
        f"{name}, every {every}, graphs",
        step(at, name, 0.01, every=every, graphs=True),
        cost("a plain step in a graph", step(at, name, graphs=True)),
        cost("a plain step", plain),
        faster("without graphs", ours),
    )


@case(3, STEPS, name=bars.NETWORKS)
def reusing_steps(at: Setting, name: str) -> Iterator[Figure]:
    """Steps that reuse the penalty of the first."""
    yield from steps_race(
        at, f"{name}, reusing", step(at, name, 0.01, every=10**9), cost("a plain step", step(at, name))
    )


# ---- peers ----------------------------------------------------------------------------------------------------------


@case(3, "cross-entropy alone", classes=LARGE, dtype=DTYPES)
def liger(at: Setting, classes: int, dtype: str) -> Iterator[Figure]:
    """The draw with loss and gradient against others' loss and gradient for labels that are given, kernels alone."""
    logits, key = logits_on(at, at.rows(classes), classes, dtype), key_on(at)
    given = torch.randint(logits.shape[1], logits.shape[:1], device=at.device)
    overwritten = logits.clone().requires_grad_()  # Liger's writes the gradient over its logits, in its forward

    def loss_of_liger() -> Call:
        from liger_kernel.transformers.cross_entropy import (  # type: ignore[import-not-found, unused-ignore]
            LigerCrossEntropyLoss,
        )

        loss = LigerCrossEntropyLoss()
        return lambda: loss(overwritten, given)

    yield from race(
        at,
        f"{classes} classes, {dtype}",
        lambda: ops.sample_cross_entropy(logits, key, 1.0),
        faster("Liger's cross-entropy", late(loss_of_liger)),
        of_copy(at, 2 * logits.nbytes),
    )


EXAMPLES = 512
"""What peers are measured on: many hold the gradient of each example."""


def norms_race(
    at: Setting, name: str, peer: str, make: Callable[[nn.Module, Tensor, Tensor], Call]
) -> Iterator[Figure]:
    """The norms of the gradients of 512 single examples, ours against a peer's."""
    model, x, y = built(at, name, EXAMPLES)
    model.eval()
    yield from race(
        at,
        f"{name}, norms beside {peer}",
        lambda: fastfisher.per_example_grad_norms(model, x, y, labels="true"),
        faster(peer, late(lambda: make(model, x, y))),
        repeat=1,
    )


CHUNK = 64
"""Examples whose gradients are held at once."""


@case(3, "peers", name=bars.NETWORKS)
def opacus(at: Setting, name: str) -> Iterator[Figure]:
    """Ghost norms."""
    yield from norms_race(at, name, "Opacus' ghost norms", peers.opacus)


@case(3, "peers", name=bars.NETWORKS)
def functional(at: Setting, name: str) -> Iterator[Figure]:
    """torch.func."""
    yield from norms_race(at, name, "torch.func.vmap(grad)", lambda *batch: peers.vmap(*batch, chunk=CHUNK))


# These come last: to compile can take longer than a case may.


@case(3, "peers", name=bars.NETWORKS)
def compiled_steps(at: Setting, name: str) -> Iterator[Figure]:
    """A plain step of a network under torch.compile."""
    ours, plain = step(at, name, 0.01, every=10, graphs=True), step(at, name, compiled=True)
    of_compiled = cost("a plain step under torch.compile", plain)
    yield from steps_race(at, f"{name}, every 10, graphs", ours, of_compiled)


@case(3, "peers", name=bars.NETWORKS)
def compiled_functional(at: Setting, name: str) -> Iterator[Figure]:
    """torch.func under torch.compile."""
    unit = "torch.func.vmap(grad) under torch.compile"
    yield from norms_race(
        at, name, unit, lambda *batch: peers.vmap(*batch, chunk=min(CHUNK, len(batch[1])), transform=at.compiled)
    )
