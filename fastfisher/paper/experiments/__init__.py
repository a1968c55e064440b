"""The experiments, in a file for each theme: what is trained, what is read from it, how it is drawn, what it claims.

A line that begins with ``FIG7 = `` in one of the files makes the experiment ``fig7``; nothing else has to be edited.
The ids are read from the text of the files, so that the command line can list them without importing matplotlib.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastfisher.paper.experiment import Experiment

KINDS = ("fig", "table", "talk", "demo")
"""What an id begins with, in the order in which they are listed; all but a demo have a number."""

DEFINITION = re.compile(rf"^((?:{'|'.join(KINDS).upper()})\d*) = ", re.MULTILINE)


def _place(name: str) -> tuple[int, int]:
    kind = name.rstrip("0123456789")
    return KINDS.index(kind), int(name.removeprefix(kind) or 0)


def _found() -> dict[str, str]:
    """Return the ids in order, each with the theme whose file defines it."""
    themes = {
        name.lower(): path.stem
        for path in Path(__file__).parent.glob("*.py")
        for name in DEFINITION.findall(path.read_text(encoding="utf-8"))
    }
    return {name: themes[name] for name in sorted(themes, key=_place)}


THEMES = _found()
IDS = tuple(name for name in THEMES if name != "demo")
"""The tables and figures of the paper and of the talk: what ``--all`` is."""


def load(name: str) -> Experiment:
    """Return the experiment with an id."""
    found: Experiment = getattr(importlib.import_module(f"{__name__}.{THEMES[name]}"), name.upper())
    return found
