"""Figure 1: the catastrophic Fisher explosion, a large and a small learning rate on TinyImageNet."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels
from fastfisher.paper.experiment import MAX_TRACE, TEST_ACCURACY, TRAIN_ACCURACY, Experiment, Outcome
from fastfisher.paper.settings import WRESNET_TINY, digits_notes, table_1

LARGE, SMALL = "large learning rate", "small learning rate"


def cases(scale: Scale) -> dict[Key, Case]:
    """η1 = 0.0316 and η2 = 0.001; at digits η* and its thirtieth."""
    row = table_1(WRESNET_TINY, scale)
    if scale == "digits":
        return {(LARGE,): row["η*"], (SMALL,): row["baseline"]}
    return {(LARGE,): row["η*"].but(lr=0.0316), (SMALL,): row["η*"].but(lr=0.001)}


def draw(figure: Figure, outcome: Outcome) -> None:
    """Accuracy in training (dashed) and testing, and Tr(F)."""
    left, right = panels(figure, 1, 2)
    lines = {key[0]: key for key in outcome.runs}
    curves(left, outcome, lines, "test_accuracy", "accuracy, % (dashed: training)", factor=100)
    legend(left)
    curves(left, outcome, lines, "train_accuracy", "accuracy, % (dashed: training)", factor=100, style="--")
    curves(right, outcome, lines, "trace_fisher", "Tr(F)", logarithmic=True)


def checks(outcome: Outcome) -> list[Check]:
    """Claim 1."""
    pairs = [((SMALL,), (LARGE,))]
    return [
        Check(
            "the small learning rate has the higher peak",
            "maximum of Tr(F), small / large",
            outcome.ratios(pairs, MAX_TRACE),
            above=1,
            claim=1,
        ),
        Check(
            "the small learning rate tests worse",
            "test accuracy, small − large, points",
            outcome.differences(pairs, TEST_ACCURACY),
            below=0,
            claim=1,
        ),
    ]


EXPERIMENT = Experiment(
    title="Accuracy and Tr(F) over training with a large and a small learning rate",
    cases=cases,
    quantities=(TEST_ACCURACY, TRAIN_ACCURACY, MAX_TRACE),
    draw=draw,
    checks=checks,
    notes=digits_notes,
)
