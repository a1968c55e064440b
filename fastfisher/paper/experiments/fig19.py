"""Figure 19: Tr(F) at every step, with three batch sizes."""

from __future__ import annotations

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.every_step import draw, measured, notes_with
from fastfisher.paper.experiment import MAX_TRACE, Experiment, Outcome
from fastfisher.paper.settings import large_rate

# The paper does not say which; the last of figure 20 is ten times the first.
BATCHES = {"paper": (128, 512, 1280), "digits": (4, 8, 16)}


def cases(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN at η*, in ascending order of the batch size."""
    base = measured(large_rate(scale), scale)
    return {(f"batch {size}",): base.but(batch_size=size) for size in BATCHES[scale]}


def checks(outcome: Outcome) -> list[Check]:
    """Claim 2: the largest of all steps."""
    keys = list(outcome.runs)
    values = outcome.ratios([(keys[-1], keys[0])], MAX_TRACE)
    number = "maximum of Tr(F) over all steps, largest / smallest batch"
    return [Check("a larger batch enters a sharper region", number, values, above=1, claim=2)]


EXPERIMENT = Experiment(
    title="Tr(F) at every step, with three batch sizes",
    cases=cases,
    quantities=(MAX_TRACE,),
    draw=draw,
    checks=checks,
    notes=notes_with("The paper does not say which batch sizes: these are ours."),
)
