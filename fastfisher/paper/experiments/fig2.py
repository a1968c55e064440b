"""Figure 2: Tr(F) early in training against the final test accuracy, over learning rates."""

from __future__ import annotations

from fastfisher.paper.early_phase import draw_against, learning_rate_checks, sweep_notes
from fastfisher.paper.experiment import EARLY_TRACE, MAX_TEST_ACCURACY, Experiment
from fastfisher.paper.settings import learning_rate_sweep

EXPERIMENT = Experiment(
    title="Early Tr(F) and the best test accuracy, for several learning rates",
    cases=learning_rate_sweep,
    quantities=(EARLY_TRACE, MAX_TEST_ACCURACY),
    draw=draw_against(MAX_TEST_ACCURACY),
    checks=learning_rate_checks,
    notes=sweep_notes,
    size=(12.0, 4.0),
)
