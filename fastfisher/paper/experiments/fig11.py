"""Figure 11: the gradients of clean and of noisy examples under FP, ResNet-52, 25 % noise."""

from __future__ import annotations

from fastfisher.paper.experiment import CLEAN_ACCURACY, NOISY_ACCURACY, Experiment
from fastfisher.paper.noisy_gradients import MEAN_RATIO, checks, draw
from fastfisher.paper.settings import noisy_notes, noisy_with_coefficients

EXPERIMENT = Experiment(
    title="Gradient norms and accuracies on clean and noisy examples, for several α, ResNet-52",
    cases=lambda scale: {
        (name,): case for name, case in noisy_with_coefficients("ResNet-52 / CIFAR-100", scale).items()
    },
    quantities=(CLEAN_ACCURACY, NOISY_ACCURACY, MEAN_RATIO),
    draw=draw,
    checks=checks,
    notes=noisy_notes,
    seeds=3,
    size=(13.0, 7.0),
)
