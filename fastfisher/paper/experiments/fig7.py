"""Figure 7: Tr(F) early in training against the final test accuracy, over batch sizes."""

from __future__ import annotations

from fastfisher.paper.early_phase import batch_size_checks, draw_against, sweep_notes
from fastfisher.paper.experiment import EARLY_TRACE, MAX_TEST_ACCURACY, Experiment
from fastfisher.paper.settings import batch_size_sweep

EXPERIMENT = Experiment(
    title="Early Tr(F) and the best test accuracy, for several batch sizes",
    cases=batch_size_sweep,
    quantities=(EARLY_TRACE, MAX_TEST_ACCURACY),
    draw=draw_against(MAX_TEST_ACCURACY),
    checks=batch_size_checks,
    notes=sweep_notes,
    size=(12.0, 4.0),
)
