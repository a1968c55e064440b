"""Peak memory of one step, each in a process of its own: ``python -m bench.memory``.

The figure is the growth of the resident set's peak over model and data. Every block above 64 KiB is mapped for itself
(MALLOC_MMAP_THRESHOLD_), so that what is counted is what is alive, not how the allocator keeps what was freed.
Promises: the finite-difference paths take at most 1.15 times a plain step plus two copies of the parameters; Tr(F) with
drawn labels at most 1.3 times a plain step.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "finite difference": {"every": 1},
    "finite difference, every 10": {"every": 10},
    "mixed": {"every": 1, "mixed": True},
    "free gates": {"every": 1, "gates": "free"},
    "GP": {"every": 1, "labels": "true"},
    "double backprop": {"every": 1, "method": "double_backprop"},
    "Tr(F), sampled labels": {"labels": "sampled"},
    "Tr(F), exact labels": {"labels": "exact"},
}


def peak(name: str, method: str, options: dict[str, Any] | None) -> tuple[float, float]:
    """MiB above the start after three steps, and MiB of the parameters."""
    from bench.networks import network
    from fastfisher import FisherPenalty, trace_fisher

    torch.manual_seed(0)
    model, x, y = network(name), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    F.cross_entropy(model(x[:2]), y[:2]).backward()  # libraries load what they need
    trace = method.startswith("Tr(F)")
    penalty = FisherPenalty(model, 0.01, **options) if options is not None and not trace else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        if trace:
            trace_fisher(model, x, **(options or {}))
        elif penalty is None:
            F.cross_entropy(model(x), y).backward()
        else:
            penalty.backward(x, y)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def main() -> None:
    """Prints the table in Markdown and writes it to bench/results/."""
    lines = ["Peak memory by `python -m bench.memory`.", "", "| network | step | peak, MiB | limit, MiB | met |"]
    lines.append("|---|---|---|---|---|")
    for name in ("SimpleCNN", "VGG-11", "ResNet + BN"):
        plain = 0.0
        for method in METHODS:
            command = [sys.executable, "-m", "bench.memory", name, method]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            mib, parameters = json.loads(run.stdout)
            plain = mib if method == "plain" else plain
            limit = 1.3 * plain if method.startswith("Tr(F)") else 1.15 * plain + 2 * parameters
            promised = method not in ("plain", "double backprop", "Tr(F), exact labels")
            met = ("yes" if mib <= limit else "**no**") if promised else ""
            lines.append(f"| {name} | {method} | {mib:.0f} | {f'{limit:.0f}' if promised else ''} | {met} |")
    text = "\n".join(lines) + "\n"
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "memory.md").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(peak(sys.argv[1], sys.argv[2], METHODS[sys.argv[2]])))
    else:
        main()
