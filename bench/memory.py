"""Peak memory of one step, each in a process of its own: ``python -m bench.memory``.

The figure is the growth of the resident set's peak over model and data. Every block above 64 KiB is mapped for itself
(MALLOC_MMAP_THRESHOLD_), so that what is counted is what is alive, not how the allocator keeps what was freed.
Promises: the finite-difference paths take at most 1.15 times a plain step plus two copies of the parameters; Tr(F) with
drawn labels at most 1.3 times a plain step; Tr(H) by Hutchinson's method no more than the better of its peers.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.conftest import RESULTS

# Options of FisherPenalty.
PENALTIES: dict[str, dict[str, Any]] = {
    "finite difference": {"every": 1},
    "finite difference, every 10": {"every": 10},
    "mixed": {"every": 1, "mixed": True},
    "free gates": {"every": 1, "gates": "free"},
    "GP": {"every": 1, "labels": "true"},
    "double backprop": {"every": 1, "method": "double_backprop"},
}
TRACES = ("sampled", "rademacher", "exact")
NORMS = ("loop", "vmap", "backpack", "opacus", "nngeometry", "asdl")
HESSIANS = ("fastfisher", "by hand", "PyHessian", "curvlinops")
METHODS = (
    "plain",
    *PENALTIES,
    *(f"Tr(F), {labels} labels" for labels in TRACES),
    *(f"Tr(F) by {peer}" for peer in NORMS),
    *(f"Tr(H), Hutchinson, {who}" for who in HESSIANS),
)


def step(method: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """What a method does in one step."""
    from bench import peers, test_hessian
    from fastfisher import FisherPenalty, trace_fisher, trace_hessian

    if method == "plain":
        return lambda: F.cross_entropy(model(x), y).backward()
    if method in PENALTIES:
        penalty = FisherPenalty(model, 0.01, **PENALTIES[method])
        return lambda: penalty.backward(x, y)
    kind = method.split(", ")[-1].removeprefix("Tr(F) by ").removesuffix(" labels")
    if kind in TRACES:
        return lambda: trace_fisher(model, x, labels=kind)  # type: ignore[arg-type]
    if kind in NORMS:
        return getattr(peers, kind)(model.eval(), x, y)
    if kind == "fastfisher":
        return lambda: trace_hessian(model, x, y, method="hutchinson", probes=2)
    if kind == "by hand":
        return lambda: test_hessian.by_hand(model.eval(), x, y, 2)
    return lambda: test_hessian.RIVALS[kind][0](model.eval(), x, y, 2)


def peak(name: str, method: str) -> tuple[float, float]:
    """MiB above the start after two steps, and MiB of the parameters; NaN where the method refuses the network."""
    from bench.networks import network

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, x, y = network(name), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    F.cross_entropy(model(x[:2]), y[:2]).backward()  # libraries load what they need
    try:
        run = step(method, model, x, y)
    except NotImplementedError:
        return math.nan, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def limit(method: str, mib: dict[str, float], parameters: float) -> float | None:
    """What was promised, in MiB."""
    if method == "Tr(H), Hutchinson, fastfisher":
        return min(mib[f"Tr(H), Hutchinson, {who}"] for who in ("PyHessian", "curvlinops"))
    if method in ("Tr(F), sampled labels", "Tr(F), rademacher labels"):
        return 1.3 * mib["plain"]
    if method in PENALTIES and method != "double backprop":
        return 1.15 * mib["plain"] + 2 * parameters
    return None


def main() -> None:
    """Prints the table in Markdown and writes it to bench/results/."""
    lines = ["Peak memory by `python -m bench.memory`.", "", "| network | step | peak, MiB | limit, MiB | met |"]
    lines.append("|---|---|---|---|---|")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in ("SimpleCNN", "VGG-11", "ResNet + BN"):
        mib: dict[str, float] = {}
        parameters = 0.0
        for method in METHODS:
            command = [sys.executable, "-m", "bench.memory", name, method]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            mib[method], parameters = json.loads(run.stdout.splitlines()[-1])
        for method, found in mib.items():
            promised = limit(method, mib, parameters)
            bar, met = ("", "") if promised is None else (f"{promised:.0f}", "yes" if found <= promised else "**no**")
            shown = "refuses BatchNorm" if math.isnan(found) else f"{found:.0f}"
            lines.append(f"| {name} | {method} | {shown} | {bar} | {met} |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.md").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(peak(sys.argv[1], sys.argv[2])))
    else:
        main()
