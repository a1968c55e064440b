"""What runs of one configuration ended with, over their seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastfisher.training.config import TrainConfig
from fastfisher.training.folder import RunFolder
from fastfisher.training.measurements import BELOW, TITLES

Metrics = list[dict[str, Any]]

ACCURACY_TITLES = {
    "clean_accuracy": "train clean",
    "noisy_accuracy": "noisy",
    "validation_accuracy": "validation",
    "test_accuracy": "test",
}


@dataclass(frozen=True)
class Summary:
    """A quantity: mean and sample standard deviation over seeds, None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise a value for each seed."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        """Return ``mean ± std``."""
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


def final(run: Metrics, name: str) -> Any:
    """Return the last that ``run`` says about ``name``, None if it says nothing."""
    return next((record[name] for record in reversed(run) if name in record), None)


def summarise(configs: Sequence[TrainConfig], failures: Mapping[int, str]) -> dict[str, Any]:
    """Return what the finished runs ended with, ready for JSON.

    ``final`` has the accuracies, all that ``--measure`` names and Tr(F) at ``--trace-thresholds``, each as ``mean``,
    ``standard_deviation`` (the sample's; None for a single seed) and ``by_seed``; ``seeds`` are those of the finished
    runs, ``failed`` is ``failures``: why each other seed failed. What a run does not have, such as noisy examples, is
    left out.
    """
    runs = {
        config.seed: RunFolder(config.out).read_metrics()
        for config in configs
        if RunFolder(config.out).finished(config)
    }
    quantities = {}
    at_thresholds = (f"{BELOW}{threshold}" for threshold in configs[0].trace_thresholds)
    for name in (*ACCURACY_TITLES, "noisy_true_accuracy", *TITLES, *at_thresholds):
        by_seed = {seed: value for seed, run in runs.items() if (value := final(run, name)) is not None}
        if by_seed:
            over_seeds = Summary.of(list(by_seed.values()))
            quantities[name] = {
                "mean": over_seeds.mean,
                "standard_deviation": over_seeds.std,
                "by_seed": {str(seed): value for seed, value in by_seed.items()},
            }
    return {
        "seeds": list(runs),
        "failed": {str(seed): reason for seed, reason in failures.items()},
        "final": quantities,
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Return the line that is printed about a summary."""

    def title(name: str) -> str:
        mean, std = summary["final"][name]["mean"], summary["final"][name]["standard_deviation"]
        if name in ACCURACY_TITLES:
            return f"{ACCURACY_TITLES[name]} {100 * mean:.1f}" + (" %" if std is None else f" ± {100 * std:.1f} %")
        return f"{TITLES[name]} {mean:.3g}" + ("" if std is None else f" ± {std:.3g}")

    count = len(summary["seeds"])
    if count == 0:
        return "no run has finished"
    named = [title(name) for name in (*ACCURACY_TITLES, *TITLES) if name in summary["final"]]
    return ("1 seed" if count == 1 else f"mean ± standard deviation over {count} seeds") + ": " + "  ".join(named)
