"""The front page's demonstration, ``make run``: does FP slow the memorisation of noisy labels? Section 4.1 on digits.

``python -m fastfisher.paper.experiments.demo`` trains the same network on half-wrong labels with and without the
penalty, over a few seeds, and writes ``noisy_digits.png`` and ``report.md``. Started again, it continues what was
interrupted and skips what is finished. ``fastfisher reproduce demo`` trains the same runs and reports on them as on
any other experiment.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastfisher.paper.cases import Case, Key, case
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import COLOURS, panels
from fastfisher.paper.experiment import (
    MAX_TRACE,
    SECONDS_PER_EPOCH,
    Experiment,
    Outcome,
    Quantity,
    at_best,
    final,
    series,
)
from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.folder import RunFolder
from fastfisher.training.replicas import train_together
from fastfisher.training.summary import Metrics, Summary

METHODS = ("baseline", "FP")
LABEL_NOISE = 0.5
CLASSES = 10
ALPHA = 1.0
PENALTY_EVERY = 1
EPOCHS = 80
HOW_CHOSEN = (
    "Chosen beforehand, on seeds 100 and 101, which are not in this report, by accuracy on the validation "
    "examples, whose labels are clean: the learning rate from {0.01, 0.02, 0.05, 0.1} by the baseline's best "
    "epoch, and then alpha from {0.1, 0.31, 1, 3.1} by FP's last epoch."
)
FINAL_TEST = final("test_accuracy", "final test accuracy, %", 100)
BEST_TEST = at_best(
    "test_accuracy", "test accuracy at the best validation epoch, %", by="validation_accuracy", factor=100
)
FINAL_NOISY = final("noisy_accuracy", "final accuracy on noisy training examples, %", 100)
FINAL_CLEAN = final("clean_accuracy", "final accuracy on clean training examples, %", 100)
QUANTITIES = (FINAL_TEST, BEST_TEST, FINAL_NOISY, FINAL_CLEAN, MAX_TRACE, SECONDS_PER_EPOCH)


def cases(*, epochs: int = EPOCHS, alpha: float = ALPHA, penalty_every: int = PENALTY_EVERY) -> dict[Key, Case]:
    """Return every method with the same network, data and learning rate, FP last."""
    base = case(data="digits", label_noise=LABEL_NOISE, batch_size=64, lr=0.02, epochs=epochs)
    return {("baseline",): base, ("FP",): base.but(method="FP", alpha=alpha, penalty_every=penalty_every)}


def draw(figure: Figure, outcome: Outcome) -> None:
    """Test accuracy, accuracy on noisy examples and Tr(F) over epochs: mean and range over seeds."""
    test, noisy, trace = panels(figure, 1, 3)
    for axes, name, factor, title in (
        (test, "test_accuracy", 100.0, "test accuracy, %"),
        (noisy, "noisy_accuracy", 100.0, "accuracy on training examples\nwith noisy labels, %"),
        (trace, "trace_fisher", 1.0, "Tr(F)"),
    ):
        ends: dict[str, tuple[float, float]] = {}
        for (method,), runs in outcome.runs.items():
            values = [[factor * value for value in series(run, name)[1]] for run in runs.values()]
            by_epoch = list(zip(*values, strict=True))
            if not by_epoch:
                continue
            epochs = range(1, len(by_epoch) + 1)
            mean = [statistics.mean(seeds) for seeds in by_epoch]
            low, high = list(map(min, by_epoch)), list(map(max, by_epoch))
            axes.plot(epochs, mean, color=COLOURS[method], linewidth=2)
            axes.fill_between(epochs, low, high, color=COLOURS[method], alpha=0.2)
            ends[method] = len(by_epoch), mean[-1]
        for method, end in ends.items():
            # The upper line is named above its end and the lower one below: the names never meet.
            axes.annotate(
                method,
                end,
                xytext=(4, 0),
                textcoords="offset points",
                color=COLOURS[method],
                va="bottom" if end[1] == max(height for _, height in ends.values()) else "top",
                fontweight="bold",
                annotation_clip=False,
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
    chance = 100 / CLASSES
    noisy.plot((1, max((last for last, _ in ends.values()), default=1)), (chance, chance), color="0.4", linestyle=":")
    noisy.annotate("nothing memorised", (1, chance), xytext=(0, -12), textcoords="offset points", color="0.4")
    for axes in (test, noisy):
        axes.set_ylim(0, 103)
    trace.set_yscale("log")
    figure.suptitle(f"{LABEL_NOISE:.0%} noisy labels, digits: mean and range over {_count_seeds(outcome)}")


def checks(outcome: Outcome) -> list[Check]:
    """Claim 7."""
    pair = [(("FP",), ("baseline",))]
    gained, memorised = (outcome.differences(pair, quantity) for quantity in (FINAL_TEST, FINAL_NOISY))
    test, noisy = (f"final {what}, FP − baseline, points" for what in ("test accuracy", "accuracy on noisy examples"))
    return [
        Check("FP improves accuracy under label noise", test, gained, above=0, claim=7),
        Check("FP memorises less", noisy, memorised, below=0, claim=7),
    ]


def notes(penalised: TrainConfig) -> list[str]:
    """Say how the runs are made, given the options of one with FP."""
    chosen = (penalised.alpha, penalised.penalty_every) == (ALPHA, PENALTY_EVERY)
    return [
        "Data: scikit-learn's digits, bilinear 16x16; 1,097 training, 200 validation and 500 test examples. "
        f"The labels of {LABEL_NOISE:.0%} of the training examples are replaced by uniform ones, which are the "
        f"true label once in {CLASSES}: a network that memorises none scores about {1 / CLASSES:.0%} on them.",
        f"Training: a CNN with 38,282 parameters, SGD, momentum {penalised.momentum}, no weight decay, batch "
        f"{penalised.batch_size}, learning rate {penalised.lr}, {penalised.epochs} epochs. "
        f"FP: alpha {penalised.alpha:g}, recomputed every {penalised.penalty_every} step(s). "
        "With the same seed both methods see the same noise, initial weights and batches.",
        HOW_CHOSEN if chosen else "The settings of the penalty were given on the command line.",
        f"Tr(F) is measured after every epoch, on {penalised.trace_samples} random training examples, by one "
        "Rademacher cotangent for each. Seconds are of training alone, on one thread.",
    ]


DEMO = Experiment(
    title="Training with half of the labels wrong, with and without the Fisher penalty",
    cases=lambda scale: cases(),
    quantities=QUANTITIES,
    draw=draw,
    checks=checks,
    notes=lambda scale: notes(TrainConfig(**dict(cases()["FP",].options))),
    size=(13.0, 4.0),
)


# ---- make run --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration and return the exit code, as for ``fastfisher train``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastfisher.paper.experiments.demo",
        description="Train on digits with 50 % noisy labels, with and without the Fisher penalty.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="runs/noisy_digits", help="folder for the runs, figure and report")
    parser.add_argument("--seeds", type=_count, default=3, help="seeds per method")
    parser.add_argument("--epochs", type=_count, default=EPOCHS, help="epochs per run")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="coefficient of the penalty")
    parser.add_argument(
        "--penalty-every", type=_count, default=PENALTY_EVERY, help="steps between two penalty gradients"
    )
    parser.add_argument("--jobs", type=_count, default=2, help="runs at the same time, one thread each")
    options = vars(parser.parse_args(arguments))
    out, jobs = Path(options.pop("out")), options.pop("jobs")
    configs = plan(out, **options)
    try:
        # All runs are checked before the first one starts.
        for config in configs:
            RunFolder(config.out).check(resolve(config))
    except ConfigError as error:
        print(f"noisy_digits: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    try:
        failures = train_together(configs, jobs)
    except KeyboardInterrupt:
        print(f"interrupted; continue with: {parser.prog} and the same options")
        return 130
    if failures:
        for failure in failures:
            print(f"noisy_digits: {failure.task.config.method}, {failure}", file=sys.stderr)
        return 1
    _write(configs, out)
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected an integer, at least 1")
    return value


def plan(out: Path, *, seeds: int, epochs: int, alpha: float, penalty_every: int) -> list[TrainConfig]:
    """Return the runs, those with FP last; one whose folder holds a run continues it."""
    return [
        TrainConfig(
            **dict(each.options),
            out=str(folder := out / f"{method}-seed{seed}"),
            resume=RunFolder(folder).config.exists(),
            seed=seed,
            threads=1,
            device="cpu",
        )
        for (method,), each in cases(epochs=epochs, alpha=alpha, penalty_every=penalty_every).items()
        for seed in range(seeds)
    ]


def _write(configs: Sequence[TrainConfig], out: Path) -> None:
    """Draw the picture and write the report of finished runs."""
    runs: dict[Key, dict[int, Metrics]] = {
        (method,): {each.seed: RunFolder(each.out).read_metrics() for each in configs if each.method == method}
        for method in METHODS
    }
    penalised = configs[-1]
    outcome = Outcome("digits", tuple(runs["FP",]), runs, {})
    figure = Figure(figsize=DEMO.size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, outcome)
    figure.savefig(out / "noisy_digits.png", dpi=150)
    text = report(outcome, penalised, "noisy_digits.png")
    (out / "report.md").write_text(text)
    print(f"\n{text}\nfigure: {out / 'noisy_digits.png'}\nreport: {out / 'report.md'}")


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


def conclusion(outcome: Outcome) -> str:
    """Return in words what the runs show about the paper's claim, whatever that is."""
    words = {1: "raised", 0: "made no clear difference to", -1: "lowered"}
    effects, changes = [], []
    for quantity in (FINAL_TEST, FINAL_NOISY, BEST_TEST):
        baseline, penalised = (_summary(outcome, method, quantity) for method in METHODS)
        changes.append(change(baseline, penalised))
        effects.append(
            f"{words[changes[-1]]} the {quantity.name.removesuffix(', %')} "
            f"({baseline.mean:.1f} % without, {penalised.mean:.1f} % with it)"
        )
    test, noisy, _ = changes
    memorised = _summary(outcome, "baseline", FINAL_NOISY)
    claim = "the paper's claim that FP limits the memorisation of noisy labels"
    if memorised.std is None:
        verdict = "With one seed per method nothing can be concluded: there is no spread to compare with."
    elif memorised.mean < 200 / CLASSES:
        verdict = f"The baseline itself memorised too little to test {claim}: train for longer."
    elif test == 1 and noisy == -1:
        verdict = f"This supports {claim}."
    elif test == -1 or noisy == 1:
        verdict = f"This contradicts {claim}."
    else:
        verdict = f"This neither supports nor contradicts {claim}."
    return f"Over {_count_seeds(outcome)} each, FP {effects[0]}, {effects[1]} and {effects[2]}. {verdict}"


