"""Tr(F), Tr(F_B) and Tr(H) over training and at its end: figures 6, 13, 14, 15 and 21."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, case
from fastfisher.paper.claims import Check, mean_correlation
from fastfisher.paper.drawing import curves, histograms, legend, panels, ramp, row_panels
from fastfisher.paper.experiment import (
    FINAL_TRACE,
    HESSIAN_AT_BEST,
    MAX_TEST_ACCURACY,
    MAX_TRACE,
    MIN_LOSS,
    Experiment,
    Outcome,
    Quantity,
    final,
    maximum,
    rank_correlation,
    series,
)
from fastfisher.paper.settings import (
    CIFAR10,
    CIFAR100,
    DENSENET,
    DIGITS_NETWORKS,
    SIMPLE_CNN,
    digits_notes,
    large_rate,
    logspace,
    table_1,
)


@dataclass(frozen=True)
class Curvature:
    """The runs of section 5 on a data set: one option varies, from the least regularised to the most.

    Attributes:
        option: lr, or batch_size, of which the larger regularises less.
        levels: the least and the most regularised.
        measure_every: when Tr(H) is measured.
    """

    case: Case
    option: str
    levels: tuple[float, float]
    measure_every: str

    def levels_around(self) -> list[float]:
        """Return three values around each level: figure 14's fine scale."""
        if self.option == "lr":
            return [float(f"{factor * level:.4g}") for level in self.levels for factor in (0.8, 1.0, 1.2)]
        step = 20 if self.levels[-1] >= 100 else 2
        return [level + offset for level in self.levels for offset in (step, 0, -step)]

    def measured(self, level: float) -> Case:
        """Return the case at a level, with Tr(H) measured on the way."""
        options = {self.option: level, "measure": "trace_hessian", "measure_every": self.measure_every}
        return self.case.but(**options)


def curvature(data: str, scale: Scale) -> Curvature:
    """Return the setting of I.4: batch sizes at learning rate 0.02 on CIFAR-10, learning rates on CIFAR-100."""
    if scale == "paper":
        base = case({**(CIFAR10 if data == "cifar10" else CIFAR100), "epochs": 250, "lr_milestones": (80, 150, 200)})
        base = base.without("trace_thresholds")
        if data == "cifar10":
            return Curvature(base.but(lr=0.02), "batch_size", (500, 100), "10epochs")
        return Curvature(base.but(batch_size=100), "lr", (0.001, 0.01), "10epochs")
    base = case(DIGITS_NETWORKS[data], trace_samples=128).without("trace_thresholds")
    if data == "cifar10":
        return Curvature(base.but(lr=0.0178), "batch_size", (20, 8), "2epochs")
    return Curvature(base, "lr", (0.0178, 0.0562), "2epochs")


# ---- figures 6 and 13: two models, each continued several times with little regularisation ---------------------------

HIGH, LOW = "high regularisation first", "low regularisation first"
START = "start"
START_EPOCHS: Mapping[Scale, int] = {"paper": 20, "digits": 8}
CONTINUATIONS: Mapping[Scale, int] = {"paper": 8, "digits": 4}


def continued(data: str) -> Callable[[Scale], dict[Key, Case]]:
    """Return the cases for a data set: the two starts, and their continuations, all at low regularisation."""

    def cases(scale: Scale) -> dict[Key, Case]:
        base, first = curvature(data, scale), START_EPOCHS[scale]
        low, high = base.levels
        beginning = base.case.but(
            epochs=first, lr_milestones=(), measure="trace_fisher", measure_every=f"{first}epochs"
        )
        later = base.measured(low).but(
            epochs=base.case["epochs"] - first, lr_milestones=tuple(each - first for each in base.case["lr_milestones"])
        )
        found: dict[Key, Case] = {}
        for name, level in ((HIGH, high), (LOW, low)):
            found[name, START] = start = beginning.but(**{base.option: level})
            for number in range(1, CONTINUATIONS[scale] + 1):
                found[name, str(number)] = replace(later, start=start, repeat=number)
        return found

    return cases


def _continuations(outcome: Outcome, name: str, quantity: Quantity, seed: int | None = None) -> list[float]:
    keys = [key for key in outcome.keys(name) if key[1] != START]
    values = [outcome.values(key, quantity) for key in keys]
    return [value for each in values for number, value in each.items() if seed in (None, number)]


def draw_continued(figure: Figure, outcome: Outcome) -> None:
    """Tr(F) after the start, and histograms of Tr(H) and of the accuracy at the best epoch."""
    left, middle, right = panels(figure, 1, 3)
    for number, name in enumerate((HIGH, LOW)):
        found = outcome.summary((name, START), FINAL_TRACE)
        if found is not None:
            left.bar(number, found.mean, yerr=found.std or 0.0, label=name, capsize=3)
    left.set_xticks([0, 1], ["high", "low"])
    left.set_xlabel("regularisation first")
    left.set_ylabel("Tr(F_i)")
    for axes, quantity in ((middle, HESSIAN_AT_BEST), (right, MAX_TEST_ACCURACY)):
        histograms(axes, {name: _continuations(outcome, name, quantity) for name in (HIGH, LOW)}, quantity.name)
    legend(middle)


