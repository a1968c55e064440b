"""Table 7: the training accuracy in the last epoch of the runs of table 2."""

from __future__ import annotations

from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import TRAIN_ACCURACY, Experiment, paper_table
from fastfisher.paper.settings import TABLE_2_COLUMNS, table_2_cases, table_2_notes

PAPER = {
    "WResNet / TinyImageNet": (99.86, 93.65),
    "DenseNet / CIFAR-100": (98.75, 97.53),
    "VGG-11 / CIFAR-100": (98.64, 93.06),
    "WResNet / CIFAR-100": (99.97, 99.97),
    "SimpleCNN / CIFAR-10": (97.52, 98.94),
}

EXPERIMENT = Experiment(
    title="Training accuracy in the last epoch of the runs of table 2",
    cases=table_2_cases,
    quantities=(TRAIN_ACCURACY,),
    draw=table_of_bars(TRAIN_ACCURACY, rows_of, TABLE_2_COLUMNS),
    paper=paper_table(TRAIN_ACCURACY, TABLE_2_COLUMNS, PAPER),
    notes=table_2_notes,
)
