"""Figure 9: Tr(F) early in training against the training accuracy, for the runs of figure 7."""

from __future__ import annotations

from fastfisher.paper.early_phase import draw_against, sweep_notes
from fastfisher.paper.experiment import EARLY_TRACE, MAX_TRAIN_ACCURACY, Experiment
from fastfisher.paper.settings import batch_size_sweep

EXPERIMENT = Experiment(
    title="Early Tr(F) and the best training accuracy, for several batch sizes",
    cases=batch_size_sweep,
    quantities=(EARLY_TRACE, MAX_TRAIN_ACCURACY),
    draw=draw_against(MAX_TRAIN_ACCURACY),
    notes=sweep_notes,
    size=(12.0, 4.0),
)
