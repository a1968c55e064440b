"""Talk, the edge of stability: the largest eigenvalue of the Hessian against 2/η under gradient descent."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, case
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, ramp
from fastfisher.paper.experiment import Experiment, Outcome, Quantity, final, series

RATES = {"paper": (0.02, 0.04, 0.08), "digits": (0.05, 0.1, 0.2)}
SHARPNESS = final("top_eigenvalue", "λ¹_H at the end")
LOSS = final("train_loss", "training loss at the end")
WITHIN = 0.25
"""How near to 2/η the eigenvalue has to be, as a share of it, to be called at the edge."""


def cases(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN with the whole training set as its batch and no momentum; Cohen et al. take 5,000 examples too."""
    if scale == "paper":
        base = case(data="cifar10", network="simple_cnn", examples=5_000, batch_size=5_000, epochs=3_000)
        base = base.but(trace_samples=5_000, measure_every="50epochs")
    else:
        base = case(data="digits", network="small_simple_cnn", image_size=12, examples=200, batch_size=200, epochs=600)
        base = base.but(trace_samples=200, measure_every="20epochs")
    return {(f"lr {rate:g}",): base.but(lr=rate, momentum=0.0, measure="top_eigenvalue") for rate in RATES[scale]}


def draw(figure: Figure, outcome: Outcome) -> None:
    """λ¹_H with 2/η dashed, and the loss."""
    left, right = panels(figure, 1, 2)
    lines = {key[0]: key for key in outcome.runs}
    colours = ramp(len(lines))
    curves(left, outcome, lines, "top_eigenvalue", "λ¹_H (dashed: 2/η)", colours=colours)
    for shown, key in zip(colours, lines.values(), strict=True):
        left.axhline(2 / outcome.configs[key].lr, color=shown, linestyle="--", linewidth=1)
    curves(right, outcome, lines, "train_loss", "training loss", logarithmic=True, colours=colours)
    legend(left)


def _largest_share(outcome: Outcome, key: Key) -> Quantity:
    """The largest λ¹_H η/2, as the median of neighbouring measurements of three: one may overshoot."""

    def of(run: list[dict[str, float]]) -> float | None:
        values = series(run, "top_eigenvalue")[1]
        threes = [statistics.median(values[start : start + 3]) for start in range(max(1, len(values) - 2))]
        return max(threes) * outcome.configs[key].lr / 2 if values else None

    return Quantity("λ¹_H η/2", of)


def checks(outcome: Outcome) -> list[Check]:
    """That sharpness rises to 2/η and stays about there."""
    return [
        Check(
            f"λ¹_H reaches 2/η at {key[0]}",
            "largest λ¹_H η/2 over training",
            outcome.per_seed(lambda seed, key=key: outcome.value(seed, key, _largest_share(outcome, key))),  # type: ignore[misc]
            above=1 - WITHIN,
            below=1 + WITHIN,
        )
        for key in outcome.runs
    ]


EXPERIMENT = Experiment(
    title="The largest eigenvalue of the Hessian against 2/η under full-batch gradient descent",
    cases=cases,
    quantities=(SHARPNESS, LOSS),
    draw=draw,
    checks=checks,
    notes=lambda scale: [
        "An epoch is a step: the batch is the training set, and there is no momentum. Near 2/η means within "
        f"{WITHIN:.0%}, for the largest median of three measurements in a row."
    ],
)
