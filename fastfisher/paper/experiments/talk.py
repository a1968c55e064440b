"""The talk: curvature and gradient noise over training, the edge of stability, the early phase in the plane."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from fastfisher.paper.cases import Case, Key, Scale, case
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, ramp
from fastfisher.paper.experiment import Experiment, Outcome, Quantity, final, maximum, series
from fastfisher.paper.settings import CIFAR10, DIGITS_NETWORKS, digits_notes, large_rate
from fastfisher.training.summary import Metrics

# ---- variance reduction and pre-conditioning, ResNet-32 --------------------------------------------------------------

RATES, BATCHES = "learning rates", "batch sizes"
# The talk does not say which: these are ours.
VALUES = {
    "paper": {RATES: (0.01, 0.03, 0.1), BATCHES: (32, 128, 512)},
    "digits": {RATES: (0.01, 0.0178, 0.0316), BATCHES: (8, 16, 32)},
}
SHOWN = {"top_eigenvalue": "λ¹_H", "minibatch_covariance_largest": "λ¹_K", "minibatch_covariance_trace": "Tr(K)"}


def regularisation_cases(scale: Scale) -> dict[Key, Case]:
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


def draw_eigenvalues(figure: Figure, outcome: Outcome) -> None:
    """λ¹_H, λ¹_K and Tr(K) over the epochs; a row for learning rates and one for batch sizes."""
    rows = outcome.rows()
    axes = panels(figure, len(rows), len(SHOWN))
    for number, row in enumerate(rows):
        lines = outcome.lines(row)
        for place, (name, label) in enumerate(SHOWN.items()):
            shown = axes[number * len(SHOWN) + place]
            curves(shown, outcome, lines, name, label, logarithmic=True, colours=ramp(len(lines)))
        legend(axes[number * len(SHOWN)])


def conjectures(outcome: Outcome) -> list[Check]:
    """The talk's two conjectures, for the largest learning rate against the smallest, and for the batch sizes."""
    found = []
    for row in outcome.rows():
        keys = outcome.keys(row)
        for quantity in (MAX_H, MAX_K, CONDITION_K, CONDITION_H):
            values = outcome.ratios([(keys[-1], keys[0])], quantity)
            number = f"{quantity.name}, {keys[-1][1]} / {keys[0][1]}"
            if quantity in (MAX_H, MAX_K):
                found.append(Check(f"variance reduction, {row}", number, values, below=1))
            else:
                found.append(Check(f"pre-conditioning, {row}", number, values, above=1))
    return found


TALK1 = Experiment(
    title="The largest eigenvalues of the Hessian and of the covariance of mini-batch gradients over training",
    cases=regularisation_cases,
    quantities=(MAX_H, MAX_K, MAX_TRACE_K, CONDITION_K, CONDITION_H),
    draw=draw_eigenvalues,
    checks=conjectures,
    notes=lambda scale: [
        "The talk does not say which learning rates and batch sizes: these are ours. K is that of the mini-batches "
        "that the measured examples make: with few of them its smallest eigenvalue is that of their Gram matrix.",
        *digits_notes(scale),
    ],
    size=(13.0, 7.0),
)


# ---- the edge of stability: the largest eigenvalue of the Hessian against 2/η under gradient descent -----------------

DESCENT_RATES = {"paper": (0.02, 0.04, 0.08), "digits": (0.05, 0.1, 0.2)}
SHARPNESS = final("top_eigenvalue", "λ¹_H at the end")
LOSS = final("train_loss", "training loss at the end")
WITHIN = 0.25
"""How near to 2/η the eigenvalue has to be, as a share of it, to be called at the edge."""


