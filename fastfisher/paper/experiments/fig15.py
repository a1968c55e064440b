"""Figure 15: Tr(F) and Tr(F_B), the squared norm of a mini-batch gradient, over training."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, ramp
from fastfisher.paper.experiment import Experiment, Outcome, maximum, rank_correlation
from fastfisher.paper.settings import digits_notes, large_rate, logspace

RATES = {"paper": logspace(1e-3, 1e-1, 5), "digits": logspace(3.16e-3, 3.16e-2, 5)}
MAX_BATCH_TRACE = maximum("trace_fisher_batch", "maximum of Tr(F_B)")
MAX_TRACE = maximum("trace_fisher", "maximum of Tr(F)")


def cases(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN with five learning rates; both are measured on the examples of a batch."""
    base = large_rate(scale).but(measure="trace_fisher,trace_fisher_batch")
    return {(f"lr {rate:g}",): base.but(lr=rate) for rate in RATES[scale]}


def draw(figure: Figure, outcome: Outcome) -> None:
    """Both over the epochs, and one against the other."""
    left, middle, right = panels(figure, 1, 3)
    lines = {key[0]: key for key in outcome.runs}
    colours = ramp(len(lines))
    curves(left, outcome, lines, "trace_fisher", "Tr(F)", logarithmic=True, colours=colours)
    curves(middle, outcome, lines, "trace_fisher_batch", "Tr(F_B)", logarithmic=True, colours=colours)
    legend(left)
    for shown, key in zip(colours, lines.values(), strict=True):
        for run in outcome.runs[key].values():
            both = [record for record in run if record.get("trace_fisher_batch") is not None]
            right.scatter(
                [record["trace_fisher"] for record in both],
                [record["trace_fisher_batch"] for record in both],
                s=6,
                color=shown,
            )
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("Tr(F)")
    right.set_ylabel("Tr(F_B)")


def checks(outcome: Outcome) -> list[Check]:
    """Claim 10, over all epochs and learning rates of a seed."""
    values = rank_correlation(outcome, list(outcome.runs), "trace_fisher", "trace_fisher_batch")
    return [Check("Tr(F) and Tr(F_B) correlate", "rank correlation of Tr(F) and Tr(F_B)", values, above=0, claim=10)]


EXPERIMENT = Experiment(
    title="Tr(F) and Tr(F_B) over training, SimpleCNN with five learning rates",
    cases=cases,
    quantities=(MAX_TRACE, MAX_BATCH_TRACE),
    draw=draw,
    checks=checks,
    notes=digits_notes,
    size=(13.0, 4.0),
)
