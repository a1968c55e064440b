"""Table 8: training accuracy on clean examples, for the runs of table 3 with 25 % noise."""

from __future__ import annotations

from fastfisher.paper.drawing import rows_of, table_of_bars
from fastfisher.paper.experiment import CLEAN_ACCURACY, Experiment
from fastfisher.paper.settings import NOISY_METHODS, noisy_notes, table_3_cases

EXPERIMENT = Experiment(
    title="Accuracy on clean training examples in the last epoch, with 25 % noisy labels",
    cases=lambda scale: table_3_cases(scale, (0.25,)),
    quantities=(CLEAN_ACCURACY,),
    draw=table_of_bars(CLEAN_ACCURACY, rows_of, NOISY_METHODS),
    notes=lambda scale: [*noisy_notes(scale), "The numbers of this table cannot be read in the published text."],
    seeds=5,
)
