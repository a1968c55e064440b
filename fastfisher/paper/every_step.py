"""What figures 18 and 19 share: Tr(F) after every single step."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Scale
from fastfisher.paper.drawing import curves, legend, panels, ramp
from fastfisher.paper.experiment import Outcome
from fastfisher.paper.settings import digits_notes

EPOCHS = {"paper": 30, "digits": 16}


def measured(case: Case, scale: Scale) -> Case:
    """Return the case measured at every step on 128 examples, for the early phase: before any drop."""
    return case.without("lr_milestones").but(
        epochs=EPOCHS[scale], measure="trace_fisher,accuracy", measure_every="1step", trace_samples=128
    )


def draw(figure: Figure, outcome: Outcome) -> None:
    """Tr(F) and the accuracy on the examples that it is measured on."""
    left, right = panels(figure, 1, 2)
    lines = {key[0]: key for key in outcome.runs}
    colours = ramp(len(lines))
    curves(left, outcome, lines, "trace_fisher", "Tr(F)", colours=colours)
    curves(right, outcome, lines, "measured_accuracy", "accuracy on 128 examples, %", factor=100, colours=colours)
    legend(left)


def notes_with(*first: str) -> Callable[[Scale], list[str]]:
    """Return notes that begin so."""

    def notes(scale: Scale) -> list[str]:
        return [
            *first,
            f"The first {EPOCHS[scale]} epochs, without drops of the learning rate. The accuracy is that on the 128 "
            "random examples on which Tr(F) is measured; in the paper it is that of the step's own batch.",
            *digits_notes(scale),
        ]

    return notes
