"""Peak memory and time of the last layer and its loss at a large vocabulary: ``python -m bench.head``.

2,048 tokens, 131,072 classes, hidden states of 64, float32: loss and gradients of hidden states and weight. Each way
in a process of its own; memory is the growth of the resident set's peak, as in ``bench/memory.py``, time the median of
three calls in processor seconds on one thread. Promise: the chunked head takes at most an eighth of the plain way's
memory.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fastfisher
from bench.conftest import RESULTS

TOKENS, CLASSES, WIDTH = 2048, 131_072, 64
SHARE = 8
CHUNKED, PLAIN = "linear_sample_cross_entropy", "linear, then sample_cross_entropy"
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    PLAIN: lambda h, w, y: fastfisher.sample_cross_entropy(F.linear(h, w))[0],
    CHUNKED: lambda h, w, y: fastfisher.linear_sample_cross_entropy(h, w)[0],
    "linear, then F.cross_entropy at true labels": lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
    f"{CHUNKED} at true labels": lambda h, w, y: fastfisher.linear_sample_cross_entropy(h, w, y, labels="true")[0],
}


def measure(way: str) -> tuple[float, float]:
    """Peak MiB above the start, and seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden = torch.randn(TOKENS, WIDTH).requires_grad_()
    weight = (torch.randn(CLASSES, WIDTH) / 8).requires_grad_()
    targets = torch.randint(CLASSES, (TOKENS,))
    WAYS[way](hidden[:2], weight[:50], targets[:2] % 50).backward()  # libraries load what they need
    weight.grad = hidden.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        weight.grad = hidden.grad = None
        start = time.process_time()
        WAYS[way](hidden, weight, targets).backward()
        seconds.append(time.process_time() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024, statistics.median(seconds)


def main() -> None:
    """Prints the table in Markdown and writes it to bench/results/."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, tuple[float, float]] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "bench.head", way]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found[way] = tuple(json.loads(run.stdout.splitlines()[-1]))
    lines = [
        f"{TOKENS:,} tokens, {CLASSES:,} classes, hidden states of {WIDTH}, float32, one thread, torch "
        f"{torch.__version__}, by `python -m bench.head`: loss and both gradients, the weight's "
        f"({CLASSES * WIDTH * 4 / 2**20:.0f} MiB) included.",
        "",
        "| way | peak, MiB | limit, MiB | met | processor s |",
        "|---|---|---|---|---|",
    ]
    for way, (mib, seconds) in found.items():
        bar = f"{found[PLAIN][0] / SHARE:.0f}" if way.startswith(CHUNKED) else ""
        met = "" if not bar else "yes" if mib <= found[PLAIN][0] / SHARE else "**no**"
        lines.append(f"| {way} | {mib:.0f} | {bar} | {met} | {seconds:.1f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "head.md").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
