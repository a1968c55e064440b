"""What figures 4 and 10 share: validation accuracy and Tr(F) over training, for four columns of table 1."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, rows_of
from fastfisher.paper.experiment import MAX_TRACE, Outcome
from fastfisher.paper.settings import Setting, table_1

COLUMNS = ("η*", "baseline", "GP_x", "FP")


def cases_of(*settings: Setting) -> Callable[[Scale], dict[Key, Case]]:
    """Return the cases of some settings."""

    def cases(scale: Scale) -> dict[Key, Case]:
        return {(s.name, column): table_1(s, scale)[column] for s in settings for column in COLUMNS}

    return cases


def draw(figure: Figure, outcome: Outcome) -> None:
    """A row of two panels for each setting."""
    rows = rows_of(outcome)
    axes = panels(figure, len(rows), 2)
    for number, row in enumerate(rows):
        left, right = axes[2 * number : 2 * number + 2]
        lines = {key[1]: key for key in outcome.keys(row)}
        curves(left, outcome, lines, "validation_accuracy", "validation accuracy, %", factor=100)
        curves(right, outcome, lines, "trace_fisher", "Tr(F)")
        left.set_title(row, fontsize="medium")
        legend(left)


def checks(outcome: Outcome) -> list[Check]:
    """Claims 1 and 4: the peaks."""

    def ratio(first: str, second: str) -> tuple[float, ...]:
        return outcome.ratios([((row, first), (row, second)) for row in rows_of(outcome)], MAX_TRACE)

    number = "maximum of Tr(F), {} / {}"
    return [
        Check(
            "the small learning rate has the higher peak",
            number.format("baseline", "η*"),
            ratio("baseline", "η*"),
            above=1,
            claim=1,
        ),
        Check(
            "FP lowers the peak of Tr(F)", number.format("FP", "baseline"), ratio("FP", "baseline"), below=1, claim=4
        ),
    ]
