"""Where modules of version 0.1 are now: their names go on working under the old path, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "arguments": ("checks",),
    "batches": ("data",),
    "calls": ("engine.calls",),
    "capture": ("engine.capture",),
    "estimate": ("measure.estimate",),
    "gates": ("engine.gates", "engine.recording", "engine.random_state", "engine.fused.forward"),
    "graphs": ("penalise.graphs",),
    "head": ("ops.head",),
    "hessian": ("measure.hessian", "measure.logits_form"),
    "layers": ("engine.layers",),
    "penalty": ("penalise.function", "penalise.rho", "penalise.options"),
    "reference": ("ops.reference",),
    "regularizer": ("penalise.regularizer", "penalise.watching"),
    "spectrum": ("measure.spectrum", "measure.covariance"),
    "taylor": ("engine.taylor",),
    "traces": ("measure.norms", "measure.fisher"),
}
"""The old names, and the modules that have what they had, to be asked in turn."""


class _Moved(ModuleType):
    """Stands where a module was; imports the new ones when it is asked for a name."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # what tools ask of every module
            for new in MOVED[self.__name__.removeprefix("fastfisher.")]:
                module = importlib.import_module(f"fastfisher.{new}")
                if hasattr(module, name):
                    warnings.warn(
                        f"{self.__name__}.{name} is {module.__name__}.{name} now", DeprecationWarning, stacklevel=2
                    )
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def keep_old_paths() -> None:
    """Has ``import`` find the old modules."""
    for old in MOVED:
        name = f"fastfisher.{old}"
        sys.modules.setdefault(name, _Moved(name, __doc__))
