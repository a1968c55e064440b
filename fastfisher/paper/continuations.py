"""What figures 6 and 13 share: two models, each continued several times with little regularisation (section 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import histograms, legend, panels
from fastfisher.paper.experiment import FINAL_TRACE, HESSIAN_AT_BEST, MAX_TEST_ACCURACY, Outcome, Quantity
from fastfisher.paper.settings import CONTINUATIONS, START_EPOCHS, curvature, digits_notes

HIGH, LOW = "high regularisation first", "low regularisation first"
START = "start"


def cases_of(data: str) -> Callable[[Scale], dict[Key, Case]]:
    """Return the cases for a data set: the two starts, and their continuations, all at low regularisation."""

    def cases(scale: Scale) -> dict[Key, Case]:
        base = curvature(data, scale)
        low, high = base.levels[0], base.levels[-1]
        found: dict[Key, Case] = {}
        for name, level in ((HIGH, high), (LOW, low)):
            first = START_EPOCHS[scale]
            start = base.case.but(
                **{base.option: level},
                epochs=first,
                lr_milestones=(),
                measure="trace_fisher",
                measure_every=f"{first}epochs",
            )
            found[name, START] = start
            milestones = tuple(each - first for each in base.case["lr_milestones"])
            later = base.case.but(
                **{base.option: low},
                epochs=base.case["epochs"] - first,
                lr_milestones=milestones,
                measure="trace_hessian",
                measure_every=base.measure_every,
            )
            for number in range(1, CONTINUATIONS[scale] + 1):
                found[name, str(number)] = Case(later.options, start=start, repeat=number)
        return found

    return cases


def _continuations(outcome: Outcome, name: str, quantity: Quantity, seed: int | None = None) -> list[float]:
    keys = [key for key in outcome.keys(name) if key[1] != START]
    values = [outcome.values(key, quantity) for key in keys]
    return [value for each in values for number, value in each.items() if seed in (None, number)]


def draw(figure: Figure, outcome: Outcome) -> None:
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


def checks(outcome: Outcome) -> list[Check]:
    """Claim 9: a seed gives the ratio of the means over its continuations."""

    def mean(name: str, quantity: Quantity, seed: int) -> float | None:
        found = _continuations(outcome, name, quantity, seed)
        return sum(found) / len(found) if found else None

    def ratio(seed: int) -> float | None:
        high, low = (mean(name, HESSIAN_AT_BEST, seed) for name in (HIGH, LOW))
        return None if high is None or low is None or low == 0 else high / low

    def accuracy(seed: int) -> float | None:
        high, low = (mean(name, MAX_TEST_ACCURACY, seed) for name in (HIGH, LOW))
        return None if high is None or low is None else high - low

    return [
        Check(
            "high regularisation gives the lower early Tr(F)",
            "Tr(F_i), high / low",
            outcome.ratios([((HIGH, START), (LOW, START))], FINAL_TRACE),
            below=1,
            claim=9,
        ),
        Check(
            "its continuations end at the lower Tr(H)",
            "Tr(H) at the best epoch, high / low",
            outcome.per_seed(ratio),
            below=1,
            claim=9,
        ),
        Check("and test better", "best test accuracy, high − low, points", outcome.per_seed(accuracy), above=0),
    ]


def notes(scale: Scale) -> Sequence[str]:
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
