"""Talk, the early phase in the plane: where a large and a small learning rate part."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import panels
from fastfisher.paper.experiment import Experiment, Outcome, maximum
from fastfisher.paper.settings import digits_notes, large_rate

LARGE, SMALL = "large learning rate", "small learning rate"
RATES = {"paper": {LARGE: 0.1, SMALL: 0.01}, "digits": {LARGE: 0.0316, SMALL: 0.01}}
MARKS = {LARGE: ("o", "#D55E00"), SMALL: ("s", "#0072B2")}
MAX_K = maximum("minibatch_covariance_largest", "maximum of λ¹_K")
ACCURACY = maximum("measured_accuracy", "largest accuracy on measured training examples, %", 100)


def cases(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN with both, from the same weights, measured every few steps with its predictions on test examples."""
    base = large_rate(scale).without("lr_milestones")
    short = {
        "paper": {"epochs": 10, "measure_every": "50steps", "trace_samples": 25 * 128},
        "digits": {"epochs": 6, "measure_every": "5steps", "trace_samples": 256},
    }[scale]
    return {
        (name,): base.but(**short, lr=rate, measure="accuracy,minibatch_covariance", save_predictions=True)
        for name, rate in RATES[scale].items()
    }


def draw(figure: Figure, outcome: Outcome) -> None:
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


def checks(outcome: Outcome) -> list[Check]:
    """That the large learning rate turns away from sharp regions: the break-even point."""
    values = outcome.ratios([((LARGE,), (SMALL,))], MAX_K)
    return [
        Check("the large learning rate stays where λ¹_K is small", "maximum of λ¹_K, large / small", values, below=1)
    ]


EXPERIMENT = Experiment(
    title="Early trajectories of predictions in the plane, coloured by λ¹_K and by accuracy",
    cases=cases,
    quantities=(MAX_K, ACCURACY),
    draw=draw,
    checks=checks,
    notes=lambda scale: [
        "Each point is a network on its way: its predicted probabilities on the test examples, on the first two "
        "principal axes of all of them (the talk's pictures use UMAP). The first seed is drawn.",
        *digits_notes(scale),
    ],
    size=(13.0, 5.0),
)
