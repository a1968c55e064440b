"""Figure 12: the cosine between the gradients of noisy and of clean examples."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, ramp
from fastfisher.paper.experiment import Experiment, Outcome, Quantity, epochs_of, series
from fastfisher.paper.settings import noisy_notes, noisy_with_coefficients
from fastfisher.training.replicas import Metrics

NETWORK = "VGG-11 / CIFAR-100"
METHODS = ("FP", "GP_r")
EARLY = 0.2
"""The share of training that is called early."""


def cases(scale: Scale) -> dict[Key, Case]:
    """No penalty, and FP and GP_r with several α."""
    return {
        (name,): case for method in METHODS for name, case in noisy_with_coefficients(NETWORK, scale, method).items()
    }


def _early(run: Metrics) -> float | None:
    epochs, values = series(run, "noisy_clean_cosine")
    last = epochs_of(run)[-1]["epoch"]
    early = [value for epoch, value in zip(epochs, values, strict=True) if epoch <= EARLY * last]
    return statistics.mean(early) if early else None


EARLY_COSINE = Quantity("cosine, mean over the first fifth of training", _early)


def draw(figure: Figure, outcome: Outcome) -> None:
    """A panel for each method."""
    for axes, method in zip(panels(figure, 1, len(METHODS)), METHODS, strict=True):
        lines = {key[0]: key for key in outcome.runs if key[0] == "baseline" or key[0].startswith(f"{method} ")}
        curves(axes, outcome, lines, "noisy_clean_cosine", "cosine of g_n and g_c", colours=ramp(len(lines)))
        axes.axhline(0.0, color="grey", linewidth=0.8)
        legend(axes)


def checks(outcome: Outcome) -> list[Check]:
    """Claim 8, for the mean of all cases; and what the caption says of stronger penalties."""

    def over_cases(seed: int) -> float | None:
        found = [outcome.value(seed, key, EARLY_COSINE) for key in outcome.runs]
        whole = [value for value in found if value is not None]
        return statistics.mean(whole) if whole else None

    strongest = [[key for key in outcome.runs if key[0].startswith(f"{method} ")][-1] for method in METHODS]
    pairs: list[tuple[Key, Key]] = [(key, ("baseline",)) for key in strongest]
    return [
        Check("the cosine is negative early", EARLY_COSINE.name, outcome.per_seed(over_cases), below=0, claim=8),
        Check(
            "it is the more negative, the stronger the penalty",
            "early cosine, largest α − baseline",
            outcome.differences(pairs, EARLY_COSINE),
            below=0,
        ),
    ]


EXPERIMENT = Experiment(
    title="The cosine between the gradients of noisy and of clean examples",
    cases=cases,
    quantities=(EARLY_COSINE,),
    draw=draw,
    checks=checks,
    notes=noisy_notes,
)
