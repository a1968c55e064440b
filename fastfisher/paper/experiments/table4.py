"""Table 4: the largest Tr(F) on the way, for the runs of table 1."""

from __future__ import annotations

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import MAX_TRACE, Experiment, Outcome, paper_table
from fastfisher.paper.settings import COLUMNS, WRESNET_TINY, table_1_cases, table_1_notes

PAPER = {
    "DenseNet / CIFAR-100": (24.68, 98.17, 83.64, 64.33, 66.24, 73.66),
    "VGG-11 / CIFAR-100": (50.88, 148.19, 102.95, 58.53, 64.93, 62.96),
    "WResNet / CIFAR-100": (26.21, 91.39, 41.43, 40.94, 56.53, 39.31),
    "SimpleCNN / CIFAR-10": (24.21, 52.05, 47.96, 25.03, 19.63, 25.35),
}


def cases(scale: Scale) -> dict[Key, Case]:
    """Table 1 without TinyImageNet, which table 4 leaves out."""
    return {key: case for key, case in table_1_cases(scale).items() if key[0] != WRESNET_TINY.name}


def checks(outcome: Outcome) -> list[Check]:
    """Claims 1 and 4, each over the mean of the settings."""

    def ratio(first: str, second: str) -> tuple[float, ...]:
        return outcome.ratios([((row, first), (row, second)) for row in rows_of(outcome)], MAX_TRACE)

    return [
        Check(
            "the small learning rate has the higher peak",
            "maximum of Tr(F), baseline / η*",
            ratio("baseline", "η*"),
            above=1,
            claim=1,
        ),
        Check(
            "FP lowers the peak of Tr(F)", "maximum of Tr(F), FP / baseline", ratio("FP", "baseline"), below=1, claim=4
        ),
    ]


EXPERIMENT = Experiment(
    title="The maximum of Tr(F) over training, from the first epoch on",
    cases=cases,
    quantities=(MAX_TRACE,),
    draw=table_of_bars(MAX_TRACE, rows_of, COLUMNS),
    checks=checks,
    paper=paper_table(MAX_TRACE, COLUMNS, PAPER),
    notes=table_1_notes,
    seeds=5,
    size=(11.0, 4.0),
)
