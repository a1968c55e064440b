"""Every line of docs/limits.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "limits.md").read_text()
LINES = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.endswith("| test |")]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[2:50])
def test_each_line_has_its_test(line: str) -> None:
    *_, tests = line.strip("| ").split(" | ")
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", tests)
    assert named, "a line without a test"
    for module, function in named:
        text = "\n".join(file.read_text() for file in (ROOT / "tests").rglob(f"{module}.py"))
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), f"{module}.py has no {function}"


def test_there_are_lines() -> None:
    assert len(LINES) > 50
