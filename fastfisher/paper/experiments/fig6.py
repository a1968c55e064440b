"""Figure 6: Tr(H) at the best epoch of continuations of a model with low and one with high early Tr(F), CIFAR-100."""

from __future__ import annotations

from fastfisher.paper.continuations import cases_of, checks, draw, notes
from fastfisher.paper.experiment import FINAL_TRACE, HESSIAN_AT_BEST, MAX_TEST_ACCURACY, Experiment

EXPERIMENT = Experiment(
    title="Continuations of a model with low and one with high early Tr(F), CIFAR-100",
    cases=cases_of("cifar100"),
    quantities=(FINAL_TRACE, HESSIAN_AT_BEST, MAX_TEST_ACCURACY),
    draw=draw,
    checks=checks,
    notes=notes,
    size=(12.0, 4.0),
)
