"""What figures 2, 7, 8 and 9 share: Tr(F_i) against an accuracy, over learning rates or batch sizes."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from fastfisher.paper.cases import Key, Scale
from fastfisher.paper.claims import Check, correlation
from fastfisher.paper.drawing import legend, panels, points, rows_of
from fastfisher.paper.experiment import EARLY_TRACE, MAX_TEST_ACCURACY, Outcome, Quantity
from fastfisher.paper.settings import digits_notes


def draw_against(accuracy: Quantity) -> Callable[[Figure, Outcome], None]:
    """Return what draws a panel for each data set."""

    def draw(figure: Figure, outcome: Outcome) -> None:
        rows = rows_of(outcome)
        for axes, row in zip(panels(figure, 1, len(rows)), rows, strict=True):
            points(axes, outcome, {key[1]: key for key in outcome.keys(row)}, EARLY_TRACE, accuracy)
            axes.set_title(row, fontsize="medium")
            legend(axes)

    return draw


def learning_rate_checks(outcome: Outcome) -> list[Check]:
    """Claims 1 and 3; the learning rates of a data set are in ascending order."""
    pairs = [(outcome.keys(row)[0], outcome.keys(row)[-1]) for row in rows_of(outcome)]
    return [*_effects(outcome, pairs, "smallest", "largest learning rate", claim=1), _correlation(outcome)]


def batch_size_checks(outcome: Outcome) -> list[Check]:
    """Claims 2 and 3; the batch sizes of a data set are in ascending order."""
    pairs = [(outcome.keys(row)[-1], outcome.keys(row)[0]) for row in rows_of(outcome)]
    return [*_effects(outcome, pairs, "largest", "smallest batch", claim=2), _correlation(outcome)]


def _effects(outcome: Outcome, pairs: list[tuple[Key, Key]], sharp: str, flat: str, claim: int) -> list[Check]:
    kind = flat.split(maxsplit=1)[1]
    return [
        Check(
            f"the {sharp} {kind} has the larger early Tr(F)",
            f"Tr(F_i), {sharp} / {flat}",
            outcome.ratios(pairs, EARLY_TRACE),
            above=1,
            claim=claim,
        ),
        Check(
            f"the {sharp} {kind} tests worse",
            f"best test accuracy, {sharp} − {flat}, points",
            outcome.differences(pairs, MAX_TEST_ACCURACY),
            below=0,
            claim=claim,
        ),
    ]


def _correlation(outcome: Outcome) -> Check:
    """Spearman's correlation over the values of a data set, the mean over data sets."""

    def of(seed: int) -> float | None:
        found = []
        for row in rows_of(outcome):
            both = [
                (outcome.value(seed, key, EARLY_TRACE), outcome.value(seed, key, MAX_TEST_ACCURACY))
                for key in outcome.keys(row)
            ]
            whole = [(x, y) for x, y in both if x is not None and y is not None]
            r = correlation([x for x, _ in whole], [y for _, y in whole])
            if r is not None:
                found.append(r)
        return sum(found) / len(found) if found else None

    return Check(
        "early Tr(F) is the larger, the worse the accuracy",
        "rank correlation of Tr(F_i) with the best test accuracy",
        outcome.per_seed(of),
        below=0,
        claim=3,
    )


def sweep_notes(scale: Scale) -> list[str]:
    """Say what Tr(F_i) is."""
    return [
        "Tr(F_i) is Tr(F) after the first epoch whose mean training loss is below ε.",
        *(
            ["ε is 3.5 for ImageNet and CIFAR-100, 1.2 for CIFAR-10. The paper has 32 seeds, for ImageNet 2."]
            if scale == "paper"
            else digits_notes(scale)
        ),
    ]