def continued_checks(outcome: Outcome) -> list[Check]:
    """Claim 9: a seed compares the means over its continuations."""

    def compared(quantity: Quantity, compare: Callable[[float, float], float | None]) -> tuple[float, ...]:
        def of(seed: int) -> float | None:
            found = [_continuations(outcome, name, quantity, seed) for name in (HIGH, LOW)]
            return compare(*(sum(each) / len(each) for each in found)) if all(found) else None

        return outcome.per_seed(of)

    early = outcome.ratios([((HIGH, START), (LOW, START))], FINAL_TRACE)
    hessian = compared(HESSIAN_AT_BEST, lambda high, low: high / low if low else None)
    accuracy = compared(MAX_TEST_ACCURACY, lambda high, low: high - low)
    at_best = "Tr(H) at the best epoch, high / low"
    return [
        Check("high regularisation gives the lower early Tr(F)", "Tr(F_i), high / low", early, below=1, claim=9),
        Check("its continuations end at the lower Tr(H)", at_best, hessian, below=1, claim=9),
        Check("and test better", "best test accuracy, high − low, points", accuracy, above=0),
    ]


def continued_notes(scale: Scale) -> Sequence[str]:
    """Say what is regularisation here."""
    if scale == "digits":
        return digits_notes(scale)
    return [
        "The regularisation is that of SGD: on CIFAR-100 learning rate 0.01 is high and 0.001 low, on CIFAR-10 batch "
        "100 is high and 500 low (the middles of the sets of figure 14; the paper does not say). ResNet-26, as the "
        "text has it; the caption of figure 6 says ResNet-56.",
        "A seed is another pair of starts; the paper has one pair with 8 continuations each.",
        "The best epoch is one of those after which Tr(H) is measured.",
    ]


FIG6 = Experiment(
    title="Continuations of a model with low and one with high early Tr(F), CIFAR-100",
    cases=continued("cifar100"),
    quantities=(FINAL_TRACE, HESSIAN_AT_BEST, MAX_TEST_ACCURACY),
    draw=draw_continued,
    checks=continued_checks,
    notes=continued_notes,
    size=(12.0, 4.0),
)
FIG13 = replace(
    FIG6, title="Continuations of a model with low and one with high early Tr(F), CIFAR-10", cases=continued("cifar10")
)


# ---- figure 14: learning rates and batch sizes that differ much and little -------------------------------------------

PANELS = {"cifar10": "CIFAR-10, batch size", "cifar100": "CIFAR-100, learning rate"}


def fine_and_coarse(scale: Scale) -> dict[Key, Case]:
    """Two sets of three, each set within a fifth of its middle; the less regularised first."""
    bases = {title: curvature(data, scale) for data, title in PANELS.items()}
    return {
        (title, f"{level:g}"): base.measured(level) for title, base in bases.items() for level in base.levels_around()
    }


def draw_fine_and_coarse(figure: Figure, outcome: Outcome) -> None:
    """Curves from the least regularised in blue to the most in red."""
    for axes, row in row_panels(figure, outcome):
        lines = outcome.lines(row)
        curves(axes, outcome, lines, "trace_hessian", "Tr(H)", logarithmic=True, colours=ramp(len(lines)))


def order_checks(outcome: Outcome) -> list[Check]:
    """What A.4 says: the sets keep the order that they have early on."""

    def order(seed: int) -> float | None:
        runs = [[outcome.runs[key].get(seed, []) for key in outcome.keys(row)] for row in outcome.rows()]
        traces = [[series(run, "trace_hessian")[1] for run in each] for each in runs]
        return mean_correlation([(each[0], each[-1]) for each in row if each] for row in traces)

    halves = [(outcome.keys(row)[:3], outcome.keys(row)[3:]) for row in outcome.rows()]
    pairs = [(a, b) for sharp, flat in halves for a, b in zip(sharp, flat, strict=True)]
    kept, lost = "rank correlation of the first and the last Tr(H)", outcome.differences(pairs, MAX_TEST_ACCURACY)
    points = "best test accuracy, less − more regularised, points"
    return [
        Check("the order of Tr(H) among the runs stays as it was at first", kept, outcome.per_seed(order), above=0),
        Check("the more regularised set tests better", points, lost, below=0),
    ]


FIG14 = Experiment(
    title="Tr(H) over training, on a coarse and a fine scale of learning rates and batch sizes",
    cases=fine_and_coarse,
    quantities=(final("trace_hessian", "Tr(H) at the end"), MIN_LOSS, MAX_TEST_ACCURACY),
    draw=draw_fine_and_coarse,
    checks=order_checks,
    notes=lambda scale: [
        *(["The paper has 32 seeds, and Tr(H) at initialisation too."] if scale == "paper" else []),
        *digits_notes(scale),
    ],
)


