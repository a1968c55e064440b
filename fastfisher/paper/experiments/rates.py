"""What a large and a small learning rate, or batch, do to Tr(F): figures 1, 18, 19 and 20."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, Tuned
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import TRACE, VALIDATION, curves, legend, over_epochs, panels
from fastfisher.paper.experiment import (
    MAX_TRACE,
    TEST_ACCURACY,
    TRAIN_ACCURACY,
    VALIDATION_ACCURACY,
    Experiment,
    Outcome,
    best_key,
)
from fastfisher.paper.settings import WRESNET_TINY, digits_notes, large_rate, logspace, small_rate, table_1

LARGE, SMALL = "large learning rate", "small learning rate"


# ---- figure 1: the catastrophic Fisher explosion ---------------------------------------------------------------------


def explosion_cases(scale: Scale) -> dict[Key, Case]:
    """On TinyImageNet, η1 = 0.0316 and η2 = 0.001; at digits η* and its thirtieth."""
    row = table_1(WRESNET_TINY, scale)
    if scale == "digits":
        return {(LARGE,): row["η*"], (SMALL,): row["baseline"]}
    return {(LARGE,): row["η*"].but(lr=0.0316), (SMALL,): row["η*"].but(lr=0.001)}


def draw_explosion(figure: Figure, outcome: Outcome) -> None:
    """Accuracy in training (dashed) and testing, and Tr(F)."""
    left, right = panels(figure, 1, 2)
    lines = outcome.lines()
    curves(left, outcome, lines, "test_accuracy", "accuracy, % (dashed: training)", factor=100)
    legend(left)
    curves(left, outcome, lines, "train_accuracy", "accuracy, % (dashed: training)", factor=100, style="--")
    curves(right, outcome, lines, "trace_fisher", "Tr(F)", logarithmic=True)


def explosion_checks(outcome: Outcome) -> list[Check]:
    """Claim 1."""
    pairs = [((SMALL,), (LARGE,))]
    peak, lost = outcome.ratios(pairs, MAX_TRACE), outcome.differences(pairs, TEST_ACCURACY)
    return [
        Check("the small learning rate has the higher peak", "maximum of Tr(F), small / large", peak, above=1, claim=1),
        Check("the small learning rate tests worse", "test accuracy, small − large, points", lost, below=0, claim=1),
    ]


FIG1 = Experiment(
    title="Accuracy and Tr(F) over training with a large and a small learning rate",
    cases=explosion_cases,
    quantities=(TEST_ACCURACY, TRAIN_ACCURACY, MAX_TRACE),
    draw=draw_explosion,
    checks=explosion_checks,
    notes=digits_notes,
)


# ---- figures 18 and 19: Tr(F) after every single step ----------------------------------------------------------------

MEASURED_EPOCHS = {"paper": 30, "digits": 16}
# The paper does not say which; the last of figure 20 is ten times the first.
BATCHES = {"paper": (128, 512, 1280), "digits": (4, 8, 16)}


def every_step(case: Case, scale: Scale) -> Case:
    """Return the case measured at every step on 128 examples, for the early phase: before any drop."""
    return case.without("lr_milestones").but(
        epochs=MEASURED_EPOCHS[scale], measure="trace_fisher,accuracy", measure_every="1step", trace_samples=128
    )


def batches(scale: Scale) -> dict[Key, Case]:
    """SimpleCNN at η*, in ascending order of the batch size."""
    base = every_step(large_rate(scale), scale)
    return {(f"batch {size}",): base.but(batch_size=size) for size in BATCHES[scale]}


def every_step_notes(scale: Scale) -> list[str]:
    """Say when and on what Tr(F) is measured."""
    return [
        f"The first {MEASURED_EPOCHS[scale]} epochs, without drops of the learning rate. The accuracy is that on the "
        "128 random examples on which Tr(F) is measured; in the paper it is that of the step's own batch.",
        *digits_notes(scale),
    ]


def sharpest_rate(outcome: Outcome) -> list[Check]:
    """Claim 12: the largest of all steps."""
    values = outcome.ratios([((LARGE,), (SMALL,))], MAX_TRACE)
    number = "maximum of Tr(F) over all steps, large / small"
    return [Check("the large learning rate never enters as sharp a region", number, values, below=1, claim=12)]


def sharpest_batch(outcome: Outcome) -> list[Check]:
    """Claim 2: the largest of all steps."""
    keys = list(outcome.runs)
    values = outcome.ratios([(keys[-1], keys[0])], MAX_TRACE)
    number = "maximum of Tr(F) over all steps, largest / smallest batch"
    return [Check("a larger batch enters a sharper region", number, values, above=1, claim=2)]


FIG18 = Experiment(
    title="Tr(F) at every step, with a large and with a small learning rate",
    cases=lambda scale: {
        (SMALL,): every_step(small_rate(scale), scale),
        (LARGE,): every_step(large_rate(scale), scale),
    },
    quantities=(MAX_TRACE,),
    # The accuracy is that on the examples that Tr(F) is measured on.
    draw=over_epochs(TRACE, ("measured_accuracy", "accuracy on 128 examples, %", 100.0)),
    checks=sharpest_rate,
    notes=every_step_notes,
)
FIG19 = replace(
    FIG18,
    title="Tr(F) at every step, with three batch sizes",
    cases=batches,
    checks=sharpest_batch,
    notes=lambda scale: ["The paper does not say which batch sizes: these are ours.", *every_step_notes(scale)],
)


# ---- figure 20: FP in training with a large batch --------------------------------------------------------------------

NORMAL, LARGE_BATCH, HALVED = "batch as in table 1", "large batch", "large batch, lr/2"
TIMES = {"paper": 10, "digits": 2}
# The paper shows several and does not say which.
ALPHAS = {"paper": logspace(1e-2, 1e0, 5), "digits": logspace(3e-3, 1e-1, 4)}


def large_batch_cases(scale: Scale) -> dict[Key, Case]:
    """A larger batch at the same learning rate, at half of it, and at that with FP on as many examples as before."""
    normal = large_rate(scale)
    large = normal.but(batch_size=TIMES[scale] * normal["batch_size"])
    rate = normal["lr"]
    assert isinstance(rate, Tuned)
    halved = large.but(lr=rate.times(0.5))
    penalised = halved.but(method="FP", penalty_every=1, penalty_examples=normal["batch_size"])
    return {
        (NORMAL,): normal,
        (LARGE_BATCH,): large,
        (HALVED,): halved,
        **{(f"FP α={a:g}",): penalised.but(alpha=a) for a in ALPHAS[scale]},
    }


def large_batch_checks(outcome: Outcome) -> list[Check]:
    """Claim 2, and what supplement E says of FP with the best α."""
    best = best_key(outcome, [key for key in outcome.runs if key[0].startswith("FP")])
    lost = outcome.differences([((LARGE_BATCH,), (NORMAL,))], TEST_ACCURACY)
    gained = outcome.differences([(best, (HALVED,))], TEST_ACCURACY)
    peak = outcome.ratios([(best, (HALVED,))], MAX_TRACE)
    number = "FP with the best α {} without"
    return [
        Check("the large batch tests worse", "test accuracy, large − normal batch, points", lost, below=0, claim=2),
        Check("FP improves the large batch", f"test accuracy, {number.format('−')}, points", gained, above=0),
        Check("FP lowers the peak of Tr(F)", f"maximum of Tr(F), {number.format('/')}", peak, below=1),
    ]


FIG20 = Experiment(
    title="FP in training with a large batch",
    cases=large_batch_cases,
    quantities=(TEST_ACCURACY, VALIDATION_ACCURACY, MAX_TRACE),
    # From no penalty in blue to the largest α in red.
    draw=over_epochs(TRACE, VALIDATION, without=(NORMAL, LARGE_BATCH)),
    checks=large_batch_checks,
    paper={
        ((name,), TEST_ACCURACY.name): value
        for name, value in {NORMAL: 76.94, LARGE_BATCH: 73.70, HALVED: 73.59}.items()
    },
    notes=lambda scale: [
        "The batch is 10 times that of table 1, as in the paper, whose best FP reaches 78.70 % test accuracy."
        if scale == "paper"
        else "The batch is twice that of table 1: with the paper's 10 times there would be 20 steps.",
        "FP is computed at every step, on the first examples of the batch, as many as in a batch of table 1.",
        *digits_notes(scale),
    ],
)
