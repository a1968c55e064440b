"""How a promise is measured: in one process, interleaved with what it is compared to, as a ratio of medians.

The clock is wall time, on all threads; ``--benchmark-timer=time.process_time`` makes it processor time on one thread,
for a machine that others use meanwhile. Every round of the benchmark first times each rival once and then the
candidate, so that a change in the machine's load hits all of them. A ratio's spread is the interquartile range of the
ratios within single rounds. The tables of all ratios are printed at the end, and written to ``bench/results`` where no
test was left out.
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
# Which groups a file of results holds, by how their names begin. It is written when there are rows of each.
FILES = {
    "cpu": ("sample_cross_entropy", "sample_binary_cross_entropy", "one training step"),
    "traces": ("Tr(F)",),
    "hessian": ("Tr(H)",),
}


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
class Refusal:
    """A rival that does not do what is measured, and why."""

    group: str
    name: str
    reason: str

    def line(self) -> str:
        """The row in Markdown."""
        return f"| {self.name} |  | {self.reason} |  |  |  |  |"


@dataclass(frozen=True)
class Bar:
    """A promise about a ratio: "rival/candidate ≥ value" (a speed-up) or "candidate/rival ≤ value" (a cost)."""

    value: float | None
    speedup: bool


ROWS: list[Row | Refusal] = []


def in_processor_time(config: pytest.Config) -> bool:
    """Whether the clock is processor time."""
    return str(config.getoption("benchmark_timer")) == "time.process_time"


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Measures a candidate against rivals and notes the ratios (see the module)."""
    clock = time.process_time if in_processor_time(request.config) else time.perf_counter
    threads = torch.get_num_threads()
    if clock is time.process_time:
        torch.set_num_threads(1)

    def timed(function: Callable[[], Any], repeat: int) -> float:
        """Seconds per call, over ``repeat`` calls."""
        start = clock()
        for _ in range(repeat):
            function()
        return (clock() - start) / repeat

    def run(
        group: str,
        name: str,
        candidate: Callable[[], Any],
        rivals: dict[str, tuple[Callable[[], Any], Bar]],
        *,
        rounds: int = 11,
        repeat: int = 1,
        warmup: int = 2,
    ) -> None:
        seconds: dict[str, list[float]] = {rival: [] for rival in rivals}
        for function in (candidate, *(function for function, _ in rivals.values())):
            for _ in range(max(warmup, repeat // 10)):
                function()

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
    torch.set_num_threads(threads)


def machine(threads: int | None = None) -> str:
    """Processor, threads and versions, as they belong beside a figure."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    count = threads or torch.get_num_threads()
    kept = ", freed memory kept by the allocator" if "MALLOC_TRIM_THRESHOLD_" in os.environ else ""
    used = f"{count} thread{'s' * (count > 1)}"
    return f"{model}, {used}, torch {torch.__version__}, Python {platform.python_version()}{kept}"


def table(rows: list[Row | Refusal]) -> str:
    """The rows in Markdown, a table for each group."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += [
            f"### {group}",
            "",
            "| what | ms | ratio | median | quartiles | bar | met |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row.line() for row in rows if row.group == group] + [""]
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the tables and writes them."""
    if not ROWS:
        return
    if in_processor_time(config):
        head = f"Measured on {machine(1)} by `make bench TIMER=time.process_time`, in processor time on one thread.\n\n"
    else:
        head = f"Measured on {machine()} by `make bench`, in wall time.\n\n"
    terminalreporter.write_line("\n" + head + table(ROWS))
    if config.option.keyword or any("::" in argument for argument in config.args):
        return  # a part would replace the whole
    for file, beginnings in FILES.items():
        rows = [row for row in ROWS if row.group.startswith(beginnings)]
        if all(any(row.group.startswith(beginning) for row in rows) for beginning in beginnings):
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{file}.md").write_text(head + table(rows))
