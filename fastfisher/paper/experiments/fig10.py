"""Figure 10: validation accuracy and Tr(F) over training with and without penalties, DenseNet and SimpleCNN."""

from __future__ import annotations

from fastfisher.paper.drawing import accuracy_and_trace
from fastfisher.paper.experiment import MAX_TRACE, VALIDATION_ACCURACY, Experiment
from fastfisher.paper.penalty_curves import cases_of, checks
from fastfisher.paper.settings import DENSENET, SIMPLE_CNN, table_1_notes

EXPERIMENT = Experiment(
    title="Validation accuracy and Tr(F) over training, DenseNet and SimpleCNN",
    cases=cases_of(DENSENET, SIMPLE_CNN),
    quantities=(VALIDATION_ACCURACY, MAX_TRACE),
    draw=accuracy_and_trace,
    checks=checks,
    notes=table_1_notes,
    size=(10.0, 7.0),
)
