"""Tr(H) by Hutchinson's method: against double backprop by hand, PyHessian and curvlinops.

128 images of 3x32x32, float32, BatchNorm in eval mode; every rival takes as many probes of the same Hessian and reaches
the same error. 10 probes, and 3 for VGG-11, instead of the paper's 30: a round of all rivals with 30 takes a minute and
more; fewer probes favour who does least before the first. The peers come with
``pip install .[peers]``; a missing one is left out, and said. ``python -m bench.trace_error`` has the
error against time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from bench.conftest import Bar
from bench.networks import gelu_cnn, network

NETWORKS = {"SimpleCNN": 10, "VGG-11": 3, "ResNet + BN": 10, "GELU CNN": 10}  # probes


def by_hand(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> float:
    """What one writes without a package: the graph of the gradient, kept for all probes."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    total = 0.0
    for _ in range(probes):
        z = [torch.randn_like(p) for p in parameters]
        products = torch.autograd.grad(gradients, parameters, z, retain_graph=True)
        total += sum(float((h * d).sum()) for h, d in zip(products, z, strict=True))
    return total / probes


def by_pyhessian(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> float:
    """PyHessian (Yao et al., 2020), with a tolerance that no running mean meets.

    A tolerance of 0 would not do: divided by a negative running mean, its change is below any tolerance.
    """
    from pyhessian import hessian  # type: ignore[import-not-found, unused-ignore]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backward(create_graph=True) warns of a reference cycle
        traces = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False).trace(maxIter=probes, tol=-math.inf)
    model.zero_grad()
    return float(sum(traces) / len(traces))


def by_curvlinops(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> float:
    """curvlinops (Dangel et al., 2025), without its check that the data come in the same order each time."""
    from curvlinops import HessianLinearOperator, hutchinson_trace  # type: ignore[import-not-found, unused-ignore]

    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
    return float(hutchinson_trace(operator, num_matvecs=probes))


RIVALS: dict[str, tuple[Callable[..., float], str | None, float]] = {
    "double backprop by hand": (by_hand, None, 1.5),
    "PyHessian": (by_pyhessian, "pyhessian", 1.5),
    "curvlinops": (by_curvlinops, "curvlinops", 1.9),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in eval mode, images and labels."""
    torch.manual_seed(0)
    model = gelu_cnn() if name == "GELU CNN" else network(name)
    return model.eval(), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


@pytest.mark.parametrize("name", NETWORKS)
def test_hutchinson(name: str, compare: Any) -> None:
    model, x, y = problem(name)
    probes = NETWORKS[name]

    def plain() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    rivals: dict[str, tuple[Callable[[], Any], Bar]] = {"a plain step": (plain, Bar(None, False))}
    for rival, (function, module, bar) in RIVALS.items():
        if module is not None:
            try:
                __import__(module)
            except ImportError:
                warnings.warn(f"{rival} is not installed (pip install .[peers]) and not compared", stacklevel=1)
                continue
        rivals[rival] = (lambda function=function: function(model, x, y, probes), Bar(bar, True))
    compare(
        "Tr(H) by Hutchinson's method",
        f"{name}, {probes} probes",
        lambda: fastfisher.trace_hessian(model, x, y, method="hutchinson", probes=probes),
        rivals,
        rounds=2,
        warmup=1,
    )


def test_the_rivals_estimate_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    ours = fastfisher.trace_hessian(model, x, y, method="hutchinson", probes=4000)
    for function, module, _ in RIVALS.values():
        if module is None or pytest.importorskip(module):
            # A rival takes a quarter of the probes, so its error is about twice ours; fewer than there are parameters
            # for curvlinops, which goes without the test of the mean there.
            if module == "curvlinops":
                value = sum(function(model, x, y, 40) for _ in range(25)) / 25
            else:
                value = function(model, x, y, 1000)
            assert abs(value - ours.value) < 4 * 5**0.5 * ours.standard_error
