"""Table 3: test accuracy under noisy labels, for FP, the other penalties and mixup."""

from __future__ import annotations

from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import TEST_AT_BEST_VALIDATION, Experiment, Outcome, paper_table
from fastfisher.paper.settings import NOISE, NOISY_METHODS, noisy_notes, table_3_cases

PAPER = {
    "VGG-11 / CIFAR-100, 25 %": (41.74, 52.31, 45.94, 60.18, 58.46),
    "ResNet-52 / CIFAR-100, 25 %": (53.30, 61.61, 52.70, 58.31, 57.60),
    "VGG-11 / CIFAR-100, 50 %": (30.05, 39.15, 34.26, 51.33, 50.33),
    "ResNet-52 / CIFAR-100, 50 %": (43.35, 51.71, 42.99, 47.99, 50.08),
}


def checks(outcome: Outcome) -> list[Check]:
    """Claim 7, and what section 4.1 says beside it, over the mean of networks and noise."""

    def gained(second: str) -> tuple[float, ...]:
        pairs = [((row, "FP"), (row, second)) for row in rows_of(outcome)]
        return outcome.differences(pairs, TEST_AT_BEST_VALIDATION)

    return [
        Check(
            "FP improves accuracy under label noise",
            "test accuracy, FP − baseline, points",
            gained("baseline"),
            above=0,
            claim=7,
        ),
        Check("FP does better than GP_x", "test accuracy, FP − GP_x, points", gained("GP_x"), above=0),
        Check("FP is competitive with mixup", "test accuracy, FP − mixup, points", gained("mixup"), above=-1),
    ]


EXPERIMENT = Experiment(
    title="Test accuracy at the best validation epoch, with noisy labels",
    cases=lambda scale: table_3_cases(scale, NOISE),
    quantities=(TEST_AT_BEST_VALIDATION,),
    draw=table_of_bars(TEST_AT_BEST_VALIDATION, rows_of, NOISY_METHODS),
    checks=checks,
    paper=paper_table(TEST_AT_BEST_VALIDATION, NOISY_METHODS, PAPER),
    notes=noisy_notes,
    seeds=5,
    size=(11.0, 4.0),
)