# ---- figure 15: Tr(F) and Tr(F_B), the squared norm of a mini-batch gradient -----------------------------------------

RATES = {"paper": logspace(1e-3, 1e-1, 5), "digits": logspace(3.16e-3, 3.16e-2, 5)}
MAX_BATCH_TRACE = maximum("trace_fisher_batch", "maximum of Tr(F_B)")


def both_traces(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN with five learning rates; both are measured on the examples of a batch."""
    base = large_rate(scale).but(measure="trace_fisher,trace_fisher_batch")
    return {(f"lr {rate:g}",): base.but(lr=rate) for rate in RATES[scale]}


def draw_both_traces(figure: Figure, outcome: Outcome) -> None:
    """Both over the epochs, and one against the other."""
    left, middle, right = panels(figure, 1, 3)
    lines = outcome.lines()
    colours = ramp(len(lines))
    curves(left, outcome, lines, "trace_fisher", "Tr(F)", logarithmic=True, colours=colours)
    curves(middle, outcome, lines, "trace_fisher_batch", "Tr(F_B)", logarithmic=True, colours=colours)
    legend(left)
    for shown, key in zip(colours, lines.values(), strict=True):
        for run in outcome.runs[key].values():
            both = [record for record in run if record.get("trace_fisher_batch") is not None]
            x, y = ([record[name] for record in both] for name in ("trace_fisher", "trace_fisher_batch"))
            right.scatter(x, y, s=6, color=shown)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("Tr(F)")
    right.set_ylabel("Tr(F_B)")


def both_traces_checks(outcome: Outcome) -> list[Check]:
    """Claim 10, over all epochs and learning rates of a seed."""
    values = rank_correlation(outcome, "trace_fisher", "trace_fisher_batch")
    return [Check("Tr(F) and Tr(F_B) correlate", "rank correlation of Tr(F) and Tr(F_B)", values, above=0, claim=10)]


FIG15 = Experiment(
    title="Tr(F) and Tr(F_B) over training, SimpleCNN with five learning rates",
    cases=both_traces,
    quantities=(MAX_TRACE, MAX_BATCH_TRACE),
    draw=draw_both_traces,
    checks=both_traces_checks,
    notes=digits_notes,
    size=(13.0, 4.0),
)


# ---- figure 21: Tr(H) and Tr(F_B) ------------------------------------------------------------------------------------


def hessian_cases(scale: Scale) -> dict[Key, Case]:
    """Three networks; Tr(F) is that of a mini-batch, as in supplement F."""
    if scale == "paper":
        name, residual = "ResNet-56", case(CIFAR10, network="resnet56", lr=0.02, batch_size=128, trace_samples=128)
    else:
        name, residual = "ResNet-14", case(DIGITS_NETWORKS["cifar10"], network="resnet14", lr=0.0178, trace_samples=64)
    found = {
        ("DenseNet",): table_1(DENSENET, scale)["η*"],
        ("SimpleCNN",): table_1(SIMPLE_CNN, scale)["η*"],
        (name,): residual.without("trace_thresholds"),
    }
    return {key: each.but(measure="trace_fisher_batch,trace_hessian") for key, each in found.items()}


def draw_hessian(figure: Figure, outcome: Outcome) -> None:
    """A panel for each network, the two on axes of their own."""
    for axes, key in zip(panels(figure, 1, len(outcome.runs)), outcome.runs, strict=True):
        curves(axes, outcome, {"Tr(H)": key}, "trace_hessian", "Tr(H)", colours=["#D55E00"], logarithmic=True)
        other = axes.twinx()
        curves(other, outcome, {"Tr(F_B)": key}, "trace_fisher_batch", "Tr(F_B)", colours=["#0072B2"], logarithmic=True)
        axes.yaxis.label.set_color("#D55E00")
        other.yaxis.label.set_color("#0072B2")
        axes.set_title(key[0], fontsize="medium")


def hessian_checks(outcome: Outcome) -> list[Check]:
    """Claim 10, the mean of the networks."""
    values = rank_correlation(outcome, "trace_fisher_batch", "trace_hessian", apart=True)
    number = "rank correlation of Tr(F_B) and Tr(H) over training"
    return [Check("Tr(F) and Tr(H) correlate", number, values, above=0, claim=10)]


FIG21 = Experiment(
    title="Tr(H) and Tr(F) of a mini-batch over training",
    cases=hessian_cases,
    quantities=(maximum("trace_hessian", "maximum of Tr(H)"), MAX_BATCH_TRACE),
    draw=draw_hessian,
    checks=hessian_checks,
    notes=lambda scale: [
        "In evaluation mode these networks are piecewise linear in each parameter, so that Tr(H) is Tr(F) exactly, and "
        "computed so; what is compared with it is the squared norm of one mini-batch's gradient, as in the paper.",
        *digits_notes(scale),
    ],
    size=(13.0, 4.0),
)
