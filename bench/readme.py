"""Puts the latest results into the pages, between their markers; ``make bench`` and ``make gpu`` end with it.

By itself: ``python -m bench.readme``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.gpu.report import Report, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SOURCES = {
    "noisy_digits": ROOT / "results" / "noisy_digits" / "report.md",
    "bench": RESULTS / "cpu.md",
    "traces": RESULTS / "traces.md",
    "hessian": RESULTS / "hessian.md",
    "memory": RESULTS / "memory.md",
    "training": RESULTS / "training.md",
    "step_size": RESULTS / "step_size.md",
    "steps": RESULTS / "cpu.md",
    "claims": ROOT / "results" / "digits" / "README.md",
}
PAGES = (ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

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


def steps(text: str) -> str:
    """The cost of each kind of step for each network, of the results of bench/test_step.py."""
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| times the cost of a plain step \| ([\d.]+) \|", text, re.MULTILINE)
    ratio = dict(found)
    rows = [
        f"| {kind} | {passes} | " + " | ".join(ratio[f"{network}, {kind}"] for network in NETWORKS) + " |"
        for kind, passes in PASSES.items()
    ]
    return "\n".join([f"| step | passes | {' | '.join(NETWORKS)} |", "|---" * (2 + len(NETWORKS)) + "|", *rows])


def claims(text: str) -> str:
    """The twelve claims, with links from the folder above, and what a verdict is."""
    first, last = text.index("1. "), text.index("\n## Everything")
    return text[first:last].strip().replace("](", "](digits/")


def whole(text: str) -> str:
    """A report without its title and picture, which the page has already."""
    return re.sub(r"^# .*\n|^!\[.*\n", "", text, flags=re.MULTILINE).strip()


def gpu(results: Path = RESULTS) -> str:
    """What was promised on a GPU, for each device that was measured; or that none was."""
    parts = []
    for report in map(Report.read, sorted(results.glob("*.json"))):
        page = f"bench/results/{report.path.stem}.md"
        promised = [figure for figure in report.figures if figure.met is not None]
        parts.append(f"{report.heading()} All figures: [{page}]({page}).\n\n{table(promised)}")
    return "\n\n".join(parts) or "GPU figures are not yet measured."


def filled(page: str) -> str:
    """The page with what stands between ``<!-- name -->`` and ``<!-- /name -->`` replaced by the results."""
    forms: dict[str, Callable[[str], str]] = {"steps": steps, "claims": claims}
    for name in ("gpu", *SOURCES):
        if f"<!-- {name} -->" not in page or (name in SOURCES and not SOURCES[name].exists()):
            continue
        body = gpu() if name == "gpu" else forms.get(name, whole)(SOURCES[name].read_text())
        marked = f"<!-- {name} -->\n{body}\n<!-- /{name} -->"
        page = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, m=marked: m, page, flags=re.DOTALL)
    return page


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
