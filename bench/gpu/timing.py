"""How a figure is measured: in turn with what it is compared to, A B A B, as a ratio of medians with its spread.

Three clocks:

- the GPU's own, between two events, with the cache emptied before each call (the default). The launch counts only where
  it keeps the GPU waiting;
- the same around the replay of a graph (``graph``), captured beforehand: no launch counts;
- the host's, over ``repeat`` calls from an idle GPU to an idle GPU: every launch counts, as it does in a training loop.

The cache is emptied by reading another buffer; writing one would leave lines that the call has to write back first.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.bars import OF_COPY
from bench.gpu.report import Figure

Call = Callable[[], object]


@dataclass(frozen=True)
class CudaTimer:
    """Time on the GPU's clock."""

    def wait(self) -> None:
        """Until everything launched has run."""
        torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, first: Any, last: Any) -> float:
        """Between two marks, after a wait."""
        return float(first.elapsed_time(last))

    def captured(self, call: Call) -> Call:
        """The call as a graph to replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


@dataclass(frozen=True)
class HostTimer:
    """The same on the CPU, for a dry run."""

    def wait(self) -> None:
        """Everything has run."""

    def mark(self) -> Any:
        """A point in time."""
        return time.perf_counter()

    def milliseconds(self, first: Any, last: Any) -> float:
        """Between two marks."""
        return float(1e3 * (last - first))

    def captured(self, call: Call) -> Call:
        """The call: the CPU has no graphs."""
        return call


@dataclass(frozen=True)
class Setting:
    """Where and at which sizes everything is measured."""

    out: Path
    device: str = "cuda"
    timer: CudaTimer | HostTimer = field(default_factory=CudaTimer)
    dry: bool = False
    elements: int = 2**28
    """Of an input where bandwidth counts: 1 GiB of float32."""
    examples: int = 256
    """Whose gradients' norms are measured in one call of the operators."""
    batch: int = 128
    """Of a training step."""
    seconds: float = 0.3
    """What each contender of a race gets, after ``warm`` calls and for at least ``rounds``."""
    warm: int = 3
    rounds: int = 5
    flushed: int = 2**26
    """Elements of float32 read to empty the cache: 256 MiB, twice the largest L2."""
    backend: str = "inductor"
    """Of torch.compile."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under torch.compile."""
        return torch.compile(function, dynamic=False, backend=self.backend)  # type: ignore[no-any-return, unused-ignore]

    def size(self, full: int) -> int:
        """One side of an input: its own, or in a dry run at most 4."""
        return min(full, 4) if self.dry else full

    def rows(self, classes: int) -> int:
        """Of a matrix with so many columns that is large."""
        return max(1, self.elements // classes)


def on_this_gpu(out: Path) -> Setting:
    """The sizes for the GPU at hand: no case holds more than some 16 of its inputs of 4-byte elements."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return Setting(out, elements=min(2**28, 2 ** ((memory // 64).bit_length() - 1)))


def dry_run(out: Path) -> Setting:
    """Sizes that show that the code runs, on a CPU in seconds."""
    return Setting(
        out, device="cpu", timer=HostTimer(), dry=True, elements=2**12, examples=1, batch=2, seconds=0, warm=1,
        rounds=2, flushed=2**10, backend="eager",
    )  # fmt: skip


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A part of a section that succeeds or fails by itself."""

    call: int
    section: str
    function: Callable[..., Iterator[Figure]]
    arguments: dict[str, Any]
    limit: float
    """Seconds after which it is given up."""

    def figures(self, at: Setting) -> Iterator[Figure]:
        """Measures it."""
        return self.function(at, **self.arguments)

    def __str__(self) -> str:
        """What the table says where it fails."""
        return ", ".join([self.function.__name__, *map(str, self.arguments.values())])


CASES: list[Case] = []


def case(call: int, section: str, *, limit: float = 90, **grid: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Adds a function that yields figures, once for each choice of arguments from ``grid``."""

    def add(function: Callable[..., Iterator[Figure]]) -> Callable[..., Iterator[Figure]]:
        for values in itertools.product(*grid.values()):
            CASES.append(Case(call, section, function, dict(zip(grid, values, strict=True)), limit))
        return function

    return add


# ---- races ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """What ours is compared with, and the number that makes of both times."""

    unit: str
    call: Call
    value: Callable[[float, float], float]
    """Of our milliseconds and the rival's."""


def faster(than: str, call: Call, times: float = 1) -> Rival:
    """How many times ours is as fast; the rival's time counts ``times``."""
    return Rival(f"times faster than {than}", call, lambda ours, theirs: times * theirs / ours)


def cost(of: str, call: Call) -> Rival:
    """How many times ours costs what the rival does."""
    return Rival(f"times {of}", call, lambda ours, theirs: ours / theirs)


def of_copy(at: Setting, moved: int) -> Rival:
    """Which part of a copy's bandwidth ours reaches, where ``moved`` bytes must be read or written."""
    x, y = _copied(at.elements, at.device)
    return Rival(OF_COPY, lambda: y.copy_(x), lambda ours, copy: 100 * (moved / ours) / (2 * x.nbytes / copy))


@functools.cache
def _copied(elements: int, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(elements, device=device)
    return x, torch.empty_like(x)


@functools.cache
def _filler(elements: int, device: str) -> Tensor:
    return torch.randn(elements, device=device)


def late(make: Callable[[], Call]) -> Call:
    """A call that is made when it is first called, so that one that cannot be made costs its own figure only."""
    made = functools.cache(make)
    return lambda: made()()


def race(at: Setting, name: str, ours: Call, *rivals: Rival, graph: bool = False, repeat: int = 0) -> Iterator[Figure]:
    """The time of ``ours``, and what it makes beside each rival's. A rival that fails costs its own figure.

    Args:
        graph: replay graphs of the calls instead.
        repeat: measure on the host's clock, over so many calls each; 0 for the GPU's.
    """
    calls = {"": _ready(at, ours, graph)}
    for rival in rivals:
        try:
            calls[rival.unit] = _ready(at, rival.call, graph)
        except Exception as error:
            yield Figure(name, rival.unit, error=said(error))
    watch = watched()
    times: dict[str, list[float]] = {unit: [] for unit in calls}
    begin = time.monotonic()
    while len(times[""]) < at.rounds or (len(times[""]) < 200 and time.monotonic() - begin < at.seconds * len(calls)):
        for unit, ms in _on_the_host(at, calls, repeat) if repeat else _on_the_device(at, calls):
            times[unit].append(ms)
    gpu, mine = watch(), times[""]
    unit = "ms, launches included" if repeat else "ms in a graph" if graph else "ms"
    yield Figure(name, unit, statistics.median(mine), *quartiles(mine), gpu=gpu)
    for rival in (rival for rival in rivals if rival.unit in times):
        theirs = times[rival.unit]
        value = rival.value(statistics.median(mine), statistics.median(theirs))
        yield Figure(name, rival.unit, value, *quartiles(list(map(rival.value, mine, theirs))), gpu=gpu)


def _ready(at: Setting, call: Call, graph: bool) -> Call:
    """The call after its compilation and its library's choice of algorithms, and captured where it shall be."""
    for _ in range(at.warm):
        call()
    at.timer.wait()
    return at.timer.captured(call) if graph else call


def _on_the_device(at: Setting, calls: dict[str, Call]) -> Iterator[tuple[str, float]]:
    """A few rounds, launched without a wait between them."""
    marks = []
    for unit, call in list(calls.items()) * min(5, at.rounds):
        _filler(at.flushed, at.device).sum()
        first = at.timer.mark()
        call()
        marks.append((unit, first, at.timer.mark()))
    at.timer.wait()
    for unit, first, last in marks:
        yield unit, at.timer.milliseconds(first, last)


def _on_the_host(at: Setting, calls: dict[str, Call], repeat: int) -> Iterator[tuple[str, float]]:
    """A round."""
    for unit, call in calls.items():
        at.timer.wait()
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        at.timer.wait()
        yield unit, 1e3 * (time.perf_counter() - begin) / repeat


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def said(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def watched() -> Callable[[], str]:
    """Asks nvidia-smi for clocks, power and temperature without waiting; call the result for its answer, if any."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return str
    query = ["--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader", "--id=0"]
    asked = subprocess.Popen([tool, *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def answer() -> str:
        try:
            return asked.communicate(timeout=10)[0].strip()
        except subprocess.TimeoutExpired:
            asked.kill()
            return ""

    return answer
