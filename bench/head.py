"""Peak memory and time of the last layer and its loss at a large vocabulary: ``python -m bench.head``.

2,048 tokens, 131,072 classes, hidden states of 64, float32: loss and gradients of hidden states and weight; and a step
with the Fisher penalty of a small transformer on 1,024 tokens and 32,768 classes. Each way in a process of its own;
memory is the growth of the resident set's peak, as in ``bench/memory.py``, time the median of three calls in processor
seconds on one thread. Promise: the chunked head takes at most an eighth of the plain way's memory, and a step with the
penalty by it at most a third of that by the logits.
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
from torch import Tensor, nn
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


class Body(nn.Module):
    """A transformer of one layer up to its hidden states, whose embedding is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32_768, 64)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """The hidden states."""
        hidden: Tensor = self.layer(self.embedding(tokens))
        return hidden


class Whole(nn.Module):
    """The same with its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        return self.body(tokens) @ self.body.embedding.weight.T


Step = Callable[[Tensor, Tensor], None]


def by_logits() -> Step:
    """The step of FisherPenalty."""
    penalty = fastfisher.FisherPenalty(Whole(), 0.1, every=1, verify=False)

    def step(tokens: Tensor, following: Tensor) -> None:
        penalty.backward(tokens, following)

    return step


def by_chunks() -> Step:
    """The recipe of docs/language_models.md."""
    body = Body()

    def at_drawn_labels(hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            _, drawn = fastfisher.linear_sample_cross_entropy(hidden, body.embedding.weight, targets)
        return fastfisher.linear_sample_cross_entropy(hidden, body.embedding.weight, drawn, labels="true")[0]

    penalty = fastfisher.GradientPenalty(body, at_drawn_labels, 0.1, verify=False)

    def step(tokens: Tensor, following: Tensor) -> None:
        weight = body.embedding.weight
        loss, _ = fastfisher.linear_sample_cross_entropy(body(tokens), weight, following, labels="true")
        (loss + penalty.term(tokens, following)).backward()

    return step


PENALTY = "FisherPenalty on the logits"
STEPS = {PENALTY: by_logits, f"GradientPenalty by {CHUNKED}": by_chunks}


def measure_step(way: str) -> tuple[float, float]:
    """The same of a step with the penalty."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokens = torch.randint(32_768, (8, 128))
    step = STEPS[way]()
    step(tokens[:1, :4], tokens[:1, 1:5])  # libraries load what they need
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.process_time()
        step(tokens, tokens.roll(-1, 1))
        seconds.append(time.process_time() - start)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, statistics.median(seconds)


def measure(way: str) -> tuple[float, float]:
    """Peak MiB above the start, and seconds."""
    if way in STEPS:
        return measure_step(way)
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
    for way in (*WAYS, *STEPS):
        command = [sys.executable, "-m", "bench.head", way]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found[way] = tuple(json.loads(run.stdout.splitlines()[-1]))
    lines = [
        f"{TOKENS:,} tokens, {CLASSES:,} classes, hidden states of {WIDTH}, float32, one thread, torch "
        f"{torch.__version__}, by `python -m bench.head`: loss and both gradients, the weight's "
        f"({CLASSES * WIDTH * 4 / 2**20:.0f} MiB) included. The penalties: 1,024 tokens, 32,768 classes, a whole step.",
        "",
        "| way | peak, MiB | limit, MiB | met | processor s |",
        "|---|---|---|---|---|",
    ]
    for way, (mib, seconds) in found.items():
        limit = {CHUNKED: found[PLAIN][0] / SHARE, "GradientPenalty": found[PENALTY][0] / 3}.get(way.split(" ")[0])
        bar = "" if limit is None else f"{limit:.0f}"
        met = "" if limit is None else "yes" if mib <= limit else "**no**"
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
