"""Puts the latest results into the pages, between their markers; ``make bench`` and ``make gpu`` end with it.

By itself: ``python -m bench.readme``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.report import Report, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NO_GPU = "GPU figures are not yet measured."

NETWORKS = ("SimpleCNN", "VGG-11", "ResNet + BN")
PASSES = {
    "finite difference": "2F + 3B = 2.67",
    "finite difference, mixed": "2F + 2B = 2.00",
    "finite difference, central": "3F + 4B = 3.67",
    "finite difference, half of the batch": "1½F + 2B = 1.83",
    "finite difference, every 10 (average)": "1.17",
    "GP, finite difference": "2F + 2B = 2.00",
    "GP_x, finite difference": "2F + 2B = 2.00",
    "double backprop": "",
}
"""The passes of each kind of step, F a forward and B a backward of the whole batch, and their sum in plain steps."""

PLAIN_STEP = "times the cost of a plain step"
PLAIN_PASSES = "times the cost of a plain forward and backward"
CALLS = (
    (
        "`FisherPenalty(model, α)`: R anew at every tenth step, mean of ten",
        PLAIN_STEP,
        "{}, finite difference, every 10 (average)",
    ),
    ("`FisherPenalty(model, α, every=1)`", PLAIN_STEP, "{}, finite difference"),
    ("the same, `mixed=True`", PLAIN_STEP, "{}, finite difference, mixed"),
    ('the same, `labels="true"` (GP)', PLAIN_STEP, "{}, GP, finite difference"),
    ('the same, `method="double_backprop"`', PLAIN_STEP, "{}, double backprop"),
    ("`trace_fisher(model, data)`", PLAIN_PASSES, "Tr(F), {}: fastfisher.trace_fisher, rademacher labels"),
    (
        '`trace_fisher(model, data, labels="exact")`, 10 classes',
        PLAIN_PASSES,
        "Tr(F), {}: fastfisher.trace_fisher, exact labels",
    ),
    ("per-example gradient norms by BackPACK", PLAIN_PASSES, "Tr(F), {}: BackPACK, BatchL2Grad"),
    ("the same by a loop over single examples", PLAIN_PASSES, "Tr(F), {}: batch-of-one loop"),
)
"""The rows of the table of costs: what is called, what it is compared with, and where its figure is."""


@dataclass(frozen=True)
class Ratio:
    """A row of the results of a benchmark."""

    section: str
    what: str
    ratio: str
    median: str
    bar: str
    met: str


def ratios(text: str) -> Iterator[Ratio]:
    """The rows of all tables of a file of results."""
    section = ""
    for line in text.splitlines():
        section = line.removeprefix("### ") if line.startswith("### ") else section
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 7 and cells[0] != "what":
            what, _, ratio, median, _, bar, met = cells
            yield Ratio(section, what.strip("*"), ratio, median, bar, met)


def steps(text: str) -> str:
    """The cost of each kind of step for each network, of the results of bench/test_step.py."""
    found = {row.what: row.median for row in ratios(text) if row.ratio == PLAIN_STEP}
    rows = [
        f"| {kind} | {passes} | " + " | ".join(found[f"{network}, {kind}"] for network in NETWORKS) + " |"
        for kind, passes in PASSES.items()
    ]
    return "\n".join([f"| step | passes | {' | '.join(NETWORKS)} |", "|---" * (2 + len(NETWORKS)) + "|", *rows])


def costs(cpu: str, traces: str, hessian: str, memory: str) -> str:
    """What the calls of users cost, where that was measured, and which bars were missed."""
    rows = [*ratios(cpu), *ratios(traces), *ratios(hessian)]
    found = {(row.ratio, name): row.median for row in rows for name in (row.what, f"{row.section}: {row.what}")}
    lines = [
        [call, *(found.get((ratio, where.format(network)), "not measured") for network in NETWORKS)]
        for call, ratio, where in CALLS
    ]
    lines.append(['`trace_hessian(model, data, method="hutchinson")`, a probe', *map(_probe(rows), NETWORKS)])
    peaks = {(network, step): peak for network, step, peak, _, _ in _cells(memory)}
    shown = ("plain", "finite difference", "double backprop")
    lines.append([
        "peak memory of a step, MiB: plain, `every=1`, double backprop",
        *(", ".join(peaks.get((network, step), "not measured") for step in shown) for network in NETWORKS),
    ])  # fmt: skip
    header = f"| times a plain step; of Tr(F) and norms, times its forward and backward | {' | '.join(NETWORKS)} |"
    body = [header, "|---" * (1 + len(NETWORKS)) + "|", *(f"| {' | '.join(line)} |" for line in lines)]
    heads: dict[str, list[str]] = {}
    for what, text in (("Steps", cpu), ("Tr(F)", traces), ("Tr(H)", hessian)):
        heads.setdefault(text.splitlines()[0], []).append(what)
    where = [f"{' and '.join(what)}: {head[0].lower()}{head[1:]}" for head, what in heads.items()]
    parts = ["\n".join(body), " ".join([*where, memory.splitlines()[0]]), _bars(rows, memory), gpu_in_short()]
    return "\n\n".join(parts)


def _probe(rows: list[Ratio]) -> Callable[[str], str]:
    """The cost of one probe for a network, of the cost of several."""
    found = {}
    for row in rows:
        probes = re.fullmatch(r"(.*), (\d+) probes", row.what)
        if probes and row.ratio == PLAIN_STEP:
            found[probes[1]] = f"{float(row.median) / int(probes[2]):.2f}"
    return lambda network: found.get(network, "not measured")


def _cells(memory: str) -> list[list[str]]:
    """The rows of the results of bench/memory.py: network, step, peak, limit, and whether it is kept."""
    lines = [line for line in memory.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def _bars(rows: list[Ratio], memory: str) -> str:
    """How many of the promised bars are kept, and which are not."""
    met = {f"{row.section}, {row.what}: {row.median} {row.ratio} (bar {row.bar})": row.met for row in rows if row.bar}
    for network, step, peak, limit, kept in _cells(memory):
        if limit:
            met[f"{network}, {step}: {peak} MiB (limit {limit} MiB)"] = kept
    missed = [bar for bar, kept in met.items() if kept != "yes"]
    text = f"Of {len(met)} promised bars {len(met) - len(missed)} are kept"
    return f"{text}; missed: {'; '.join(missed)}." if missed else f"{text}."


def verdict(text: str) -> str:
    """What a report says before its first table: the setting, and what came out."""
    return whole(text).split("\n\n|")[0]


def claims(text: str) -> str:
    """The twelve claims, with links from the folder above, and what a verdict is."""
    first, last = text.index("1. "), text.index("\n## Everything")
    return text[first:last].strip().replace("](", "](digits/")


def whole(text: str) -> str:
    """A report without its title and picture, which the page has already."""
    return re.sub(r"^# .*\n|^!\[.*\n", "", text, flags=re.MULTILINE).strip()


def gpu(results: Path = RESULTS) -> str:
    """What was promised on a GPU, for each device that was measured; or that none was. For a page in docs/."""
    parts = []
    for report in map(Report.read, sorted(results.glob("*.json"))):
        page = f"bench/results/{report.path.stem}.md"
        promised = [figure for figure in report.figures if figure.met is not None]
        parts.append(f"{report.heading()} All figures: [{page}](../{page}).\n\n{table(promised)}")
    return "\n\n".join(parts) or NO_GPU


def gpu_in_short(results: Path = RESULTS) -> str:
    """On which GPUs something was measured; or that nothing was."""
    devices = [Report.read(path).device for path in sorted(results.glob("*.json"))]
    return f"Measured on a GPU, too: {', '.join(devices)}; docs/costs.md has the figures." if devices else NO_GPU


PARTS: dict[str, tuple[tuple[Path, ...], Callable[..., str]]] = {
    "costs": (tuple(RESULTS / f"{name}.md" for name in ("cpu", "traces", "hessian", "memory")), costs),
    "steps": ((RESULTS / "cpu.md",), steps),
    "bench": ((RESULTS / "cpu.md",), whole),
    "traces": ((RESULTS / "traces.md",), whole),
    "hessian": ((RESULTS / "hessian.md",), whole),
    "memory": ((RESULTS / "memory.md",), whole),
    "training": ((RESULTS / "training.md",), whole),
    "step_size": ((RESULTS / "step_size.md",), whole),
    "gpu": ((), gpu),
    "noisy_digits": ((ROOT / "results" / "noisy_digits" / "report.md",), whole),
    "verdict": ((ROOT / "results" / "noisy_digits" / "report.md",), verdict),
    "claims": ((ROOT / "results" / "digits" / "README.md",), claims),
}
"""For each marker, the files whose results stand there, and in which form."""


def filled(page: str) -> str:
    """The page with what stands between ``<!-- name -->`` and ``<!-- /name -->`` replaced by the results."""
    for name, (sources, form) in PARTS.items():
        if f"<!-- {name} -->" not in page or not all(source.exists() for source in sources):
            continue
        marked = f"<!-- {name} -->\n{form(*(source.read_text() for source in sources))}\n<!-- /{name} -->"
        page = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, m=marked: m, page, flags=re.DOTALL)
    return page


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
