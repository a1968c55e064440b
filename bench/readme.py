"""Puts the latest results into README.md, between its markers; ``make bench`` ends with it.

By itself: ``python -m bench.readme``.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {
    "noisy_digits": ROOT / "results" / "noisy_digits" / "report.md",
    "bench": ROOT / "bench" / "results" / "cpu.md",
    "traces": ROOT / "bench" / "results" / "traces.md",
    "hessian": ROOT / "bench" / "results" / "hessian.md",
    "memory": ROOT / "bench" / "results" / "memory.md",
    "training": ROOT / "bench" / "results" / "training.md",
}


def main() -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, source in SOURCES.items():
        if source.exists():
            # The report's title and picture stand in the README already.
            body = re.sub(r"^# .*\n|^!\[.*\n", "", source.read_text(), flags=re.MULTILINE).strip()
            marked = f"<!-- {name} -->\n{body}\n<!-- /{name} -->"
            text = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, m=marked: m, text, flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main()
