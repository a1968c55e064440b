"""Table 5: what the runs of table 1 cost, in seconds for each epoch."""

from __future__ import annotations

from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import SECONDS_PER_EPOCH, Experiment, Outcome, paper_table
from fastfisher.paper.settings import COLUMNS, table_1_cases, table_1_notes

PAPER = {
    "WResNet / TinyImageNet": (214.45, 142.69, 233.14, 143.78, 208.62, 371.74),
    "DenseNet / CIFAR-100": (78.88, 57.40, 77.89, 78.66, 97.25, 75.96),
    "VGG-11 / CIFAR-100": (30.50, 35.27, 31.54, 32.52, 43.41, 42.40),
    "WResNet / CIFAR-100": (49.64, 47.99, 71.33, 61.36, 76.93, 53.25),
    "SimpleCNN / CIFAR-10": (18.64, 19.51, 26.09, 19.91, 21.21, 20.55),
}


def checks(outcome: Outcome) -> list[Check]:
    """The paper calls the cost relatively small; its own mean is 1.41."""
    pairs = [((row, "FP"), (row, "baseline")) for row in rows_of(outcome)]
    number = "seconds per epoch, FP / baseline"
    return [
        Check(
            "FP every 10 steps costs less than half a step", number, outcome.ratios(pairs, SECONDS_PER_EPOCH), below=1.5
        )
    ]


EXPERIMENT = Experiment(
    title="Seconds of training per epoch",
    cases=table_1_cases,
    quantities=(SECONDS_PER_EPOCH,),
    draw=table_of_bars(SECONDS_PER_EPOCH, rows_of, COLUMNS),
    checks=checks,
    paper=paper_table(SECONDS_PER_EPOCH, COLUMNS, PAPER),
    notes=lambda scale: [
        *table_1_notes(scale),
        "Wall time of the steps alone, without tests and measurements, while other runs trained beside: ratios carry "
        "over, seconds do not. bench/ measures the cost of a step by itself.",
    ],
    seeds=5,
    size=(11.0, 4.0),
)
