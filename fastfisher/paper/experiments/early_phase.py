"""Tr(F) early in training against an accuracy, over learning rates and over batch sizes: figures 2, 7, 8 and 9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, case
from fastfisher.paper.claims import Check, mean_correlation
from fastfisher.paper.drawing import points, row_panels
from fastfisher.paper.experiment import (
    EARLY_TRACE,
    MAX_TEST_ACCURACY,
    MAX_TRAIN_ACCURACY,
    Experiment,
    Outcome,
    Quantity,
)
from fastfisher.paper.settings import CIFAR10, CIFAR100, DIGITS_NETWORKS, IMAGENET, digits_notes


def learning_rate_sweep(scale: Scale) -> dict[Key, Case]:
    """Return three learning rates on each of three data sets, in ascending order."""
    if scale == "paper":
        rows = {
            "Fixup ResNet-18 / ImageNet": (case(IMAGENET), (0.001, 0.01, 0.1)),
            "ResNet-26 / CIFAR-10": (case(CIFAR10, batch_size=256), (0.007, 0.01, 0.05)),
            "ResNet-26 / CIFAR-100": (case(CIFAR100, batch_size=100), (0.001, 0.005, 0.01)),
        }
    else:
        rows = {
            "Fixup ResNet-10": (case(DIGITS_NETWORKS["imagenet"]), (0.0056, 0.01, 0.0178)),
            "ResNet-8": (case(DIGITS_NETWORKS["cifar10"]), (0.01, 0.0178, 0.0316)),
            "WResNet-8": (case(DIGITS_NETWORKS["cifar100"]), (0.0178, 0.0316, 0.0562)),
        }
    return {
        (row, f"lr {rate:g}"): base.but(lr=rate, measure="none")
        for row, (base, rates) in rows.items()
        for rate in rates
    }


def batch_size_sweep(scale: Scale) -> dict[Key, Case]:
    """Return three batch sizes on each of two data sets, in ascending order."""
    if scale == "paper":
        rows = {
            "ResNet-26 / CIFAR-10": (case(CIFAR10, lr=0.02), (100, 500, 700)),
            "ResNet-26 / CIFAR-100": (case(CIFAR100, lr=0.02), (100, 300, 700)),
        }
    else:
        rows = {
            "ResNet-8": (case(DIGITS_NETWORKS["cifar10"], lr=0.0178), (4, 8, 16)),
            "WResNet-8": (case(DIGITS_NETWORKS["cifar100"], lr=0.0316), (4, 8, 16)),
        }
    return {
        (row, f"batch {size}"): base.but(batch_size=size, measure="none")
        for row, (base, sizes) in rows.items()
        for size in sizes
    }


def draw_against(accuracy: Quantity) -> Callable[[Figure, Outcome], None]:
    """Return what draws a panel for each data set."""

    def draw(figure: Figure, outcome: Outcome) -> None:
        for axes, row in row_panels(figure, outcome):
            points(axes, outcome, outcome.lines(row), EARLY_TRACE, accuracy)

    return draw


def learning_rate_checks(outcome: Outcome) -> list[Check]:
    """Claims 1 and 3; the learning rates of a data set are in ascending order."""
    pairs = [(outcome.keys(row)[0], outcome.keys(row)[-1]) for row in outcome.rows()]
    return [*_effects(outcome, pairs, "smallest", "largest learning rate", claim=1), _correlation(outcome)]


def batch_size_checks(outcome: Outcome) -> list[Check]:
    """Claims 2 and 3; the batch sizes of a data set are in ascending order."""
    pairs = [(outcome.keys(row)[-1], outcome.keys(row)[0]) for row in outcome.rows()]
    return [*_effects(outcome, pairs, "largest", "smallest batch", claim=2), _correlation(outcome)]


def _effects(outcome: Outcome, pairs: list[tuple[Key, Key]], sharp: str, flat: str, claim: int) -> list[Check]:
    kind = flat.split(maxsplit=1)[1]
    early, lost = outcome.ratios(pairs, EARLY_TRACE), outcome.differences(pairs, MAX_TEST_ACCURACY)
    ratio, points_lost = f"Tr(F_i), {sharp} / {flat}", f"best test accuracy, {sharp} − {flat}, points"
    return [
        Check(f"the {sharp} {kind} has the larger early Tr(F)", ratio, early, above=1, claim=claim),
        Check(f"the {sharp} {kind} tests worse", points_lost, lost, below=0, claim=claim),
    ]


def _correlation(outcome: Outcome) -> Check:
    """Spearman's correlation over the values of a data set, the mean over data sets."""

    def of(seed: int) -> float | None:
        return mean_correlation(
            [
                (outcome.value(seed, key, EARLY_TRACE), outcome.value(seed, key, MAX_TEST_ACCURACY))
                for key in outcome.keys(row)
            ]
            for row in outcome.rows()
        )

    number = "rank correlation of Tr(F_i) with the best test accuracy"
    return Check("early Tr(F) is the larger, the worse the accuracy", number, outcome.per_seed(of), below=0, claim=3)


def notes(scale: Scale) -> list[str]:
    """Say what Tr(F_i) is."""
    return [
        "Tr(F_i) is Tr(F) after the first epoch whose mean training loss is below ε.",
        *(
            ["ε is 3.5 for ImageNet and CIFAR-100, 1.2 for CIFAR-10. The paper has 32 seeds, for ImageNet 2."]
            if scale == "paper"
            else digits_notes(scale)
        ),
    ]


FIG2 = Experiment(
    title="Early Tr(F) and the best test accuracy, for several learning rates",
    cases=learning_rate_sweep,
    quantities=(EARLY_TRACE, MAX_TEST_ACCURACY),
    draw=draw_against(MAX_TEST_ACCURACY),
    checks=learning_rate_checks,
    notes=notes,
    size=(12.0, 4.0),
)
FIG7 = replace(
    FIG2,
    title="Early Tr(F) and the best test accuracy, for several batch sizes",
    cases=batch_size_sweep,
    checks=batch_size_checks,
)
FIG8 = Experiment(
    title="Early Tr(F) and the best training accuracy, for several learning rates",
    cases=learning_rate_sweep,
    quantities=(EARLY_TRACE, MAX_TRAIN_ACCURACY),
    draw=draw_against(MAX_TRAIN_ACCURACY),
    notes=notes,
    size=(12.0, 4.0),
)
FIG9 = replace(
    FIG8, title="Early Tr(F) and the best training accuracy, for several batch sizes", cases=batch_size_sweep
)