def descent_cases(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN with the whole training set as its batch and no momentum; Cohen et al. take 5,000 examples too."""
    if scale == "paper":
        base = case(data="cifar10", network="simple_cnn", examples=5_000, batch_size=5_000, epochs=3_000)
        base = base.but(evaluate=(5_000, 5_000), trace_samples=5_000, measure_every="50epochs")
    else:
        base = case(data="digits", network="small_simple_cnn", image_size=12, examples=200, batch_size=200, epochs=600)
        base = base.but(evaluate=(200, 200), trace_samples=200, measure_every="20epochs")
    return {
        (f"lr {rate:g}",): base.but(lr=rate, momentum=0.0, measure="top_eigenvalue") for rate in DESCENT_RATES[scale]
    }


def draw_sharpness(figure: Figure, outcome: Outcome) -> None:
    """λ¹_H with 2/η dashed, and the loss."""
    left, right = panels(figure, 1, 2)
    lines = outcome.lines()
    colours = ramp(len(lines))
    curves(left, outcome, lines, "top_eigenvalue", "λ¹_H (dashed: 2/η)", colours=colours)
    for shown, key in zip(colours, lines.values(), strict=True):
        left.axhline(2 / outcome.configs[key].lr, color=shown, linestyle="--", linewidth=1)
    curves(right, outcome, lines, "train_loss", "training loss", logarithmic=True, colours=colours)
    legend(left)


def _largest_share(outcome: Outcome, key: Key) -> Quantity:
    """The largest λ¹_H η/2, as the median of neighbouring measurements of three: one may overshoot."""

    def of(run: Metrics) -> float | None:
        values = series(run, "top_eigenvalue")[1]
        threes = [statistics.median(values[start : start + 3]) for start in range(max(1, len(values) - 2))]
        return max(threes) * outcome.configs[key].lr / 2 if values else None

    return Quantity("λ¹_H η/2", of)


def edge_checks(outcome: Outcome) -> list[Check]:
    """That sharpness rises to 2/η and stays about there."""
    return [
        Check(
            f"λ¹_H reaches 2/η at {key[0]}",
            "largest λ¹_H η/2 over training",
            outcome.per_seed(lambda seed, key=key: outcome.value(seed, key, _largest_share(outcome, key))),  # type: ignore[misc]
            above=1 - WITHIN,
            below=1 + WITHIN,
        )
        for key in outcome.runs
    ]


TALK2 = Experiment(
    title="The largest eigenvalue of the Hessian against 2/η under full-batch gradient descent",
    cases=descent_cases,
    quantities=(SHARPNESS, LOSS),
    draw=draw_sharpness,
    checks=edge_checks,
    notes=lambda scale: [
        "An epoch is a step: the batch is the training set, and there is no momentum. Near 2/η means within "
        f"{WITHIN:.0%}, for the largest median of three measurements in a row."
    ],
)


# ---- where a large and a small learning rate part, in the plane ------------------------------------------------------

LARGE, SMALL = "large learning rate", "small learning rate"
PLANE_RATES = {"paper": {LARGE: 0.1, SMALL: 0.01}, "digits": {LARGE: 0.0316, SMALL: 0.01}}
MARKS = {LARGE: ("o", "#D55E00"), SMALL: ("s", "#0072B2")}
ACCURACY = maximum("measured_accuracy", "largest accuracy on measured training examples, %", 100)


def plane_cases(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN with both, from the same weights, measured every few steps with its predictions on test examples."""
    base = large_rate(scale).without("lr_milestones")
    short = {
        "paper": {"epochs": 10, "measure_every": "50steps", "trace_samples": 25 * 128},
        "digits": {"epochs": 6, "measure_every": "5steps", "trace_samples": 256},
    }[scale]
    return {
        (name,): base.but(**short, lr=rate, measure="accuracy,minibatch_covariance", save_predictions=True)
        for name, rate in PLANE_RATES[scale].items()
    }


def draw_plane(figure: Figure, outcome: Outcome) -> None:
    """The first seed's trajectories of predictions on two principal axes, coloured by λ¹_K and by accuracy."""
    seed = outcome.seeds[0]
    trajectories = {key: _trajectory(outcome, key, seed) for key, runs in outcome.runs.items() if seed in runs}
    if sum(map(len, trajectories.values())) < 2:
        return
    flat = np.concatenate(list(trajectories.values()))
    plane = PCA(n_components=min(2, len(flat))).fit(flat)
    for axes, name, label in zip(
        panels(figure, 1, 2),
        ("minibatch_covariance_largest", "measured_accuracy"),
        ("log10 λ¹_K", "accuracy on training examples"),
        strict=True,
    ):
        _scatter(axes, outcome, {key: plane.transform(each) for key, each in trajectories.items()}, seed, name, label)


def _trajectory(outcome: Outcome, key: Key, seed: int) -> np.ndarray:
    """The predicted probabilities at each measurement, a row for each."""
    predictions = outcome.folders[key, seed].read_predictions()
    measured = {record["step"] for record in outcome.runs[key][seed]}
    return np.stack([each.astype(np.float32).ravel() for step, each in predictions.items() if step in measured])


def _scatter(axes: Axes, outcome: Outcome, points: dict[Key, np.ndarray], seed: int, name: str, label: str) -> None:
    values = {
        key: np.array([r[name] if r.get(name) is not None else np.nan for r in outcome.runs[key][seed] if name in r])
        for key in points
    }
    if name.endswith("largest"):
        values = {key: np.log10(np.maximum(each, 1e-12)) for key, each in values.items()}
    together = np.concatenate(list(values.values()))
    low, high = float(np.nanmin(together)), float(np.nanmax(together))
    for key, place in points.items():
        marker, colour = MARKS[key[0]]
        x, y = place[:, 0], place[:, 1] if place.shape[1] > 1 else np.zeros(len(place))
        axes.plot(x, y, color=colour, linewidth=0.8)
        drawn = axes.scatter(
            x, y, c=values[key], vmin=low, vmax=high, marker=marker, edgecolors=colour, s=28, label=key[0]
        )
    axes.figure.colorbar(drawn, ax=axes, label=label)
    axes.set_xlabel("first principal axis of the predictions")
    axes.set_ylabel("second")
    axes.legend(fontsize="small", frameon=False)


def plane_checks(outcome: Outcome) -> list[Check]:
    """That the large learning rate turns away from sharp regions: the break-even point."""
    values = outcome.ratios([((LARGE,), (SMALL,))], MAX_K)
    return [
        Check("the large learning rate stays where λ¹_K is small", "maximum of λ¹_K, large / small", values, below=1)
    ]


TALK3 = Experiment(
    title="Early trajectories of predictions in the plane, coloured by λ¹_K and by accuracy",
    cases=plane_cases,
    quantities=(MAX_K, ACCURACY),
    draw=draw_plane,
    checks=plane_checks,
    notes=lambda scale: [
        "Each point is a network on its way: its predicted probabilities on the test examples, on the first two "
        "principal axes of all of them (the talk's pictures use UMAP). The first seed is drawn.",
        *digits_notes(scale),
    ],
    size=(13.0, 5.0),
)
