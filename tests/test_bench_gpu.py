"""The program that measures on a GPU: a section that fails or comes too late is recorded, and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench.gpu import SECTIONS, Figure, Report, run


def test_a_failing_section_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    seen = []

    def good() -> Iterator[Figure]:
        yield Figure("fast enough", 90, "% of copy bandwidth", 85)
        yield Figure("too slow", 3, "times a plain step", 2.1, at_least=False)

    def broken() -> Iterator[Figure]:
        yield Figure("kept", 1, "s")
        raise RuntimeError("out of memory")

    def last() -> Iterator[Figure]:
        seen.append(json.loads((tmp_path / "device.json").read_text()))  # what was found is written by now
        yield Figure("end", 2, "s")

    report = Report(tmp_path / "device", {"device": "none"})
    run(report, {"good": good, "broken": broken, "last": last})
    assert [len(report.figures[name]) for name in ("good", "broken", "last")] == [2, 1, 1]
    assert list(seen[0]["failures"]) == ["broken"] and seen[0]["figures"]["broken"][0]["name"] == "kept"
    table = (tmp_path / "device.md").read_text()
    assert "| good | fast enough | 90 | % of copy bandwidth | ≥ 85 | yes |" in table
    assert "| good | too slow | 3 | times a plain step | ≤ 2.1 | **no** |" in table
    assert "| broken |  |  | failed: RuntimeError: out of memory |  |  |" in table
    assert "| last | end | 2 | s |  |  |" in table


def test_a_section_that_would_begin_too_late_says_so(tmp_path: Path) -> None:
    report = Report(tmp_path / "device", {"device": "none"})
    run(report, {"late": lambda: iter([Figure("never", 1, "s")])}, seconds=-1)
    assert report.figures["late"] == []
    assert "left out" in (tmp_path / "device.md").read_text()


def test_every_section_says_what_it_measures() -> None:
    assert SECTIONS and all(function.__doc__ for function in SECTIONS.values())
