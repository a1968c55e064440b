"""Figure 14: Tr(H) over training, for learning rates and batch sizes that differ much and little."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check, correlation
from fastfisher.paper.drawing import curves, legend, panels, ramp, rows_of
from fastfisher.paper.experiment import MAX_TEST_ACCURACY, MIN_LOSS, Experiment, Outcome, final, series
from fastfisher.paper.settings import curvature, digits_notes

FINAL_HESSIAN = final("trace_hessian", "Tr(H) at the end")
PANELS = {"cifar10": "CIFAR-10, batch size", "cifar100": "CIFAR-100, learning rate"}


def cases(scale: Scale) -> dict[Key, Case]:
    """Two sets of three, each set within a fifth of its middle; the less regularised first."""
    found: dict[Key, Case] = {}
    for data, title in PANELS.items():
        base = curvature(data, scale)
        for level in base.levels_around():
            found[title, f"{level:g}"] = base.case.but(
                **{base.option: level}, measure="trace_hessian", measure_every=base.measure_every
            )
    return found


def draw(figure: Figure, outcome: Outcome) -> None:
    """Curves from the least regularised in blue to the most in red."""
    rows = rows_of(outcome)
    for axes, row in zip(panels(figure, 1, len(rows)), rows, strict=True):
        lines = {key[1]: key for key in outcome.keys(row)}
        curves(axes, outcome, lines, "trace_hessian", "Tr(H)", logarithmic=True, colours=ramp(len(lines)))
        axes.set_title(row, fontsize="medium")
        legend(axes)


def checks(outcome: Outcome) -> list[Check]:
    """What A.4 says: the sets keep the order that they have early on."""

    def order(seed: int) -> float | None:
        found = []
        for row in rows_of(outcome):
            runs = [outcome.runs[key].get(seed) for key in outcome.keys(row)]
            traces = [series(run, "trace_hessian")[1] for run in runs if run is not None]
            whole = [each for each in traces if each]
            r = correlation([each[0] for each in whole], [each[-1] for each in whole])
            if r is not None:
                found.append(r)
        return sum(found) / len(found) if found else None

    halves = [(outcome.keys(row)[:3], outcome.keys(row)[3:]) for row in rows_of(outcome)]
    pairs = [(a, b) for sharp, flat in halves for a, b in zip(sharp, flat, strict=True)]
    return [
        Check(
            "the order of Tr(H) among the runs stays as it was at first",
            "rank correlation of the first and the last Tr(H)",
            outcome.per_seed(order),
            above=0,
        ),
        Check(
            "the more regularised set tests better",
            "best test accuracy, less − more regularised, points",
            outcome.differences(pairs, MAX_TEST_ACCURACY),
            below=0,
        ),
    ]


EXPERIMENT = Experiment(
    title="Tr(H) over training, on a coarse and a fine scale of learning rates and batch sizes",
    cases=cases,
    quantities=(FINAL_HESSIAN, MIN_LOSS, MAX_TEST_ACCURACY),
    draw=draw,
    checks=checks,
    notes=lambda scale: [
        *(["The paper has 32 seeds, and Tr(H) at initialisation too."] if scale == "paper" else []),
        *digits_notes(scale),
    ],
)
