"""Everything that needs a GPU, in one program of a few minutes that builds nothing: ``make gpu``.

It runs the GPU tests and then measures, section by section, each figure beside the bar that it was promised to keep.
Every section writes its figures at once, to ``bench/results/<device>.json`` and to a table in Markdown beside it. One
that fails is recorded with its error and the next goes on; one that would begin too late is left out, and says so. To
add a section, write a function under ``@section``.

Times are medians on the GPU's own clock, with the cache cleared before each repetition; what a launch costs counts only
where it keeps the GPU waiting. "In a graph" means captured once and replayed: no launch counts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import ops, reference
from fastfisher.training.networks import build_network

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DEVICE = "cuda"
LARGE = 2**24
"""Logits from which on a figure is about bandwidth."""
PARAMETERS, TENSORS = 100_000_000, 200
EXAMPLES = 5000
SECONDS = 540.0
"""Sections that have not begun by then are left out."""


@dataclass(frozen=True)
class Figure:
    """One number and the bar it was promised to keep, if any."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = True

    def line(self, section: str) -> str:
        """The figure as a row of the table."""
        bar = "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {self.bar:g}"
        met = "" if self.bar is None else "yes" if (self.value >= self.bar) == self.at_least else "**no**"
        return f"| {section} | {self.name} | {self.value:.3g} | {self.unit} | {bar} | {met} |"


@dataclass
class Report:
    """What has been found so far, and where it is written."""

    path: Path
    machine: dict[str, str]
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Writes everything, as JSON and as a table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figures = {name: [asdict(figure) for figure in found] for name, found in self.figures.items()}
        content = {"machine": self.machine, "figures": figures, "failures": self.failures}
        self.path.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self.path.with_suffix(".md").write_text(self.table())

    def table(self) -> str:
        """The table in Markdown."""
        lines = ["Measured on " + ", ".join(f"{key} {value}" for key, value in self.machine.items()) + ".", ""]
        lines += ["| section | what | figure | unit | bar | met |", "|---|---|---|---|---|---|"]
        lines += [figure.line(name) for name, found in self.figures.items() for figure in found]
        lines += [f"| {name} |  |  | failed: {error.splitlines()[-1]} |  |  |" for name, error in self.failures.items()]
        return "\n".join(lines) + "\n"


Section = Callable[[], Iterator[Figure]]
SECTIONS: dict[str, Section] = {}


def section(name: str) -> Callable[[Section], Section]:
    """Adds a function that yields figures to what is measured."""

    def add(function: Section) -> Section:
        SECTIONS[name] = function
        return function

    return add


def run(report: Report, sections: dict[str, Section], seconds: float = SECONDS) -> None:
    """Runs the sections in order; each one's figures and failure are written before the next begins."""
    start = time.monotonic()
    for name, function in sections.items():
        found = report.figures.setdefault(name, [])
        if time.monotonic() - start > seconds:
            report.failures[name] = f"left out: {seconds:g} s had passed"
        else:
            try:
                for figure in function():
                    found.append(figure)
                    print(figure.line(name), flush=True)
            except Exception as error:
                report.failures[name] = f"{traceback.format_exc()}{type(error).__name__}: {error}".strip()
                print(report.failures[name], flush=True)
        report.write()


# ---- measuring ------------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[], object], *, graph: bool = False, seconds: float = 0.15) -> float:
    """The median time of a call on the GPU, of at least 5 and about as many as fill ``seconds``."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    cache = torch.empty(2**28, dtype=torch.int8, device=DEVICE)
    times: list[float] = []
    begin = time.monotonic()
    while len(times) < 5 or (len(times) < 200 and time.monotonic() - begin < seconds):
        pairs = []
        for _ in range(5):
            cache.zero_()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            function()
            last.record()
            pairs.append((first, last))
        torch.cuda.synchronize()
        times += [first.elapsed_time(last) for first, last in pairs]
    return statistics.median(times)


_copied: dict[str, float] = {}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB, measured once."""
    if DEVICE not in _copied:
        x = torch.empty(min(2**28, 16 * LARGE), device=DEVICE)
        y = torch.empty_like(x)
        _copied[DEVICE] = 2 * x.nbytes / (milliseconds(lambda: y.copy_(x)) / 1e3)
    return _copied[DEVICE]


