"""What is committed under results/digits is what `fastfisher reproduce --all --scale digits` writes today."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from fastfisher.paper.experiments import IDS, load

RESULTS = Path(__file__).parents[2] / "results"
DIGITS = RESULTS / "digits"


@pytest.mark.parametrize("name", IDS)
def test_each_id_has_its_files_about_the_cases_that_it_has_now(name: str) -> None:
    experiment = load(name)
    assert all((DIGITS / f"{name}.{ending}").stat().st_size > 0 for ending in ("md", "csv", "png", "svg"))
    rows = list(csv.DictReader((DIGITS / f"{name}.csv").open()))
    cases = [" | ".join(key) for key in experiment.cases("digits")]
    assert [row["case"] for row in rows] == [case for case in cases for _ in experiment.quantities]
    assert [row["quantity"] for row in rows] == len(cases) * [quantity.name for quantity in experiment.quantities]
    text = (DIGITS / f"{name}.md").read_text()
    assert f"over {experiment.seeds} seeds" in text and "Scale: **digits**" in text and "dry run" not in text
    # The options too: a report about other settings than today's would be another experiment's.
    assert all(note in text for note in experiment.notes("digits"))


def test_enough_seeds() -> None:
    seeds = {name: load(name).seeds for name in IDS}
    assert min(seeds.values()) >= 3
    assert all(seeds[name] >= 5 for name in ("table1", "table3", "fig5"))


def test_the_page_about_the_claims_has_all_twelve() -> None:
    assert len(re.findall(r"^\d+\. ", (RESULTS / "README.md").read_text(), re.MULTILINE)) == 12


def test_the_page_about_reproducing_shows_three_of_the_figures() -> None:
    page = RESULTS.parent / "docs" / "reproduce.md"
    shown = re.findall(r"\(\.\./results/digits/(\w+)\.png\)", page.read_text())
    assert len(set(shown)) == 3 and set(shown) <= set(IDS)
