"""Talk, variance reduction and pre-conditioning: curvature and gradient noise over training, ResNet-32."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, case
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, ramp, rows_of
from fastfisher.paper.experiment import Experiment, Outcome, Quantity, maximum
from fastfisher.paper.settings import CIFAR10, DIGITS_NETWORKS, digits_notes
from fastfisher.training.replicas import Metrics

RATES, BATCHES = "learning rates", "batch sizes"
# The talk does not say which: these are ours.
VALUES = {
    "paper": {RATES: (0.01, 0.03, 0.1), BATCHES: (32, 128, 512)},
    "digits": {RATES: (0.01, 0.0178, 0.0316), BATCHES: (8, 16, 32)},
}
SHOWN = {
    "top_eigenvalue": "λ¹_H",
    "minibatch_covariance_largest": "λ¹_K",
    "minibatch_covariance_trace": "Tr(K)",
}


def cases(scale: Scale) -> dict[Key, Case]:
    """Learning rates at one batch size and batch sizes at one learning rate, each from the least regularised on.

    The gradients of K are those of mini-batches.
    """
    measured = {"measure": "top_eigenvalue,minibatch_covariance"}
    if scale == "paper":
        base = case({**CIFAR10, **measured}, network="resnet32", epochs=20, trace_samples=25 * 128)
        rate, size = 0.03, 128
    else:
        base = case({**DIGITS_NETWORKS["cifar10"], **measured}, epochs=12, trace_samples=256)
        rate, size = 0.0178, 16
    base = base.without("lr_milestones", "lr_decay", "trace_thresholds")
    values = VALUES[scale]
    return {
        **{(RATES, f"lr {each:g}"): base.but(lr=each, batch_size=size) for each in values[RATES]},
        **{(BATCHES, f"batch {each}"): base.but(lr=rate, batch_size=each) for each in reversed(values[BATCHES])},
    }


def _largest_ratio(above: str, below: str) -> Callable[[Metrics], float | None]:
    def of(run: Metrics) -> float | None:
        both = [(record.get(above), record.get(below)) for record in run]
        found = [a / b for a, b in both if a is not None and b is not None and b > 0]
        return max(found, default=None)

    return of


MAX_H = maximum("top_eigenvalue", "maximum of λ¹_H")
MAX_K = maximum("minibatch_covariance_largest", "maximum of λ¹_K")
MAX_TRACE_K = maximum("minibatch_covariance_trace", "maximum of Tr(K)")
CONDITION_K = Quantity(
    "maximum of λ*_K/λ¹_K", _largest_ratio("minibatch_covariance_smallest", "minibatch_covariance_largest")
)
CONDITION_H = Quantity("maximum of λ*_K/λ¹_H", _largest_ratio("minibatch_covariance_smallest", "top_eigenvalue"))


def draw(figure: Figure, outcome: Outcome) -> None:
    """λ¹_H, λ¹_K and Tr(K) over the epochs; a row for learning rates and one for batch sizes."""
    rows = rows_of(outcome)
    axes = panels(figure, len(rows), len(SHOWN))
    for number, row in enumerate(rows):
        lines = {key[1]: key for key in outcome.keys(row)}
        for place, (name, label) in enumerate(SHOWN.items()):
            shown = axes[number * len(SHOWN) + place]
            curves(shown, outcome, lines, name, label, logarithmic=True, colours=ramp(len(lines)))
        legend(axes[number * len(SHOWN)])


def checks(outcome: Outcome) -> list[Check]:
    """The talk's two conjectures, for the largest learning rate against the smallest, and for the batch sizes."""
    found = []
    for row in rows_of(outcome):
        keys = outcome.keys(row)
        pair = [(keys[-1], keys[0])]
        flat = f"{keys[-1][1]} / {keys[0][1]}"
        for quantity in (MAX_H, MAX_K):
            found.append(
                Check(f"variance reduction, {row}", f"{quantity.name}, {flat}", outcome.ratios(pair, quantity), below=1)
            )
        for quantity in (CONDITION_K, CONDITION_H):
            found.append(
                Check(f"pre-conditioning, {row}", f"{quantity.name}, {flat}", outcome.ratios(pair, quantity), above=1)
            )
    return found


EXPERIMENT = Experiment(
    title="The largest eigenvalues of the Hessian and of the covariance of mini-batch gradients over training",
    cases=cases,
    quantities=(MAX_H, MAX_K, MAX_TRACE_K, CONDITION_K, CONDITION_H),
    draw=draw,
    checks=checks,
    notes=lambda scale: [
        "The talk does not say which learning rates and batch sizes: these are ours. K is that of the mini-batches "
        "that the measured examples make: with few of them its smallest eigenvalue is that of their Gram matrix.",
        *digits_notes(scale),
    ],
    size=(13.0, 7.0),
)