def of_copy(name: str, moved: int, ms: float, bar: float | None = None) -> Figure:
    """Which part of the copy bandwidth is reached where ``moved`` bytes must be read or written."""
    return Figure(name, 100 * moved / (ms / 1e3) / copy_bandwidth(), "% of copy bandwidth", bar)


# ---- sections -------------------------------------------------------------------------------------------------------


@section("tests")
def tests() -> Iterator[Figure]:
    """The GPU tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    print(done.stdout[-6000:], flush=True)
    counted = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    yield Figure("passed", counted.get("passed", 0), "tests", 1)
    yield Figure("failed", counted.get("failed", 0) + counted.get("error", 0), "tests", 0, at_least=False)


@section("copy")
def copy() -> Iterator[Figure]:
    """What all bandwidths are compared with."""
    yield Figure("1 GiB, read and written", copy_bandwidth() / 1e12, "TB/s")


def eager_sample(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled labels, losses and gradient by PyTorch's own functions."""
    logits = logits.detach().requires_grad_()
    labels = torch.multinomial(logits.detach().float().softmax(1), 1).squeeze(1)
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), labels, gradient


def gumbel_sample(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Gumbel argmax and the softmax's gradient written out: what torch.compile fuses best."""
    x = logits.float()
    labels = (x - torch.empty_like(x).exponential_().log()).argmax(1)
    log_p = x.log_softmax(1)
    loss = -log_p.gather(1, labels[:, None]).squeeze(1)
    return loss, labels, (log_p.exp() - F.one_hot(labels, x.shape[1])).to(logits.dtype)


def row_sizes() -> list[tuple[int, int]]:
    """Rows and columns: the sizes of the CPU's benchmark that are small, and those that fill the GPU."""
    large = [(-(-LARGE // classes), classes) for classes in (1000, 32_768, 50_257, 131_072)]
    return [(128, 10), (128, 100), (128, 1000), (4096, 1000), *large]


@section("sample_cross_entropy")
def sample_cross_entropy() -> Iterator[Figure]:
    """The draw with its loss and gradient: bandwidth, eager and torch.compile; small sizes in graphs."""
    key = torch.tensor([1, 2], device=DEVICE)
    large_first = sorted(row_sizes(), key=lambda size: size[0] * size[1] < LARGE)
    for (rows, classes), dtype in itertools.product(large_first, (torch.bfloat16, torch.float32)):
        name = f"{rows}x{classes}, {str(dtype).removeprefix('torch.')}"
        logits = torch.randn(rows, classes, device=DEVICE).to(dtype)
        small = rows * classes < LARGE
        ours = milliseconds(lambda x=logits: ops.sample_cross_entropy(x, key, 1.0), graph=small)
        yield Figure(name, 1e3 * ours, "µs in a graph" if small else "µs")
        if not small:
            yield of_copy(name, 2 * logits.nbytes, ours, 85)
        eager = milliseconds(lambda x=logits: eager_sample(x), graph=small)
        yield Figure(name, eager / ours, "times faster than eager", 8)
        torch._dynamo.reset()
        compiled = torch.compile(gumbel_sample, dynamic=False)
        rival = milliseconds(lambda x=logits, f=compiled: f(x), graph=small)
        yield Figure(name, rival / ours, "times faster than torch.compile", 2)


@section("rows")
def rows() -> Iterator[Figure]:
    """The derivative of the draw and the Rademacher cotangent, where bandwidth counts."""
    key = torch.tensor([1, 2], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float32):
        for count, classes in row_sizes()[4:]:
            name = f"{count}x{classes}, {str(dtype).removeprefix('torch.')}"
            x = torch.randn(count, classes, device=DEVICE).to(dtype)
            _, labels, d = ops.sample_cross_entropy(x, key, 1.0)
            ours = milliseconds(lambda d=d, t=labels, v=x: ops.softmax_hessian_product(d, t, v, 1.0))
            yield of_copy(f"softmax_hessian_product, {name}", 3 * x.nbytes, ours)
            theirs = milliseconds(lambda d=d, t=labels, v=x: reference.softmax_hessian_product(d, t, v, 1.0))
            yield Figure(f"softmax_hessian_product, {name}", theirs / ours, "times faster than eager")
            ours = milliseconds(lambda x=x: ops.rademacher_cotangent(x, key, 1.0))
            yield of_copy(f"rademacher_cotangent, {name}", 2 * x.nbytes, ours)


@section("gates")
def gates() -> Iterator[Figure]:
    """ReLU and max-pool with what their backward needs, against PyTorch's."""
    x = torch.randn(min(2048, LARGE // 8192), 64, 32, 32, device=DEVICE)
    planes, pool = x.flatten(0, 1), (2, 2, 2, 2, True)
    ours = milliseconds(lambda: ops.gate_relu(x))
    yield of_copy("gate_relu", 2 * x.nbytes, ours)
    yield Figure("gate_relu", milliseconds(lambda: F.relu(x)) / ours, "times faster than F.relu")
    bits = ops.gate_relu(x)[1]
    yield of_copy("gate_apply", 2 * x.nbytes, milliseconds(lambda: ops.gate_apply(x, bits)))
    ours = milliseconds(lambda: ops.gate_max_pool(planes, *pool))
    theirs = milliseconds(lambda: F.max_pool2d(x, 2, return_indices=True))
    yield Figure("gate_max_pool", theirs / ours, "times faster than F.max_pool2d with indices")
    values, indices = ops.gate_max_pool(planes, *pool)
    flat, moved = x.view(len(planes), -1), 2 * values.nbytes + x.nbytes
    yield of_copy("gate_take", moved, milliseconds(lambda: ops.gate_take(flat, indices)))
    ours = milliseconds(lambda: ops.gate_put(values, indices, 1024))
    yield of_copy("gate_put", moved, ours)
    pooled, chosen = F.max_pool2d(x, 2, return_indices=True)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    theirs = milliseconds(lambda: backward(pooled, x, [2, 2], [2, 2], [0, 0], [1, 1], False, chosen))
    yield Figure("gate_put", theirs / ours, "times faster than the backward of F.max_pool2d")


@section("lists of tensors")
def lists() -> Iterator[Figure]:
    """Probes and combines over all parameters of a network, against torch._foreach with a probe drawn into memory."""
    x = [torch.randn(PARAMETERS // TENSORS, device=DEVICE) for _ in range(TENSORS)]
    out, other = [torch.empty_like(t) for t in x], [torch.randn_like(t) for t in x]
    key = torch.tensor([1, 2], device=DEVICE)
    size = sum(t.nbytes for t in x)

    def stored_probe(distribution: str) -> list[Tensor]:
        if distribution == "gaussian":
            return [torch.randn_like(t) for t in x]
        return [torch.empty_like(t).bernoulli_().mul_(2).sub_(1) for t in x]

    for distribution in ("gaussian", "rademacher"):
        ours = milliseconds(lambda d=distribution: ops.perturb(out, x, key, 1e-3, d))
        theirs = milliseconds(lambda d=distribution: torch._foreach_add(x, stored_probe(d), alpha=1e-3))
        yield of_copy(f"perturb, {distribution}", 2 * size, ours, 85)
        yield Figure(f"perturb, {distribution}", theirs / ours, "times faster than torch._foreach", 5)
        ours = milliseconds(lambda d=distribution: ops.probe_dot(x, key, d))
        theirs = milliseconds(
            lambda d=distribution: torch.stack([t.sum() for t in torch._foreach_mul(x, stored_probe(d))]).sum()
        )
        yield of_copy(f"probe_dot, {distribution}", size, ours, 85)
        yield Figure(f"probe_dot, {distribution}", theirs / ours, "times faster than torch._foreach", 5)

    scale = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)

    def foreach_axpy_diff() -> Tensor:
        difference = torch._foreach_sub(x, other)
        torch._foreach_add_(out, difference, alpha=0.5)
        return torch.stack(torch._foreach_norm(difference)).square().sum()

    ours = milliseconds(lambda: ops.axpy_diff(out, x, other, scale))
    yield of_copy("axpy_diff", 4 * size, ours)
    yield Figure("axpy_diff", milliseconds(foreach_axpy_diff) / ours, "times faster than torch._foreach")
    ours = milliseconds(lambda: ops.sum_squares(x))
    theirs = milliseconds(lambda: torch.stack(torch._foreach_norm(x)).square().sum())
    yield of_copy("sum_squares", size, ours)
    yield Figure("sum_squares", theirs / ours, "times faster than torch._foreach")


CONVOLUTIONS = [(3, 64, 32), (64, 64, 32), (128, 128, 16), (256, 256, 8), (512, 512, 4)]
"""Channels, outputs and size of 3x3 convolutions, as the networks have them from front to end."""


@section("norms of gradients")
def norms() -> Iterator[Figure]:
    """Norms of per-example gradients by either form, against the batch's weight gradient: as many multiply-adds."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for tf32 in (False, True):
            matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            yield from norms_at("TF32" if tf32 else "float32")
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    a, d = torch.randn(256, 64, 1024, device=DEVICE), torch.randn(256, 64, 1024, device=DEVICE)
    ours = milliseconds(lambda: ops.channel_products(a, d, a[0, :, 0].contiguous()))
    yield of_copy("channel_products", 2 * a.nbytes, ours)


def norms_at(precision: str) -> Iterator[Figure]:
    """The same at one precision."""
    unit, backward = "times the batch's weight gradient", torch.ops.aten.convolution_backward
    same = ([1, 1], [1, 1], [1, 1])
    rest = (None, *same, False, [0, 0], 1, [False, True, False])
    for channels, outputs, size in CONVOLUTIONS:
        a, d = (torch.randn(256, n, size, size, device=DEVICE) for n in (channels, outputs))
        weight = a.new_empty(outputs, channels, 3, 3)
        base = milliseconds(lambda a=a, d=d, w=weight: backward(d, a, w, *rest))
        for gram in (False, True):
            ours = milliseconds(lambda a=a, d=d, g=gram: ops.grad_sqnorm_conv(a, d, [3, 3], *same, 1, g))
            form = "Gram" if gram else "direct"
            yield Figure(f"{channels} to {outputs} at {size}x{size}, {precision}, {form}", ours / base, unit)
    for positions, inputs, outputs in ((16, 512, 512), (256, 512, 512)):
        a, d = (torch.randn(256, positions, n, device=DEVICE) for n in (inputs, outputs))
        base = milliseconds(lambda a=a, d=d: d.flatten(0, 1).mT @ a.flatten(0, 1))
        for gram in (False, True):
            ours = milliseconds(lambda a=a, d=d, g=gram: ops.grad_sqnorm_linear(a, d, g))
            form = "Gram" if gram else "direct"
            yield Figure(f"linear, {positions} positions, {precision}, {form}", ours / base, unit)


NETWORKS = {
    "SimpleCNN": "simple_cnn",
    "VGG-11": "vgg11",
    "WResNet-44-3": "wresnet44_3",
    "DenseNet-40-12": "densenet40_12",
}


def network(name: str) -> nn.Module:
    """One of them, for images of 3x32x32 and 10 classes."""
    return build_network(NETWORKS[name], in_channels=3, image_size=32, classes=10).to(DEVICE)


def data(examples: int) -> tuple[Tensor, Tensor]:
    """Images of 3x32x32 and labels of 10 classes."""
    torch.manual_seed(0)
    return torch.randn(examples, 3, 32, 32, device=DEVICE), torch.randint(10, (examples,), device=DEVICE)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A forward and backward of the mean loss."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


@section("Tr(F)")
def trace_fisher() -> Iterator[Figure]:
    """Tr(F) of 5,000 examples against a plain forward and backward of them, and against one example after another."""
    x, y = data(EXAMPLES)
    few = x[:20]
    for name in NETWORKS:
        model = network(name).eval()
        base = milliseconds(lambda m=model: plain(m, x, y), seconds=0.5)
        single = milliseconds(lambda m=model: [plain(m, few[i : i + 1], y[i : i + 1]) for i in range(len(few))])
        for labels in ("sampled", "rademacher"):
            ours = milliseconds(lambda m=model, t=labels: fastfisher.trace_fisher(m, x, labels=t), seconds=0.5)
            yield Figure(f"{name}, {labels} labels", ours / base, "times a forward and backward", 1.1, at_least=False)
            loop = single * EXAMPLES / len(few)
            yield Figure(f"{name}, {labels} labels", loop / ours, "times faster than a loop over examples", 50)


def step(name: str, options: dict[str, Any] | None) -> Callable[[], None]:
    """A training step of 128 images; ``options`` of FisherPenalty, or None without a penalty."""
    x, y = data(128)
    model = network(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    penalty = None if options is None else fastfisher.FisherPenalty(model, 0.01, **options)

    def run() -> None:
        optimizer.zero_grad()
        if penalty is None:
            F.cross_entropy(model(x), y).backward()
        else:
            penalty.backward(x, y)
        optimizer.step()

    return run


def of_ten(one: Callable[[], None]) -> float:
    """The milliseconds of one step, averaged over ten, launches and all."""

    def ten() -> None:
        for _ in range(10):
            one()

    return milliseconds(ten, seconds=0.5) / 10


@section("training steps")
def steps() -> Iterator[Figure]:
    """Steps with the penalty against plain ones; an epoch of 50,000 examples is 391 of them."""
    for name in NETWORKS:
        base = of_ten(step(name, None))
        yield Figure(f"{name}, plain", 391 * base / 1e3, "s an epoch")
        for every, bar in ((10, 1.2), (1, 2.1)):
            ours = of_ten(step(name, {"every": every}))
            yield Figure(f"{name}, every {every}", ours / base, "times a plain step", bar, at_least=False)
            captured = of_ten(step(name, {"every": every, "graphs": True}))
            bar_of_graphs = 3 if name == "SimpleCNN" else None
            yield Figure(f"{name}, every {every}", ours / captured, "times faster in graphs", bar_of_graphs)


def seconds_a_seed(seeds: int, together: int) -> float:
    """Wall time of whole runs of SimpleCNN on digits of 32x32 with the penalty, start-up included, for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--network simple_cnn --image-size 32 --method FP --epochs 40 --measure none --out {folder}/runs"
        command = [sys.executable, "-m", "fastfisher", "train", *options.split()]
        start = time.monotonic()
        counts = ["--seeds", str(seeds), "--together", str(together)]
        subprocess.run([*command, *counts], cwd=ROOT, capture_output=True, check=True)
        return (time.monotonic() - start) / seeds


@section("many seeds")
def seeds() -> Iterator[Figure]:
    """32 seeds together against 4 one after another."""
    alone = seconds_a_seed(4, 1)
    for together in (8, 16, 32):
        ratio = alone / seconds_a_seed(32, together)
        yield Figure(f"SimpleCNN, 32 seeds, {together} together", ratio, "times the throughput of one at a time", 4)


@section("compute-sanitizer")
def sanitizer() -> Iterator[Figure]:
    """Each operator's smallest case under memcheck and racecheck."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        raise RuntimeError("compute-sanitizer was not found on PATH or in /usr/local/cuda/bin")
    tested = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu_ops.py", "-k", "waits"]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *tested]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
        print(done.stdout[-3000:], flush=True)
        yield Figure(check, done.returncode, "exit code", 0, at_least=False)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return {"device": torch.cuda.get_device_name(), **versions}


def main() -> int:
    """Runs the sections that are named, or all; returns 1 where a test failed or a section did."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default: all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections: {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU was found; nothing was run")
        return 0
    found = machine()
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    # A few sections alone must not replace the results of a whole run.
    report = Report(RESULTS / (name if chosen == list(SECTIONS) else f"{name}-part"), found)
    run(report, {name: SECTIONS[name] for name in chosen})
    print(report.table())
    broken = [figure for figure in report.figures.get("tests", []) if figure.name == "failed" and figure.value > 0]
    return 1 if broken or report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
