from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastfisher.paper import experiments
from fastfisher.paper.experiment import Experiment
from fastfisher.paper.experiments import IDS, THEMES, load


def test_the_ids_are_those_of_the_paper_and_the_talk_in_order() -> None:
    assert (
        *(f"fig{number}" for number in range(1, 22)),
        *(f"table{number}" for number in range(1, 10)),
        *("talk1", "talk2", "talk3"),
    ) == IDS
    assert tuple(THEMES) == (*IDS, "demo")


def test_each_id_is_defined_once_and_found() -> None:
    files = Path(experiments.__file__).parent.glob("*.py")
    defined = [name.lower() for path in files for name in experiments.DEFINITION.findall(path.read_text())]
    assert sorted(defined) == sorted(THEMES)
    assert all(isinstance(load(name), Experiment) for name in THEMES)
    assert len({load(name).title for name in THEMES}) == len(THEMES)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("FIG22 = Experiment(", ["FIG22"]),
        ("TALK4 = replace(", ["TALK4"]),
        ("DEMO = Experiment(", ["DEMO"]),
        ("    FIG22 = Experiment(", []),
        ("CIFAR10 = {", []),
        ("FIGURES = (", []),
    ],
)
def test_a_line_in_a_file_is_all_that_another_figure_needs(line: str, expected: list[str]) -> None:
    assert re.findall(experiments.DEFINITION, line) == expected


def test_naming_the_ids_imports_nothing_that_draws() -> None:
    script = (
        "import sys; from fastfisher.cli import main\n"
        "try: main(['reproduce', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('matplotlib', 'scipy', 'sklearn') if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "fig21" in ended.stdout and "demo" in ended.stdout
    assert ended.stderr.splitlines()[-1] == "[]"
