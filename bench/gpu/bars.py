"""What was promised of the figures: for each its section, its name, its unit, and the bar.

A figure without a bar is there to compare with. A test sees to it that every figure that is named here is measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Bar(NamedTuple):
    """A promise about a number."""

    sign: str
    value: float

    def __str__(self) -> str:
        """As in "≥ 85"."""
        return f"{self.sign} {self.value:g}"

    def met(self, value: float) -> bool:
        """Whether a number keeps it."""
        return value >= self.value if self.sign == "≥" else value <= self.value


def at_least(value: float) -> Bar:
    """A number that should be large."""
    return Bar("≥", value)


def at_most(value: float) -> Bar:
    """A number that should be small."""
    return Bar("≤", value)


OF_COPY = "% of copy bandwidth"
OVER_EAGER = "times faster than eager PyTorch"
OF_PLAIN = "times a plain step"
OF_PLAIN_GRAPH = "times a plain step in a graph"
OVER_LAUNCHED = "times faster than without graphs"
OF_PASS = "times a forward and backward"
OVER_ALONE = "times the throughput of one at a time"

SAMPLE, PUBLIC, LISTS = "sample_cross_entropy", "sample_cross_entropy, public call with backward", "lists of tensors"
TRACES, STEPS, TESTS, SEEDS, SANITIZER = "Tr(F)", "training steps", "tests", "many seeds", "compute-sanitizer"
NETWORKS = ("SimpleCNN", "VGG-11", "WResNet-44-3", "DenseNet-40-12")
LABELS = ("sampled", "rademacher")

BARS: dict[tuple[str, str, str], Bar] = {
    (TESTS, "failed", "tests"): at_most(0),
    (TESTS, "with spilled registers", "kernels"): at_most(0),
    (SAMPLE, "1000 classes, bfloat16", OF_COPY): at_least(60),
    (SAMPLE, "1000 classes, float32", OF_COPY): at_least(85),
    **{
        (SAMPLE, f"{classes} classes, {dtype}", OF_COPY): at_least(85)
        for classes in (32_768, 50_257, 131_072)
        for dtype in ("bfloat16", "float32")
    },
    (PUBLIC, "128x10, float32", OVER_EAGER): at_least(2.5),
    (PUBLIC, "128x1000, float32", OVER_EAGER): at_least(8),
    (LISTS, "perturb, rademacher", OF_COPY): at_least(85),
    (LISTS, "probe_dot, rademacher", OF_COPY): at_least(85),
    (LISTS, "axpy_diff", OF_COPY): at_least(85),
    **{(TRACES, f"{name}, {labels} labels", OF_PASS): at_most(1.1) for name in NETWORKS for labels in LABELS},
    **{(STEPS, f"{name}, reusing", OF_PLAIN): at_most(1.15) for name in NETWORKS},
    **{(STEPS, f"{name}, every 10", OF_PLAIN): at_most(1.4) for name in NETWORKS},
    **{(STEPS, f"{name}, every 10, graphs", OF_PLAIN_GRAPH): at_most(1.2) for name in NETWORKS},
    **{
        (STEPS, f"SimpleCNN, {kind}, graphs", OVER_LAUNCHED): at_least(2.5) for kind in ("plain", "every 10", "every 1")
    },
    (SEEDS, "SimpleCNN, 32 seeds, 32 together", OVER_ALONE): at_least(4),
    (SANITIZER, "memcheck", "exit code"): at_most(0),
    (SANITIZER, "racecheck", "exit code"): at_most(0),
}
