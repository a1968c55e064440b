"""What an experiment trains: options of ``fastfisher train``, some of which are tuned first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Scale = Literal["digits", "paper"]
SCALES: tuple[Scale, ...] = ("digits", "paper")

Key = tuple[str, ...]
"""How an experiment calls a case: of the row and of the column of a table, or of a curve."""


@dataclass(frozen=True)
class Case:
    """Runs that differ in their seed alone.

    Attributes:
        options: what is not as :class:`fastfisher.training.config.TrainConfig` has it, sorted by name; a value may be
            :class:`Tuned`.
        start: begin with the final weights of this case, of the same seed.
        repeat: with the same seed and another number here, a run is another one. For continuations of one start.
    """

    options: tuple[tuple[str, Any], ...]
    start: Case | None = None
    repeat: int = 0

    def but(self, **options: Any) -> Case:
        """Return the case with some options changed, or added."""
        return replace(self, options=tuple(sorted({**dict(self.options), **options}.items())))

    def without(self, *names: str) -> Case:
        """Return the case with some options as they are by default."""
        return replace(self, options=tuple((name, value) for name, value in self.options if name not in names))

    def __getitem__(self, name: str) -> Any:
        return dict(self.options)[name]


def case(options: Mapping[str, Any] | None = None, /, **more: Any) -> Case:
    """Return the case with these options, the later ones before the former."""
    return Case(()).but(**(options or {})).but(**more)


@dataclass(frozen=True)
class Tuned:
    """``factor`` times that value of an option which gave the best validation accuracy (section I.2).

    Every value is trained once, on a seed that is used for nothing else. A run that diverges is the worst; of equals
    the first is taken. Where the data have no validation examples, as TinyImageNet in the paper, it is the accuracy on
    the test examples that decides.

    Attributes:
        option: its name.
        values: the grid.
        case: the other options.
        judged: by the accuracy after the last epoch, or by the best of all epochs where that is what is reported.
        factor: 0.1 for a learning rate ten times smaller than the best.
    """

    option: str
    values: tuple[float, ...]
    case: Case
    judged: Literal["final", "best"] = "final"
    factor: float = 1.0

    def times(self, factor: float) -> Tuned:
        """Return this many times the best value."""
        return replace(self, factor=factor)


def tuned(option: str, values: tuple[float, ...], of: Case, judged: Literal["final", "best"] = "final") -> Case:
    """Return the case with an option at its best value."""
    return of.but(**{option: Tuned(option, values, of, judged)})
