"""Table 1: five settings, the best and a small learning rate, and four penalties at the small one."""

from __future__ import annotations

from fastfisher.paper.claims import AS_GOOD, Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import TEST_ACCURACY, TRAIN_ACCURACY, Experiment, Outcome, paper_table
from fastfisher.paper.settings import COLUMNS, table_1_cases, table_1_notes

PAPER = {
    "WResNet / TinyImageNet": (54.67, 52.57, 52.79, 56.44, 56.73, 55.41),
    "DenseNet / CIFAR-100": (66.09, 58.51, 62.12, 64.42, 66.41, 66.39),
    "VGG-11 / CIFAR-100": (45.86, 36.86, 45.26, 47.35, 49.87, 48.26),
    "WResNet / CIFAR-100": (53.96, 46.38, 58.68, 57.68, 57.05, 58.15),
    "SimpleCNN / CIFAR-10": (76.94, 71.32, 75.68, 75.73, 79.66, 79.76),
}


def checks(outcome: Outcome) -> list[Check]:
    """Claims 1, 4 and 5, each over the mean of the settings."""

    def gained(first: str, second: str) -> tuple[float, ...]:
        pairs = [((row, first), (row, second)) for row in rows_of(outcome)]
        return outcome.differences(pairs, TEST_ACCURACY)

    def number(first: str, second: str) -> str:
        return f"test accuracy, {first} − {second}, points"

    return [
        Check(
            "the small learning rate tests worse", number("baseline", "η*"), gained("baseline", "η*"), below=0, claim=1
        ),
        Check(
            "FP improves the small learning rate", number("FP", "baseline"), gained("FP", "baseline"), above=0, claim=4
        ),
        Check("FP closes the gap to η*", number("FP", "η*"), gained("FP", "η*"), above=-AS_GOOD, claim=4),
        Check("FP does better than GP", number("FP", "GP"), gained("FP", "GP"), above=0, claim=5),
        Check("FP does better than GP_x", number("FP", "GP_x"), gained("FP", "GP_x"), above=0, claim=5),
        Check(
            "FP does as well as GP_r",
            number("FP", "GP_r"),
            gained("FP", "GP_r"),
            above=-AS_GOOD,
            below=AS_GOOD,
            claim=5,
        ),
    ]


EXPERIMENT = Experiment(
    title="Test accuracy with the best and with a small learning rate, and with penalties at the small one",
    cases=table_1_cases,
    quantities=(TEST_ACCURACY, TRAIN_ACCURACY),
    draw=table_of_bars(TEST_ACCURACY, rows_of, COLUMNS),
    checks=checks,
    paper=paper_table(TEST_ACCURACY, COLUMNS, PAPER),
    notes=table_1_notes,
    seeds=5,
    size=(11.0, 4.0),
)
