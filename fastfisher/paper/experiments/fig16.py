"""Figure 16: FP recomputed every 10 steps or every step."""

from __future__ import annotations

import functools

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import AS_GOOD, Check
from fastfisher.paper.drawing import accuracy_and_trace, rows_of
from fastfisher.paper.experiment import MAX_TRACE, TEST_ACCURACY, Experiment, Outcome, best_key
from fastfisher.paper.settings import digits_notes, every


def cases(scale: Scale) -> dict[Key, Case]:
    """Both, for several α."""
    return every(10, scale) | every(1, scale)


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
    draw=functools.partial(accuracy_and_trace, ordered=True),
    checks=checks,
    notes=lambda scale: ["The best α has the best mean validation accuracy over the seeds.", *digits_notes(scale)],
    size=(10.0, 7.0),
)
