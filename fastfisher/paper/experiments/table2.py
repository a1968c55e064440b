"""Table 2: the penalty beside the best learning rate, with augmentation."""

from __future__ import annotations

from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import TEST_ACCURACY, Experiment, Outcome, paper_table
from fastfisher.paper.settings import TABLE_2_COLUMNS, table_2_cases, table_2_notes

PAPER = {
    "WResNet / TinyImageNet": (54.70, 60.00),
    "DenseNet / CIFAR-100": (74.41, 74.19),
    "VGG-11 / CIFAR-100": (59.82, 65.08),
    "WResNet / CIFAR-100": (69.48, 71.53),
    "SimpleCNN / CIFAR-10": (87.16, 87.52),
}


def checks(outcome: Outcome) -> list[Check]:
    """What the text says of table 2, over the mean of the settings."""
    pairs = [((row, "FP"), (row, "η*")) for row in rows_of(outcome)]
    number = "test accuracy, FP − η*, points"
    return [Check("FP improves the best learning rate", number, outcome.differences(pairs, TEST_ACCURACY), above=0)]


EXPERIMENT = Experiment(
    title="Test accuracy of FP with the best learning rate and augmentation",
    cases=table_2_cases,
    quantities=(TEST_ACCURACY,),
    draw=table_of_bars(TEST_ACCURACY, rows_of, TABLE_2_COLUMNS),
    checks=checks,
    paper=paper_table(TEST_ACCURACY, TABLE_2_COLUMNS, PAPER),
    notes=table_2_notes,
)
