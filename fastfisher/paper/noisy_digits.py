"""Does the Fisher penalty slow the memorisation of noisy labels? Section 4.1 of the paper, on digits.

``python -m fastfisher.paper.noisy_digits`` trains the same network on half-wrong labels with and without the
penalty (FP), over a few seeds, and writes ``noisy_digits.png`` and ``report.md``. Started again, it continues
what was interrupted and skips what is finished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.folder import RunFolder
from fastfisher.training.replicas import Metrics, Summary, train_together

METHODS = ("baseline", "FP")
# Vermillion and blue of Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {"baseline": "#D55E00", "FP": "#0072B2"}
LABEL_NOISE = 0.5
CLASSES = 10
ALPHA = 1.0
PENALTY_EVERY = 1
HOW_CHOSEN = (
    "Chosen beforehand, on seeds 100 and 101, which are not in this report, by accuracy on the validation "
    "examples, whose labels are clean: the learning rate from {0.01, 0.02, 0.05, 0.1} by the baseline's best "
    "epoch, and then alpha from {0.1, 0.31, 1, 3.1} by FP's last epoch."
)

Results = dict[str, list[Metrics]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration and return the exit code, as for ``fastfisher train``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastfisher.paper.noisy_digits",
        description="Train on digits with 50 % noisy labels, with and without the Fisher penalty.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="runs/noisy_digits", help="folder for the runs, figure and report")
    parser.add_argument("--seeds", type=_count, default=3, help="seeds per method")
    parser.add_argument("--epochs", type=_count, default=80, help="epochs per run")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="coefficient of the penalty")
    parser.add_argument(
        "--penalty-every", type=_count, default=PENALTY_EVERY, help="steps between two penalty gradients"
    )
    parser.add_argument("--jobs", type=_count, default=2, help="runs at the same time, one thread each")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    configs = plan(
        out,
        seeds=options.seeds,
        epochs=options.epochs,
        alpha=options.alpha,
        penalty_every=options.penalty_every,
    )
    try:
        # All runs are checked before the first one starts.
        for config in configs:
            RunFolder(config.out).check(resolve(config))
    except ConfigError as error:
        print(f"noisy_digits: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    try:
        failures = train_together(configs, options.jobs)
    except KeyboardInterrupt:
        print(f"interrupted; continue with: {parser.prog} and the same options")
        return 130
    if failures:
        for failure in failures:
            print(f"noisy_digits: {failure.config.method}, {failure}", file=sys.stderr)
        return 1
    results = {
        method: [RunFolder(config.out).read_metrics() for config in configs if config.method == method]
        for method in METHODS
    }
    figure = out / "noisy_digits.png"
    plot(results, figure)
    text = report(results, configs[-1], figure.name)
    (out / "report.md").write_text(text)
    print(f"\n{text}\nfigure: {figure}\nreport: {out / 'report.md'}")
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected an integer, at least 1")
    return value


def plan(out: Path, *, seeds: int, epochs: int, alpha: float, penalty_every: int) -> list[TrainConfig]:
    """Return the runs: every method with the same network, data, learning rate and seeds, FP last."""
    penalties: dict[str, dict[str, Any]] = {
        "baseline": {},
        "FP": {"alpha": alpha, "penalty_every": penalty_every},
    }
    return [
        TrainConfig(
            out=str(folder := out / f"{method}-seed{seed}"),
            resume=RunFolder(folder).config.exists(),
            label_noise=LABEL_NOISE,
            batch_size=64,
            lr=0.02,
            epochs=epochs,
            method=method,
            seed=seed,
            threads=1,
            device="cpu",
            **penalties[method],
        )
        for method in METHODS
        for seed in range(seeds)
    ]


def _percent(name: str) -> Callable[[Metrics], float]:
    return lambda run: 100.0 * run[-1][name]


def _at_best_validation(run: Metrics) -> float:
    # max() takes the first of equals: the earliest of the best epochs.
    return 100.0 * float(max(run, key=lambda epoch: float(epoch["validation_accuracy"]))["test_accuracy"])


MEASURES: dict[str, Callable[[Metrics], float]] = {
    "final test accuracy, %": _percent("test_accuracy"),
    "test accuracy at the best validation epoch, %": _at_best_validation,
    "final accuracy on noisy training examples, %": _percent("noisy_accuracy"),
    "final accuracy on clean training examples, %": _percent("clean_accuracy"),
    "maximum of Tr(F)": lambda run: max(epoch["trace_fisher"] for epoch in run),
    "training seconds per epoch": lambda run: statistics.mean(epoch["train_seconds"] for epoch in run),
}


def over_seeds(runs: Sequence[Metrics], measure: Callable[[Metrics], float]) -> Summary:
    """Summarise ``measure`` of each run."""
    return Summary.of([measure(run) for run in runs])


def change(baseline: Summary, penalised: Summary) -> int:
    """Return 1 if the mean rose, -1 if it fell, 0 if it moved less than the seeds differ.

    A change counts if it is above twice the larger standard deviation over seeds; with one seed none does.
    """
    difference = penalised.mean - baseline.mean
    if baseline.std is None or penalised.std is None:
        return 0
    if abs(difference) <= 2 * max(baseline.std, penalised.std):
        return 0
    return 1 if difference > 0 else -1


def conclusion(results: Results) -> str:
    """Return in words what the runs show about the paper's claim, whatever that is."""
    words = {1: "raised", 0: "made no clear difference to", -1: "lowered"}
    names = {
        "test": "final test accuracy, %",
        "noisy": "final accuracy on noisy training examples, %",
        "best": "test accuracy at the best validation epoch, %",
    }
    effects, changes = {}, {}
    for key, name in names.items():
        baseline, penalised = (over_seeds(results[method], MEASURES[name]) for method in METHODS)
        changes[key] = change(baseline, penalised)
        effects[key] = (
            f"{words[changes[key]]} the {name.removesuffix(', %')} "
            f"({baseline.mean:.1f} % without, {penalised.mean:.1f} % with it)"
        )
    memorised = over_seeds(results["baseline"], MEASURES[names["noisy"]]).mean
    claim = "the paper's claim that FP limits the memorisation of noisy labels"
    if baseline.std is None:
        verdict = "With one seed per method nothing can be concluded: there is no spread to compare with."
    elif memorised < 200 / CLASSES:
        verdict = f"The baseline itself memorised too little to test {claim}: train for longer."
    elif changes["test"] == 1 and changes["noisy"] == -1:
        verdict = f"This supports {claim}."
    elif changes["test"] == -1 or changes["noisy"] == 1:
        verdict = f"This contradicts {claim}."
    else:
        verdict = f"This neither supports nor contradicts {claim}."
    return (
        f"Over {_count_seeds(results)} each, FP {effects['test']}, {effects['noisy']} and {effects['best']}. {verdict}"
    )


