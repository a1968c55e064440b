"""What Tr(H) to a given relative error costs, in plain steps: ``python -m bench.trace_error``.

The cost of one probe and the fixed cost before it are timed, the spread of single probes is measured, and the number of
probes for an error follows: (spread / (error · Tr(H)))². The rivals' spread is that of zᵀHz, which is a property of H
and of the probes' distribution, not of who computes it; "fisher" is exact, so its cost does not depend on the error.
Processor seconds on one thread, so that a shared machine does not disturb them.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bench.conftest import RESULTS, machine
from bench.test_hessian import by_curvlinops, by_hand, by_pyhessian, problem
from fastfisher import trace_hessian
from fastfisher.measure.logits_form import logits_form

ERRORS = (0.1, 0.03, 0.01)


def seconds(function: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def trained(name: str, steps: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network after so many steps on its 128 images."""
    model, x, y = problem(name)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def rows(name: str, steps: int) -> list[str]:
    """One line for each way to Tr(H) of one network."""
    model, x, y = trained(name, steps)

    def plain() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    plain()
    step = statistics.median(seconds(plain) for _ in range(5))
    exact = logits_form(model, dict(model.named_parameters()), x).curved is None
    best = "fisher" if exact else "split"
    spread, value = {}, {}
    kinds = [("hutchinson", "gaussian"), ("hutchinson", "rademacher"), ("reduced", "gaussian"), (best, "gaussian")]
    for kind in kinds:
        torch.manual_seed(1)
        estimate = trace_hessian(model, x, y, method=kind[0], distribution=kind[1], probes=60)  # type: ignore[arg-type]
        spread[kind], value[kind] = estimate.standard_error * math.sqrt(estimate.draws), estimate.value
    trace = value[best, "gaussian"]

    def ours(method: Any) -> Callable[[int], Any]:
        return lambda probes: trace_hessian(model, x, y, method=method, probes=probes)

    ways: dict[str, tuple[Callable[[int], Any], tuple[str, str]]] = {
        f'trace_hessian, "auto" (here: {best})': (ours("auto"), (best, "gaussian")),
        'trace_hessian, "reduced"': (ours("reduced"), ("reduced", "gaussian")),
        'trace_hessian, "hutchinson"': (ours("hutchinson"), ("hutchinson", "gaussian")),
        "double backprop by hand": (lambda n: by_hand(model, x, y, n), ("hutchinson", "gaussian")),
        "PyHessian": (lambda n: by_pyhessian(model, x, y, n), ("hutchinson", "rademacher")),
        "curvlinops": (lambda n: by_curvlinops(model, x, y, n), ("hutchinson", "rademacher")),
    }
    title = f"{name}, {'at initialisation' if steps == 0 else f'after {steps} steps'}, Tr(H) = {trace:.4g}"
    lines = []
    for way, (function, kind) in ways.items():
        few, many = seconds(lambda f=function: f(1)) / step, seconds(lambda f=function: f(5)) / step
        probe = max(0.0, (many - few) / 4)
        fixed = max(0.0, few - probe)
        counts = [max(1.0, (spread[kind] / (error * trace)) ** 2) for error in ERRORS]
        costs = " ".join(f"{fixed + count * probe:.3g} |" for count in counts)
        lines.append(f"| {title} | {way} | {probe:.2f} | {fixed:.1f} | {spread[kind] / abs(trace):.2f} | {costs}")
    return lines


def main() -> None:
    """Measures and writes the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [
        f"Measured on {machine()} by `python -m bench.trace_error`, in processor time.",
        "Costs are in plain steps: a probe and what comes before it are timed, the number of probes for an error",
        "follows from the measured spread of one.",
        "",
        "| network, 128 images | way | a probe | before it | spread of a probe / Tr(H) | to 10 % | to 3 % | to 1 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [(name, steps) for name in ("SimpleCNN", "ResNet + BN", "GELU CNN") for steps in (0, 30)]
    for case in tqdm(cases, unit="network"):
        lines += rows(*case)
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "trace_error.md").write_text(text)


if __name__ == "__main__":
    main()
