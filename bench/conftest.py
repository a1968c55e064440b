"""How a promise is measured: in one process, interleaved with what it is compared to, as a ratio of medians.

The clock is wall time, on all threads. Every round of the benchmark first times each rival once and then the candidate,
so that a change in the machine's load hits all of them. A ratio's spread is the interquartile range of the ratios
within single rounds. The table of all ratios is printed at the end and written to ``bench/results/cpu.md``.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One ratio and the bar it was promised to keep."""

    group: str
    name: str
    candidate_ms: float
    rival: str
    ratio: float
    low: float
    high: float
    bar: float | None
    at_least: bool

    def line(self) -> str:
        """The row in Markdown."""
        sign = "≥" if self.at_least else "≤"
        bar = "" if self.bar is None else f"{sign} {self.bar:g}"
        met = "" if self.bar is None else "yes" if (self.ratio >= self.bar) == self.at_least else "**no**"
        spread = f"{self.low:.2f}–{self.high:.2f}"
        return f"| {self.name} | {self.candidate_ms:.3g} | {self.rival} | {self.ratio:.2f} | {spread} | {bar} | {met} |"


@dataclass(frozen=True)
class Bar:
    """A promise about a ratio: "rival/candidate ≥ value" (a speed-up) or "candidate/rival ≤ value" (a cost)."""

    value: float | None
    speedup: bool


ROWS: list[Row] = []


def timed(function: Callable[[], Any], repeat: int) -> float:
    """Seconds per call, over ``repeat`` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - start) / repeat


@pytest.fixture
def compare(benchmark: Any) -> Iterator[Callable[..., None]]:
    """Measures a candidate against rivals and notes the ratios (see the module)."""

    def run(
        group: str,
        name: str,
        candidate: Callable[[], Any],
        rivals: dict[str, tuple[Callable[[], Any], Bar]],
        *,
        rounds: int = 11,
        repeat: int = 1,
    ) -> None:
        seconds: dict[str, list[float]] = {rival: [] for rival in rivals}
        for function in (candidate, *(function for function, _ in rivals.values())):
            timed(function, max(2, repeat // 10))

        def time_rivals() -> None:
            for rival, (function, _) in rivals.items():
                seconds[rival].append(timed(function, repeat))

        own: list[float] = []
        benchmark.group = group
        benchmark.name = name
        benchmark.pedantic(lambda: own.append(timed(candidate, repeat)), setup=time_rivals, rounds=rounds)
        for rival, (_, bar) in rivals.items():
            top, bottom = (seconds[rival], own) if bar.speedup else (own, seconds[rival])
            ratios = sorted(a / b for a, b in zip(top, bottom, strict=True))
            quartile = len(ratios) // 4
            ROWS.append(
                Row(
                    group,
                    name,
                    statistics.median(own) * 1e3,
                    ("times faster than " if bar.speedup else "times the cost of ") + rival,
                    statistics.median(top) / statistics.median(bottom),
                    ratios[quartile],
                    ratios[-1 - quartile],
                    bar.value,
                    bar.speedup,
                )
            )

    yield run


def machine() -> str:
    """Processor, cores, threads and versions, as they belong beside a figure."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    kept = ", freed memory kept by the allocator" if "MALLOC_TRIM_THRESHOLD_" in os.environ else ""
    threads = f"{torch.get_num_threads()} threads"
    return f"{model}, {threads}, torch {torch.__version__}, Python {platform.python_version()}{kept}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table and writes it."""
    if not ROWS:
        return
    lines = [f"Measured on {machine()} by `make bench`, in wall time.", ""]
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += [
            f"### {group}",
            "",
            "| what | ms | ratio | median | quartiles | bar | met |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row.line() for row in ROWS if row.group == group] + [""]
    text = "\n".join(lines)
    terminalreporter.write_line("\n" + text)
    if {row.group for row in ROWS} >= {"sample_cross_entropy", "one training step"}:  # a part would replace the whole
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.md").write_text(text)
