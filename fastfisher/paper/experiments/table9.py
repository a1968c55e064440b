"""Table 9: training accuracy on noisy examples, for the runs of table 3 with 25 % noise."""

from __future__ import annotations

from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import NOISY_ACCURACY, Experiment, Outcome, paper_table
from fastfisher.paper.settings import NOISY_METHODS, noisy_notes, table_3_cases

PAPER = {"VGG-11 / CIFAR-100, 25 %": (99.56,), "ResNet-52 / CIFAR-100, 25 %": (73.67,)}


def checks(outcome: Outcome) -> list[Check]:
    """Claim 7: what is memorised."""
    pairs = [((row, "FP"), (row, "baseline")) for row in rows_of(outcome)]
    number = "accuracy on noisy examples, FP − baseline, points"
    return [Check("FP memorises less", number, outcome.differences(pairs, NOISY_ACCURACY), below=0, claim=7)]


EXPERIMENT = Experiment(
    title="Accuracy on noisy training examples in the last epoch, with 25 % noisy labels",
    cases=lambda scale: table_3_cases(scale, (0.25,)),
    quantities=(NOISY_ACCURACY,),
    draw=table_of_bars(NOISY_ACCURACY, rows_of, NOISY_METHODS),
    checks=checks,
    paper=paper_table(NOISY_ACCURACY, NOISY_METHODS[:1], PAPER),
    notes=lambda scale: [
        *noisy_notes(scale),
        "Of the numbers of this table only the baselines' can be read in the published text.",
    ],
    seeds=5,
)
