"""Figure 17: FP without the approximation, on the gradient of a single example (equation 6)."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import AS_GOOD, Check
from fastfisher.paper.drawing import curves, legend, panels, ramp, rows_of
from fastfisher.paper.experiment import MAX_TRACE, TEST_ACCURACY, Experiment, Outcome, best_key
from fastfisher.paper.settings import FIRST_EXAMPLE, digits_notes, every, small_rate

EXACT = "equation 6"


def cases(scale: Scale) -> dict[Key, Case]:
    """FP with equation 6 every step, and as in figure 16 every 10 steps."""
    base = small_rate(scale).but(method="FP", penalty_reduction="first", penalty_every=1)
    return {(EXACT, f"α={a:g}"): base.but(alpha=a) for a in FIRST_EXAMPLE[scale]} | every(10, scale)


def draw(figure: Figure, outcome: Outcome) -> None:
    """Validation accuracy and Tr(F) with equation 6, α from blue to red."""
    left, right = panels(figure, 1, 2)
    lines = {key[1]: key for key in outcome.keys(EXACT)}
    colours = ramp(len(lines))
    curves(left, outcome, lines, "validation_accuracy", "validation accuracy, %", factor=100, colours=colours)
    curves(right, outcome, lines, "trace_fisher", "Tr(F)", colours=colours)
    legend(left)


def checks(outcome: Outcome) -> list[Check]:
    """Claim 11, for the best α of each."""
    exact, approximate = (best_key(outcome, outcome.keys(row)) for row in rows_of(outcome))
    gained = outcome.differences([(approximate, exact)], TEST_ACCURACY)
    number = "test accuracy with the best α, FP − equation 6, points"
    return [Check("the approximation costs nothing", number, gained, above=-AS_GOOD, claim=11)]


EXPERIMENT = Experiment(
    title="FP without the approximation, on the gradient of a single example",
    cases=cases,
    quantities=(TEST_ACCURACY, MAX_TRACE),
    draw=draw,
    checks=checks,
    notes=lambda scale: ["The best α has the best mean validation accuracy over the seeds.", *digits_notes(scale)],
)
