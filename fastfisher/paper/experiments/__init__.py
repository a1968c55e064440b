"""One file for each table and figure: what is trained, what is read from it, how it is drawn, what it claims."""

from __future__ import annotations

import importlib

from fastfisher.paper.experiment import Experiment


def load(name: str) -> Experiment:
    """Return the experiment with an id, which is the name of its file."""
    found: Experiment = importlib.import_module(f"{__name__}.{name}").EXPERIMENT
    return found
