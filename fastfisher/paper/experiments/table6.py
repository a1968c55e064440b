"""Table 6: the training accuracy in the last epoch of the runs of table 1."""

from __future__ import annotations

from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import TRAIN_ACCURACY, Experiment, Outcome, paper_table
from fastfisher.paper.settings import COLUMNS, table_1_cases, table_1_notes

# In the published text the columns of FP and GP_r cannot be read for all settings: those numbers are left out.
PAPER = {
    **paper_table(
        TRAIN_ACCURACY,
        COLUMNS,
        {
            "WResNet / TinyImageNet": (99.84, 99.96, 99.97, 93.84, 81.05, 86.46),
            "SimpleCNN / CIFAR-10": (100.00, 100.00, 97.79, 100.00, 93.80, 94.64),
        },
    ),
    **paper_table(
        TRAIN_ACCURACY,
        COLUMNS[:4],
        {
            "DenseNet / CIFAR-100": (99.98, 99.97, 99.96, 99.91),
            "VGG-11 / CIFAR-100": (99.98, 99.98, 99.85, 99.62),
            "WResNet / CIFAR-100": (99.98, 99.98, 99.97, 99.96),
        },
    ),
}


def checks(outcome: Outcome) -> list[Check]:
    """That the small learning rate does not underfit."""
    pairs = [((row, "baseline"), (row, "η*")) for row in rows_of(outcome)]
    number = "training accuracy, baseline − η*, points"
    return [
        Check("the small learning rate trains no worse", number, outcome.differences(pairs, TRAIN_ACCURACY), above=-1)
    ]


EXPERIMENT = Experiment(
    title="Training accuracy in the last epoch of the runs of table 1",
    cases=table_1_cases,
    quantities=(TRAIN_ACCURACY,),
    draw=table_of_bars(TRAIN_ACCURACY, rows_of, COLUMNS),
    checks=checks,
    paper=PAPER,
    notes=table_1_notes,
    seeds=5,
    size=(11.0, 4.0),
)