def report(results: Results, penalised: TrainConfig, figure: str) -> str:
    """Return the report as Markdown: the conclusion, the table, and how the runs were made."""
    rows = [
        f"| {name} | " + " | ".join(str(over_seeds(results[method], measure)) for method in METHODS) + " |"
        for name, measure in MEASURES.items()
    ]
    default = (penalised.alpha, penalised.penalty_every) == (ALPHA, PENALTY_EVERY)
    notes = (
        "Data: scikit-learn's digits, bilinear 16x16; 1,097 training, 200 validation and 500 test examples. "
        f"The labels of {LABEL_NOISE:.0%} of the training examples are replaced by uniform ones, which are the "
        f"true label once in {CLASSES}: a network that memorises none scores about {1 / CLASSES:.0%} on them.",
        f"Training: a CNN with 38,282 parameters, SGD, momentum {penalised.momentum}, no weight decay, batch "
        f"{penalised.batch_size}, learning rate {penalised.lr}, {penalised.epochs} epochs. "
        f"FP: alpha {penalised.alpha:g}, recomputed every {penalised.penalty_every} step(s). "
        "With the same seed both methods see the same noise, initial weights and batches.",
        HOW_CHOSEN if default else "The settings of the penalty were given on the command line.",
        f"Tr(F) is measured after every epoch, on {penalised.trace_samples} random training examples, by one "
        "Rademacher cotangent for each. Seconds are of training alone, on one thread.",
        "A change counts as clear if it is more than twice the larger of the two standard deviations.",
    )
    lines = [
        "# The Fisher penalty and noisy labels, on handwritten digits",
        "",
        "Small built-in data and network: not the paper's setting (VGG-11 and a ResNet on CIFAR-100, section 4.1).",
        "",
        conclusion(results),
        "",
        f"| mean ± standard deviation, {_count_seeds(results)} each | {' | '.join(METHODS)} |",
        "|---" * (1 + len(METHODS)) + "|",
        *rows,
        "",
        f"![test accuracy, accuracy on noisy training examples and Tr(F) over training]({figure})",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _count_seeds(results: Results) -> str:
    seeds = len(results["baseline"])
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def plot(results: Results, path: Path) -> None:
    """Draw test accuracy, accuracy on noisy examples and Tr(F) over epochs: mean and range over seeds."""
    panels = (
        ("test_accuracy", 100.0, "test accuracy, %"),
        ("noisy_accuracy", 100.0, "accuracy on training examples\nwith noisy labels, %"),
        ("trace_fisher", 1.0, "Tr(F)"),
    )
    figure, all_axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, (name, factor, title) in zip(all_axes, panels, strict=True):
        ends = {}
        for method, runs in results.items():
            values = [[factor * epoch[name] for epoch in run] for run in runs]
            by_epoch = list(zip(*values, strict=True))
            epochs = range(1, len(by_epoch) + 1)
            mean = [statistics.mean(seeds) for seeds in by_epoch]
            axes.plot(epochs, mean, color=COLOURS[method], linewidth=2)
            axes.fill_between(
                epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=COLOURS[method], alpha=0.2
            )
            ends[method] = mean[-1]
        upper = max(ends, key=lambda method: ends[method])
        for method, end in ends.items():
            # The upper line is named above its end and the lower one below: the names never meet.
            axes.annotate(
                method,
                (len(by_epoch), end),
                xytext=(4, 0),
                textcoords="offset points",
                color=COLOURS[method],
                va="bottom" if method == upper else "top",
                fontweight="bold",
                annotation_clip=False,
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes[:2]:
        axes.set_ylim(0, 103)
    all_axes[1].plot((1, len(by_epoch)), (100 / CLASSES,) * 2, color="0.4", linestyle=":")
    all_axes[1].annotate(
        "nothing memorised", (1, 100 / CLASSES), xytext=(0, -12), textcoords="offset points", color="0.4"
    )
    all_axes[2].set_yscale("log")
    figure.suptitle(f"{LABEL_NOISE:.0%} noisy labels, digits: mean and range over {_count_seeds(results)}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
