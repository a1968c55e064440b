"""The penalties beside the learning rate: tables 1, 2, 4, 5, 6 and 7, figures 3, 4, 10, 16 and 17."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, tuned
from fastfisher.paper.claims import AS_GOOD, Check, mean_correlation
from fastfisher.paper.drawing import (
    COLOURS,
    TRACE,
    VALIDATION,
    accuracy_and_trace,
    over_epochs,
    row_panels,
    table_of_bars,
)
from fastfisher.paper.experiment import (
    MAX_TRACE,
    SECONDS_PER_EPOCH,
    TEST_ACCURACY,
    TRAIN_ACCURACY,
    VALIDATION_ACCURACY,
    Experiment,
    Outcome,
    best_key,
    paper_table,
)
from fastfisher.paper.settings import (
    COLUMNS,
    DENSENET,
    SETTINGS,
    SIMPLE_CNN,
    VGG,
    WRESNET,
    WRESNET_TINY,
    Setting,
    best_rate,
    coefficients,
    digits_notes,
    logspace,
    small_rate,
    table_1,
    table_1_notes,
)

# ---- tables 1, 4, 5 and 6: the best and a small learning rate, and four penalties at the small one -------------------


def columns_of_table_1(*settings: Setting, columns: tuple[str, ...] = COLUMNS) -> Callable[[Scale], dict[Key, Case]]:
    """Return the cases of some settings and columns of table 1, as a function of the scale."""
    return lambda scale: {(each.name, column): table_1(each, scale)[column] for each in settings for column in columns}


def accuracy_checks(outcome: Outcome) -> list[Check]:
    """Claims 1, 4 and 5, each over the mean of the settings."""

    def check(statement: str, first: str, second: str, claim: int, **bounds: float) -> Check:
        values = outcome.differences(outcome.pairs(first, second), TEST_ACCURACY)
        return Check(statement, f"test accuracy, {first} − {second}, points", values, claim=claim, **bounds)

    return [
        check("the small learning rate tests worse", "baseline", "η*", 1, below=0),
        check("FP improves the small learning rate", "FP", "baseline", 4, above=0),
        check("FP closes the gap to η*", "FP", "η*", 4, above=-AS_GOOD),
        check("FP does better than GP", "FP", "GP", 5, above=0),
        check("FP does better than GP_x", "FP", "GP_x", 5, above=0),
        check("FP does as well as GP_r", "FP", "GP_r", 5, above=-AS_GOOD, below=AS_GOOD),
    ]


def peak_checks(outcome: Outcome) -> list[Check]:
    """Claims 1 and 4, each over the mean of the settings: the largest Tr(F) on the way."""

    def check(statement: str, first: str, second: str, claim: int, **bounds: float) -> Check:
        values = outcome.ratios(outcome.pairs(first, second), MAX_TRACE)
        return Check(statement, f"maximum of Tr(F), {first} / {second}", values, claim=claim, **bounds)

    return [
        check("the small learning rate has the higher peak", "baseline", "η*", 1, above=1),
        check("FP lowers the peak of Tr(F)", "FP", "baseline", 4, below=1),
    ]


def cost_checks(outcome: Outcome) -> list[Check]:
    """The paper calls the cost relatively small; its own mean is 1.41."""
    values = outcome.ratios(outcome.pairs("FP", "baseline"), SECONDS_PER_EPOCH)
    number = "seconds per epoch, FP / baseline"
    return [Check("FP every 10 steps costs less than half a step", number, values, below=1.5)]


def fit_checks(outcome: Outcome) -> list[Check]:
    """That the small learning rate does not underfit."""
    values = outcome.differences(outcome.pairs("baseline", "η*"), TRAIN_ACCURACY)
    number = "training accuracy, baseline − η*, points"
    return [Check("the small learning rate trains no worse", number, values, above=-1)]


TABLE1 = Experiment(
    title="Test accuracy with the best and with a small learning rate, and with penalties at the small one",
    cases=columns_of_table_1(*SETTINGS),
    quantities=(TEST_ACCURACY, TRAIN_ACCURACY),
    draw=table_of_bars(TEST_ACCURACY, COLUMNS),
    checks=accuracy_checks,
    paper=paper_table(
        TEST_ACCURACY,
        COLUMNS,
        {
            "WResNet / TinyImageNet": (54.67, 52.57, 52.79, 56.44, 56.73, 55.41),
            "DenseNet / CIFAR-100": (66.09, 58.51, 62.12, 64.42, 66.41, 66.39),
            "VGG-11 / CIFAR-100": (45.86, 36.86, 45.26, 47.35, 49.87, 48.26),
            "WResNet / CIFAR-100": (53.96, 46.38, 58.68, 57.68, 57.05, 58.15),
            "SimpleCNN / CIFAR-10": (76.94, 71.32, 75.68, 75.73, 79.66, 79.76),
        },
    ),
    notes=table_1_notes,
    seeds=5,
    size=(11.0, 4.0),
)
TABLE4 = replace(
    TABLE1,
    title="The maximum of Tr(F) over training, from the first epoch on",
    # Without TinyImageNet, which the paper's table 4 leaves out.
    cases=columns_of_table_1(*(each for each in SETTINGS if each is not WRESNET_TINY)),
    quantities=(MAX_TRACE,),
    draw=table_of_bars(MAX_TRACE, COLUMNS),
    checks=peak_checks,
    paper=paper_table(
        MAX_TRACE,
        COLUMNS,
        {
            "DenseNet / CIFAR-100": (24.68, 98.17, 83.64, 64.33, 66.24, 73.66),
            "VGG-11 / CIFAR-100": (50.88, 148.19, 102.95, 58.53, 64.93, 62.96),
            "WResNet / CIFAR-100": (26.21, 91.39, 41.43, 40.94, 56.53, 39.31),
            "SimpleCNN / CIFAR-10": (24.21, 52.05, 47.96, 25.03, 19.63, 25.35),
        },
    ),
)
TABLE5 = replace(
    TABLE1,
    title="Seconds of training per epoch",
    quantities=(SECONDS_PER_EPOCH,),
    draw=table_of_bars(SECONDS_PER_EPOCH, COLUMNS),
    checks=cost_checks,
    paper=paper_table(
        SECONDS_PER_EPOCH,
        COLUMNS,
        {
            "WResNet / TinyImageNet": (214.45, 142.69, 233.14, 143.78, 208.62, 371.74),
            "DenseNet / CIFAR-100": (78.88, 57.40, 77.89, 78.66, 97.25, 75.96),
            "VGG-11 / CIFAR-100": (30.50, 35.27, 31.54, 32.52, 43.41, 42.40),
            "WResNet / CIFAR-100": (49.64, 47.99, 71.33, 61.36, 76.93, 53.25),
            "SimpleCNN / CIFAR-10": (18.64, 19.51, 26.09, 19.91, 21.21, 20.55),
        },
    ),
    notes=lambda scale: [
        *table_1_notes(scale),
        "Wall time of the steps alone, without tests and measurements, while other runs trained beside: ratios carry "
        "over, seconds do not. bench/ measures the cost of a step by itself.",
    ],
)
TABLE6 = replace(
    TABLE1,
    title="Training accuracy in the last epoch of the runs of table 1",
    quantities=(TRAIN_ACCURACY,),
    draw=table_of_bars(TRAIN_ACCURACY, COLUMNS),
    checks=fit_checks,
    # In the published text the columns of FP and GP_r cannot be read for all settings: those numbers are left out.
    paper=paper_table(
        TRAIN_ACCURACY,
        COLUMNS,
        {
            "WResNet / TinyImageNet": (99.84, 99.96, 99.97, 93.84, 81.05, 86.46),
            "SimpleCNN / CIFAR-10": (100.00, 100.00, 97.79, 100.00, 93.80, 94.64),
            "DenseNet / CIFAR-100": (99.98, 99.97, 99.96, 99.91),
            "VGG-11 / CIFAR-100": (99.98, 99.98, 99.85, 99.62),
            "WResNet / CIFAR-100": (99.98, 99.98, 99.97, 99.96),
        },
    ),
)


# ---- tables 2 and 7: the penalty beside the best learning rate, with augmentation ------------------------------------


def augmented_cases(scale: Scale) -> dict[Key, Case]:
    """η* tuned with augmentation, and FP with it. Digits are cropped and not mirrored: that would be another sign."""
    found: dict[Key, Case] = {}
    for setting in SETTINGS:
        base = setting.base(scale).but(augment="crop_flip" if scale == "paper" else "crop")
        optimal = base.but(lr=best_rate(setting, base, scale))
        found[setting.name, "η*"] = optimal
        found[setting.name, "FP"] = tuned("alpha", coefficients(setting, "FP", scale), optimal.but(method="FP"))
    return found


def augmented_checks(outcome: Outcome) -> list[Check]:
    """What the text says of table 2, over the mean of the settings."""
    values = outcome.differences(outcome.pairs("FP", "η*"), TEST_ACCURACY)
    return [Check("FP improves the best learning rate", "test accuracy, FP − η*, points", values, above=0)]


TABLE2 = Experiment(
    title="Test accuracy of FP with the best learning rate and augmentation",
    cases=augmented_cases,
    quantities=(TEST_ACCURACY,),
    draw=table_of_bars(TEST_ACCURACY, ("η*", "FP")),
    checks=augmented_checks,
    paper=paper_table(
        TEST_ACCURACY,
        ("η*", "FP"),
        {
            "WResNet / TinyImageNet": (54.70, 60.00),
            "DenseNet / CIFAR-100": (74.41, 74.19),
            "VGG-11 / CIFAR-100": (59.82, 65.08),
            "WResNet / CIFAR-100": (69.48, 71.53),
            "SimpleCNN / CIFAR-10": (87.16, 87.52),
        },
    ),
    notes=lambda scale: [
        *table_1_notes(scale),
        "η* is tuned anew with augmentation, α at that learning rate."
        + (" Digits are cropped, with a padding of an eighth, not mirrored." if scale == "digits" else ""),
    ],
)
TABLE7 = replace(
    TABLE2,
    title="Training accuracy in the last epoch of the runs of table 2",
    quantities=(TRAIN_ACCURACY,),
    draw=table_of_bars(TRAIN_ACCURACY, ("η*", "FP")),
    checks=lambda outcome: (),
    paper=paper_table(
        TRAIN_ACCURACY,
        ("η*", "FP"),
        {
            "WResNet / TinyImageNet": (99.86, 93.65),
            "DenseNet / CIFAR-100": (98.75, 97.53),
            "VGG-11 / CIFAR-100": (98.64, 93.06),
            "WResNet / CIFAR-100": (99.97, 99.97),
            "SimpleCNN / CIFAR-10": (97.52, 98.94),
        },
    ),
)


# ---- figures 4 and 10: accuracy and Tr(F) over training --------------------------------------------------------------

SHOWN = ("η*", "baseline", "GP_x", "FP")

FIG4 = Experiment(
    title="Validation accuracy and Tr(F) over training, Wide ResNet and VGG-11",
    cases=columns_of_table_1(VGG, WRESNET, columns=SHOWN),
    quantities=(VALIDATION_ACCURACY, MAX_TRACE),
    draw=accuracy_and_trace,
    checks=peak_checks,
    notes=table_1_notes,
    size=(10.0, 7.0),
)
FIG10 = replace(
    FIG4,
    title="Validation accuracy and Tr(F) over training, DenseNet and SimpleCNN",
    cases=columns_of_table_1(DENSENET, SIMPLE_CNN, columns=SHOWN),
)


# ---- figure 3: FP switched on after E epochs -------------------------------------------------------------------------

# The paper says CIFAR-10 and CIFAR-100, not which networks: these are ours.
LATER_SETTINGS = (WRESNET, SIMPLE_CNN)
STARTS = {"paper": (1, 2, 4, 8, 16, 32, 64, 128), "digits": (1, 2, 4, 8, 16)}


def later_cases(scale: Scale) -> dict[Key, Case]:
    """η*, the small learning rate, and FP from epoch 0, as in table 1, and from later epochs."""
    found: dict[Key, Case] = {}
    for setting in LATER_SETTINGS:
        row = table_1(setting, scale)
        found |= {(setting.name, name): row[name] for name in ("η*", "baseline")}
        found[setting.name, "0"] = row["FP"]
        found |= {(setting.name, str(start)): row["FP"].but(penalty_start=start) for start in STARTS[scale]}
    return found


def starts(outcome: Outcome, row: str) -> list[Key]:
    """Return the cases of a setting with FP, the earliest first."""
    return [key for key in outcome.keys(row) if key[1].isdigit()]


def draw_later(figure: Figure, outcome: Outcome) -> None:
    """Test accuracy against E, with η* and the small learning rate as lines."""
    for axes, row in row_panels(figure, outcome):
        found = [(int(key[1]), outcome.summary(key, TEST_ACCURACY)) for key in starts(outcome, row)]
        whole = [(start, each.mean, each.std or 0.0) for start, each in found if each is not None]
        places, means, errors = ([each[part] for each in whole] for part in range(3))
        axes.errorbar(places, means, errors, fmt="o-", color=COLOURS["FP"], label="FP from epoch E", capsize=2)
        for name in ("η*", "baseline"):
            level = outcome.summary((row, name), TEST_ACCURACY)
            if level is not None:
                axes.axhline(level.mean, color=COLOURS[name], linestyle="--", label=name)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlabel("E")
        axes.set_ylabel(TEST_ACCURACY.name)


def later_checks(outcome: Outcome) -> list[Check]:
    """Claim 6."""

    def of(seed: int) -> float | None:
        return mean_correlation(
            [(int(key[1]), outcome.value(seed, key, TEST_ACCURACY)) for key in starts(outcome, row)]
            for row in outcome.rows()
        )

    pairs = [(starts(outcome, row)[-1], starts(outcome, row)[0]) for row in outcome.rows()]
    order, last = "rank correlation of E with the test accuracy", "test accuracy, last E − E = 0, points"
    lost = outcome.differences(pairs, TEST_ACCURACY)
    return [
        Check("the later FP starts, the lower the accuracy", order, outcome.per_seed(of), below=0, claim=6),
        Check("FP from the last E on does worse than from the start", last, lost, below=0, claim=6),
    ]


FIG3 = Experiment(
    title="Test accuracy with FP switched on after E epochs",
    cases=later_cases,
    quantities=(TEST_ACCURACY,),
    draw=draw_later,
    checks=later_checks,
    notes=lambda scale: ["α is that of table 1.", *digits_notes(scale)],
)


# ---- figures 16 and 17: FP at every step, and on the gradient of a single example (equation 6) -----------------------

RECOMPUTED: Mapping[Scale, tuple[float, ...]] = {"paper": logspace(1e-2, 1e0, 10), "digits": logspace(3e-3, 1e-1, 4)}
"""α of figure 16; smaller at digits, where the small networks do not learn with more than 0.1."""
FIRST: Mapping[Scale, tuple[float, ...]] = {"paper": logspace(1e-4, 1e-2, 10), "digits": logspace(3e-4, 1e-2, 4)}
"""α of figure 17, a hundredth of the others: the squared norm of one gradient is larger than that of a mean."""
EXACT = "equation 6"


def every(steps: int, scale: Scale) -> dict[Key, Case]:
    """Return FP at the small learning rate for several α, recomputed every so many steps."""
    base = small_rate(scale).but(method="FP", penalty_every=steps)
    return {(f"every {steps}" if steps > 1 else "every step", f"α={a:g}"): base.but(alpha=a) for a in RECOMPUTED[scale]}


def exact(scale: Scale) -> dict[Key, Case]:
    """Return FP with equation 6 at every step."""
    base = small_rate(scale).but(method="FP", penalty_reduction="first", penalty_every=1)
    return {(EXACT, f"α={a:g}"): base.but(alpha=a) for a in FIRST[scale]}


def as_good(outcome: Outcome, cheap: str, costly: str, statement: str, number: str) -> list[Check]:
    """Claim 11: one row of cases does as well as the other, each with its best α."""
    pair = best_key(outcome, outcome.keys(cheap)), best_key(outcome, outcome.keys(costly))
    values = outcome.differences([pair], TEST_ACCURACY)
    return [Check(statement, f"test accuracy with the best α, {number}, points", values, above=-AS_GOOD, claim=11)]


FIG16 = Experiment(
    title="FP recomputed every 10 steps or every step, for several α",
    cases=lambda scale: every(10, scale) | every(1, scale),
    quantities=(TEST_ACCURACY, MAX_TRACE),
    draw=functools.partial(accuracy_and_trace, ordered=True),
    checks=lambda outcome: as_good(
        outcome, "every 10", "every step", "every 10 steps is as good as every step", "every 10 − every step"
    ),
    notes=lambda scale: ["The best α has the best mean validation accuracy over the seeds.", *digits_notes(scale)],
    size=(10.0, 7.0),
)
FIG17 = replace(
    FIG16,
    title="FP without the approximation, on the gradient of a single example",
    cases=lambda scale: exact(scale) | every(10, scale),
    draw=over_epochs(VALIDATION, TRACE, beginning=(EXACT,)),
    checks=lambda outcome: as_good(outcome, "every 10", EXACT, "the approximation costs nothing", "FP − equation 6"),
    size=(10.0, 4.0),
)
