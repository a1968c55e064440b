"""Figures, and the file in which all calls on one device gather them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.gpu.bars import BARS

NOT_AT_HAND = "ModuleNotFoundError"
"""How the error of a figure begins whose peer is not installed."""


@dataclass(frozen=True)
class Figure:
    """One number, or why there is none."""

    name: str
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """The quartiles of what single rounds gave."""
    error: str = ""
    gpu: str = ""
    """What nvidia-smi said of clocks, power and temperature meanwhile."""
    section: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it keeps its bar; None where it has none."""
        bar = BARS.get((self.section, self.name, self.unit))
        return None if bar is None else self.value is not None and bar.met(self.value)

    def line(self) -> str:
        """The figure as a row of the table."""
        bar = BARS.get((self.section, self.name, self.unit), "")
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        spread = "" if self.low is None or self.high is None else f"{short(self.low)}–{short(self.high)}"
        value = self.error.replace("|", "/") if self.value is None else short(self.value)
        return f"| {self.section} | {self.name} | {value} | {spread} | {self.unit} | {bar} | {met} |"


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(figures: Iterable[Figure]) -> str:
    """Figures in Markdown, with the bars they were promised to keep."""
    rows = [figure.line() for figure in figures]
    return "\n".join(["| section | what | figure | quartiles | unit | bar | met |", "|---" * 7 + "|", *rows])


def file_name(device: str) -> str:
    """The name of a device as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@dataclass
class Report:
    """What was found on one device, and where it is written."""

    path: Path
    device: str
    calls: dict[str, dict[str, str]]
    """Versions and the date of each call."""
    figures: list[Figure]

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file."""
        content = json.loads(path.read_text())
        return cls(path, content["device"], content["calls"], [figure_of(row) for row in content["figures"]])

    @classmethod
    def begin(cls, folder: Path, device: str, *others: Path) -> Report:
        """The report of a device for ``folder``: what is there, or in the first of other folders that has it."""
        name = f"{file_name(device)}.json"
        for path in (place / name for place in (folder, *others)):
            if path.exists():
                return replace(cls.read(path), path=folder / name)
        return cls(folder / name, device, {}, [])

    def drop(self, sections: Iterable[str]) -> None:
        """Forgets what earlier calls found in these sections."""
        gone = set(sections)
        self.figures = [figure for figure in self.figures if figure.section not in gone]

    def add(self, figure: Figure) -> None:
        """Adds a figure, and writes everything."""
        self.figures.append(figure)
        self.write()

    def write(self) -> None:
        """Writes the JSON and the table, each in one move, so that a call that is cut off leaves whole files."""
        rows = [row_of(figure) for figure in self.figures]
        content = {"device": self.device, "calls": self.calls, "figures": rows}
        texts = {".json": json.dumps(content, indent=1, ensure_ascii=False), ".md": self.page()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            partial = self.path.with_suffix(suffix + ".part")
            partial.write_text(text + "\n")
            partial.replace(self.path.with_suffix(suffix))

    def heading(self) -> str:
        """What the figures depend on."""
        facts = {", ".join(f"{name} {value}" for name, value in found.items()) for found in self.calls.values()}
        return f"Measured on {self.device} by `make gpu`: " + "; ".join(sorted(facts)) + "."

    def page(self) -> str:
        """All figures in Markdown."""
        return f"{self.heading()}\n\n{table(self.figures)}"


def row_of(figure: Figure) -> dict[str, Any]:
    """A figure as JSON has it: with its bar, and without what it lacks."""
    bar = BARS.get((figure.section, figure.name, figure.unit))
    promised = {} if bar is None else {"bar": str(bar), "met": figure.met}
    rest = {name: value for name, value in {**asdict(figure), **promised}.items() if value not in (None, "")}
    return {"name": figure.name, "unit": figure.unit, **rest}


def figure_of(row: dict[str, Any]) -> Figure:
    """The figure of such a row; its bar is that of today."""
    return Figure(**{name: value for name, value in row.items() if name not in ("bar", "met")})
