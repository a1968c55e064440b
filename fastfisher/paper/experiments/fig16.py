"""Figure 16: FP recomputed every 10 steps or every step."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import AS_GOOD, Check
from fastfisher.paper.drawing import curves, legend, panels, ramp, rows_of
from fastfisher.paper.experiment import MAX_TRACE, TEST_ACCURACY, Experiment, Outcome, best_key
from fastfisher.paper.settings import digits_notes, every


def cases(scale: Scale) -> dict[Key, Case]:
    """Both, for several α."""
    return every(10, scale) | every(1, scale)


def draw(figure: Figure, outcome: Outcome) -> None:
    """Validation accuracy and Tr(F) over the epochs, α from blue to red."""
    rows = rows_of(outcome)
    axes = panels(figure, len(rows), 2)
    for number, row in enumerate(rows):
        left, right = axes[2 * number : 2 * number + 2]
        lines = {key[1]: key for key in outcome.keys(row)}
        colours = ramp(len(lines))
        curves(left, outcome, lines, "validation_accuracy", "validation accuracy, %", factor=100, colours=colours)
        curves(right, outcome, lines, "trace_fisher", "Tr(F)", colours=colours)
        left.set_title(row, fontsize="medium")
        legend(left)


def checks(outcome: Outcome) -> list[Check]:
    """Claim 11, for the best α of each."""
    rare, often = (best_key(outcome, outcome.keys(row)) for row in rows_of(outcome))
    gained = outcome.differences([(rare, often)], TEST_ACCURACY)
    number = "test accuracy with the best α, every 10 − every step, points"
    return [Check("every 10 steps is as good as every step", number, gained, above=-AS_GOOD, claim=11)]


EXPERIMENT = Experiment(
    title="FP recomputed every 10 steps or every step, for several α",
    cases=cases,
    quantities=(TEST_ACCURACY, MAX_TRACE),
    draw=draw,
    checks=checks,
    notes=lambda scale: ["The best α has the best mean validation accuracy over the seeds.", *digits_notes(scale)],
    size=(10.0, 7.0),
)
