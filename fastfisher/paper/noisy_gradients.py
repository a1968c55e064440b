"""What figures 5 and 11 share: gradient norms and accuracies on clean and on noisy training examples."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from fastfisher.paper.cases import Key
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, legend, panels, ramp
from fastfisher.paper.experiment import CLEAN_ACCURACY, NOISY_ACCURACY, Outcome, Quantity, series
from fastfisher.training.replicas import Metrics


def _mean_ratio(run: Metrics) -> float | None:
    clean, noisy = (series(run, f"gradient_norm_{kind}")[1] for kind in ("clean", "noisy"))
    found = [b / a for a, b in zip(clean, noisy, strict=True) if a > 0]
    return statistics.mean(found) if found else None


MEAN_RATIO = Quantity("‖g_n‖/‖g_c‖, mean over training", _mean_ratio)


def draw(figure: Figure, outcome: Outcome) -> None:
    """‖g_c‖, ‖g_n‖, their ratio; accuracies on both, on validation, and one against the other."""
    axes = panels(figure, 2, 3)
    lines: dict[str, Key] = {key[0]: key for key in outcome.runs}
    colours = ramp(len(lines))
    curves(axes[0], outcome, lines, "gradient_norm_clean", "‖g_c‖", colours=colours)
    curves(axes[1], outcome, lines, "gradient_norm_noisy", "‖g_n‖", colours=colours)
    for shown, (title, key) in zip(colours, lines.items(), strict=True):
        for number, run in enumerate(outcome.runs[key].values()):
            epochs, clean = series(run, "gradient_norm_clean")
            noisy = series(run, "gradient_norm_noisy")[1]
            ratio = [b / a if a else float("nan") for a, b in zip(clean, noisy, strict=True)]
            axes[2].plot(epochs, ratio, color=shown, linewidth=1, label=title if number == 0 else None)
            on_clean, on_noisy = (series(run, f"{kind}_accuracy")[1] for kind in ("clean", "noisy"))
            axes[5].plot([100 * a for a in on_clean], [100 * a for a in on_noisy], color=shown, linewidth=1)
    axes[2].axhline(1.0, color="grey", linewidth=0.8)
    axes[2].set_xlabel("epoch")
    axes[2].set_ylabel("‖g_n‖/‖g_c‖")
    label = "training accuracy, % (dashed: noisy)"
    curves(axes[3], outcome, lines, "clean_accuracy", label, factor=100, colours=colours)
    legend(axes[3])
    curves(axes[3], outcome, lines, "noisy_accuracy", label, factor=100, colours=colours, style="--")
    curves(axes[4], outcome, lines, "validation_accuracy", "validation accuracy, %", factor=100, colours=colours)
    axes[5].set_xlabel("accuracy on clean examples, %")
    axes[5].set_ylabel("accuracy on noisy examples, %")


def _noisy_at_equal_clean(run: Metrics, other: Metrics) -> float | None:
    """Return the mean over epochs of noisy accuracy minus that of the other run when it was as good on clean ones."""
    clean, noisy = (series(other, f"{kind}_accuracy")[1] for kind in ("clean", "noisy"))
    differences = []
    for a, b in zip(series(run, "clean_accuracy")[1], series(run, "noisy_accuracy")[1], strict=True):
        reached = [index for index, value in enumerate(clean) if value >= a]
        if reached:
            differences.append(100 * (b - noisy[reached[0]]))
    return statistics.mean(differences) if differences else None


def checks(outcome: Outcome) -> list[Check]:
    """Claim 7, for the α of the middle: the largest may stop training altogether."""
    penalised = [key for key in outcome.runs if key[0] != "baseline"]
    middle, baseline = penalised[len(penalised) // 2], ("baseline",)
    slowed = [
        (NOISY_ACCURACY, "accuracy on noisy examples"),
        (CLEAN_ACCURACY, "accuracy on clean examples"),
    ]
    lost = [
        {
            seed: a - b
            for seed in outcome.seeds
            if (a := outcome.value(seed, baseline, quantity)) is not None
            and (b := outcome.value(seed, middle, quantity)) is not None
        }
        for quantity, _ in slowed
    ]

    def at_equal_clean(seed: int) -> float | None:
        run, other = outcome.runs[middle].get(seed), outcome.runs[baseline].get(seed)
        return None if run is None or other is None else _noisy_at_equal_clean(run, other)

    return [
        Check(
            "FP costs accuracy on noisy examples more than on clean ones",
            f"lost on noisy − lost on clean examples, {middle[0]}, points",
            outcome.per_seed(lambda seed: lost[0][seed] - lost[1][seed] if seed in lost[0] else None),
            above=0,
            claim=7,
        ),
        Check(
            "at equal accuracy on clean examples FP has memorised less",
            f"accuracy on noisy examples, {middle[0]} − baseline, points",
            outcome.per_seed(at_equal_clean),
            below=0,
            claim=7,
        ),
        Check(
            "the ratio of the gradient norms is nearer to 1 with FP",
            f"‖g_n‖/‖g_c‖, {middle[0]} − baseline",
            outcome.differences([(middle, baseline)], MEAN_RATIO),
            below=0,
            claim=7,
        ),
    ]