def report(outcome: Outcome, penalised: TrainConfig, figure: str) -> str:
    """Return the report as Markdown: the conclusion, the table, and how the runs were made."""
    lines = [
        "# The Fisher penalty and noisy labels, on handwritten digits",
        "",
        "Small built-in data and network: not the paper's setting (VGG-11 and a ResNet on CIFAR-100, section 4.1).",
        "",
        conclusion(outcome),
        "",
        f"| mean ± standard deviation, {_count_seeds(outcome)} each | {' | '.join(METHODS)} |",
        "|---" * (1 + len(METHODS)) + "|",
        *(
            f"| {quantity.name} | " + " | ".join(str(_summary(outcome, method, quantity)) for method in METHODS) + " |"
            for quantity in QUANTITIES
        ),
        "",
        f"![test accuracy, accuracy on noisy training examples and Tr(F) over training]({figure})",
        "",
        *(f"- {note}" for note in notes(penalised)),
        "- A change counts as clear if it is more than twice the larger of the two standard deviations.",
    ]
    return "\n".join(lines) + "\n"


def _summary(outcome: Outcome, method: str, quantity: Quantity) -> Summary:
    return Summary.of(list(outcome.values((method,), quantity).values()))


def _count_seeds(outcome: Outcome) -> str:
    seeds = len(outcome.seeds)
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


if __name__ == "__main__":
    sys.exit(main())
