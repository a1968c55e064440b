"""Figure 18: Tr(F) at every step, with a large and with a small learning rate."""

from __future__ import annotations

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.every_step import draw, measured, notes_with
from fastfisher.paper.experiment import MAX_TRACE, Experiment, Outcome
from fastfisher.paper.settings import large_rate, small_rate

LARGE, SMALL = "large learning rate", "small learning rate"


def cases(scale: Scale) -> dict[Key, Case]:
    """η* and the small learning rate of table 1."""
    return {(SMALL,): measured(small_rate(scale), scale), (LARGE,): measured(large_rate(scale), scale)}


def checks(outcome: Outcome) -> list[Check]:
    """Claim 12: the largest of all steps."""
    values = outcome.ratios([((LARGE,), (SMALL,))], MAX_TRACE)
    number = "maximum of Tr(F) over all steps, large / small"
    return [Check("the large learning rate never enters as sharp a region", number, values, below=1, claim=12)]


EXPERIMENT = Experiment(
    title="Tr(F) at every step, with a large and with a small learning rate",
    cases=cases,
    quantities=(MAX_TRACE,),
    draw=draw,
    checks=checks,
    notes=notes_with(),
)
