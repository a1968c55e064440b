"""Figure 3: FP switched on after E epochs."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check, correlation
from fastfisher.paper.drawing import COLOURS, legend, panels, rows_of
from fastfisher.paper.experiment import TEST_ACCURACY, Experiment, Outcome
from fastfisher.paper.settings import SIMPLE_CNN, WRESNET, digits_notes, table_1

# The paper says CIFAR-10 and CIFAR-100, not which networks: these are ours.
SETTINGS = (WRESNET, SIMPLE_CNN)
STARTS = {"paper": (1, 2, 4, 8, 16, 32, 64, 128), "digits": (1, 2, 4, 8, 16)}


def cases(scale: Scale) -> dict[Key, Case]:
    """η*, the small learning rate, and FP from epoch 0, as in table 1, and from later epochs."""
    found: dict[Key, Case] = {}
    for setting in SETTINGS:
        row = table_1(setting, scale)
        found |= {(setting.name, name): row[name] for name in ("η*", "baseline")}
        found[setting.name, "0"] = row["FP"]
        found |= {(setting.name, str(start)): row["FP"].but(penalty_start=start) for start in STARTS[scale]}
    return found


def starts(outcome: Outcome, row: str) -> list[Key]:
    """Return the cases of a setting with FP, the earliest first."""
    return [key for key in outcome.keys(row) if key[1].isdigit()]


def draw(figure: Figure, outcome: Outcome) -> None:
    """Test accuracy against E, with η* and the small learning rate as lines."""
    rows = rows_of(outcome)
    for axes, row in zip(panels(figure, 1, len(rows)), rows, strict=True):
        keys = starts(outcome, row)
        found = [(int(key[1]), outcome.summary(key, TEST_ACCURACY)) for key in keys]
        whole = [(start, each) for start, each in found if each is not None]
        axes.errorbar(
            [start for start, _ in whole],
            [each.mean for _, each in whole],
            [each.std or 0.0 for _, each in whole],
            fmt="o-",
            color=COLOURS["FP"],
            label="FP from epoch E",
            capsize=2,
        )
        for name in ("η*", "baseline"):
            level = outcome.summary((row, name), TEST_ACCURACY)
            if level is not None:
                axes.axhline(level.mean, color=COLOURS[name], linestyle="--", label=name)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlabel("E")
        axes.set_ylabel(TEST_ACCURACY.name)
        axes.set_title(row, fontsize="medium")
        legend(axes)


def checks(outcome: Outcome) -> list[Check]:
    """Claim 6."""

    def of(seed: int) -> float | None:
        found = []
        for row in rows_of(outcome):
            values = {int(key[1]): outcome.value(seed, key, TEST_ACCURACY) for key in starts(outcome, row)}
            whole = {start: value for start, value in values.items() if value is not None}
            r = correlation(list(whole), list(whole.values()))
            if r is not None:
                found.append(r)
        return sum(found) / len(found) if found else None

    pairs = [(starts(outcome, row)[-1], starts(outcome, row)[0]) for row in rows_of(outcome)]
    return [
        Check(
            "the later FP starts, the lower the accuracy",
            "rank correlation of E with the test accuracy",
            outcome.per_seed(of),
            below=0,
            claim=6,
        ),
        Check(
            "FP from the last E on does worse than from the start",
            "test accuracy, last E − E = 0, points",
            outcome.differences(pairs, TEST_ACCURACY),
            below=0,
            claim=6,
        ),
    ]


EXPERIMENT = Experiment(
    title="Test accuracy with FP switched on after E epochs",
    cases=cases,
    quantities=(TEST_ACCURACY,),
    draw=draw,
    checks=checks,
    notes=lambda scale: ["α is that of table 1.", *digits_notes(scale)],
)
