"""What a table or figure of the paper is: its cases, what is read from their runs, how it is drawn, what it claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check, mean_correlation
from fastfisher.training.config import TrainConfig
from fastfisher.training.folder import RunFolder
from fastfisher.training.measurements import BELOW
from fastfisher.training.summary import Metrics, Summary

DEFAULT_SEEDS = 3


@dataclass(frozen=True)
class Quantity:
    """A number that a run gives: its name with its unit, and how it is read. None where the run does not have it."""

    name: str
    of: Callable[[Metrics], float | None]


def epochs_of(run: Metrics) -> Metrics:
    """Return the records that end an epoch."""
    return [record for record in run if "epoch" in record]


def series(run: Metrics, name: str) -> tuple[list[float], list[float]]:
    """Return when something was measured, in epochs, and its values; what is not there is left out."""
    epochs = epochs_of(run)
    if not epochs:
        return [], []
    steps_per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    found = [record for record in run if record.get(name) is not None]
    return [record["step"] / steps_per_epoch for record in found], [float(record[name]) for record in found]


def _read(name: str, title: str, read: Callable[[list[float]], float]) -> Quantity:
    def of(run: Metrics) -> float | None:
        values = series(run, name)[1]
        return read(values) if values else None

    return Quantity(title, of)


def final(name: str, title: str, factor: float = 1.0) -> Quantity:
    """Return the last value."""
    return _read(name, title, lambda values: factor * values[-1])


def maximum(name: str, title: str, factor: float = 1.0) -> Quantity:
    """Return the largest value over training."""
    return _read(name, title, lambda values: factor * max(values))


def mean(name: str, title: str) -> Quantity:
    """Return the mean over training."""
    return _read(name, title, statistics.mean)


def at_best(name: str, title: str, *, by: str, factor: float = 1.0) -> Quantity:
    """Return the value after the epoch, of those that have one, where the accuracy ``by`` is first the best."""

    def of(run: Metrics) -> float | None:
        epochs = [record for record in epochs_of(run) if record.get(name) is not None and record.get(by) is not None]
        # max() takes the first of equals.
        return factor * float(max(epochs, key=lambda record: float(record[by]))[name]) if epochs else None

    return Quantity(title, of)


TEST_ACCURACY = final("test_accuracy", "test accuracy, %", 100)
MAX_TEST_ACCURACY = maximum("test_accuracy", "best test accuracy, %", 100)
MAX_TRAIN_ACCURACY = maximum("train_accuracy", "best training accuracy, %", 100)
VALIDATION_ACCURACY = final("validation_accuracy", "validation accuracy, %", 100)
TRAIN_ACCURACY = final("train_accuracy", "training accuracy, %", 100)
CLEAN_ACCURACY = final("clean_accuracy", "accuracy on clean training examples, %", 100)
NOISY_ACCURACY = final("noisy_accuracy", "accuracy on noisy training examples, %", 100)
TEST_AT_BEST_VALIDATION = at_best(
    "test_accuracy", "test accuracy at the best validation epoch, %", by="validation_accuracy", factor=100
)
MIN_LOSS = _read("train_loss", "smallest training loss", min)
FINAL_TRACE = final("trace_fisher", "Tr(F) at the end")
HESSIAN_AT_BEST = at_best("trace_hessian", "Tr(H) at the best epoch", by="test_accuracy")


def _early_trace(run: Metrics) -> float | None:
    found = [
        value
        for record in run
        for name, value in record.items()
        if name.startswith(BELOW) and not name.endswith("_standard_error")
    ]
    return float(found[0]) if found else None


EARLY_TRACE = Quantity("Tr(F_i)", _early_trace)
# Not of the initial weights: the first measurement is after an epoch, as in table 4.
MAX_TRACE = maximum("trace_fisher", "maximum of Tr(F)")
SECONDS_PER_EPOCH = mean("train_seconds", "training seconds per epoch")


@dataclass(frozen=True)
class Outcome:
    """The finished runs of an experiment.

    Attributes:
        runs: for each case what each seed measured. A seed that diverged is in ``diverged`` instead.
        configs: the options of the run of the first seed, those that were tuned included.
        folders: where each run is, for what is not among its metrics.
    """

    scale: Scale
    seeds: tuple[int, ...]
    runs: Mapping[Key, Mapping[int, Metrics]]
    configs: Mapping[Key, TrainConfig]
    diverged: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    folders: Mapping[tuple[Key, int], RunFolder] = field(default_factory=dict)

    def keys(self, *beginning: str) -> list[Key]:
        """Return the cases whose names begin so, in their order."""
        return [key for key in self.runs if key[: len(beginning)] == beginning]

    def rows(self) -> list[str]:
        """Return the first parts of the names, each once, in order: the rows of a table."""
        return list(dict.fromkeys(key[0] for key in self.runs))

    def lines(self, *beginning: str) -> dict[str, Key]:
        """Return the cases whose names begin so, each by the last part of its name: the curves of a panel."""
        return {key[-1]: key for key in self.keys(*beginning)}

    def pairs(self, first: str, second: str) -> list[tuple[Key, Key]]:
        """Return the cases of two columns of a table, a pair for each row."""
        return [((row, first), (row, second)) for row in self.rows()]

    def values(self, key: Key, quantity: Quantity) -> dict[int, float]:
        """Return a quantity for each seed that has it."""
        found = {seed: quantity.of(run) for seed, run in self.runs[key].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def summary(self, key: Key, quantity: Quantity) -> Summary | None:
        """Return mean and standard deviation over seeds, None where no seed has the quantity."""
        values = list(self.values(key, quantity).values())
        return Summary.of(values) if values else None

    def per_seed(self, number: Callable[[int], float | None]) -> tuple[float, ...]:
        """Return a number for each seed that gives one."""
        found = (number(seed) for seed in self.seeds)
        return tuple(value for value in found if value is not None)

    def value(self, seed: int, key: Key, quantity: Quantity) -> float | None:
        """Return a quantity of one run, None if it has none or diverged."""
        run = self.runs[key].get(seed)
        return None if run is None else quantity.of(run)

    def differences(self, pairs: Sequence[tuple[Key, Key]], quantity: Quantity) -> tuple[float, ...]:
        """Return for each seed the mean over pairs of cases of the first's quantity minus the second's.

        Runs of one seed have the same noise, and as far as the cases allow the same initial weights and batches.
        """
        return self.per_seed(lambda seed: self._mean(seed, pairs, quantity, lambda a, b: a - b))

    def ratios(self, pairs: Sequence[tuple[Key, Key]], quantity: Quantity) -> tuple[float, ...]:
        """Return for each seed the mean over pairs of cases of the first's quantity divided by the second's."""
        return self.per_seed(lambda seed: self._mean(seed, pairs, quantity, lambda a, b: a / b if b else None))

    def _mean(
        self,
        seed: int,
        pairs: Sequence[tuple[Key, Key]],
        quantity: Quantity,
        compare: Callable[[float, float], float | None],
    ) -> float | None:
        found = []
        for first, second in pairs:
            a, b = self.value(seed, first, quantity), self.value(seed, second, quantity)
            if a is not None and b is not None and (compared := compare(a, b)) is not None:
                found.append(compared)
        # Means over different pairs cannot be compared: a seed that lacks a pair gives none.
        return statistics.mean(found) if found and len(found) == len(pairs) else None


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        title: what it shows, as in the paper.
        cases: its runs, at a scale.
        quantities: what is read from each run. With keys of two parts a quantity is a table with the first parts as
            rows and the second as columns; else the cases are rows and the quantities columns.
        draw: draws into an empty figure.
        checks: what it bears on.
        paper: the paper's numbers, by case and name of the quantity.
        notes: what a reader has to know about the settings, at a scale.
        seeds: how many unless asked otherwise.
        size: of the figure, in inches.
    """

    title: str
    cases: Callable[[Scale], Mapping[Key, Case]]
    quantities: tuple[Quantity, ...]
    draw: Callable[[Figure, Outcome], None]
    checks: Callable[[Outcome], Sequence[Check]] = lambda outcome: ()
    paper: Mapping[tuple[Key, str], float] = field(default_factory=dict)
    notes: Callable[[Scale], Sequence[str]] = lambda scale: ()
    seeds: int = DEFAULT_SEEDS
    size: tuple[float, float] = (10.0, 4.0)


def paper_table(
    quantity: Quantity, columns: Sequence[str], rows: Mapping[str, Sequence[float]]
) -> dict[tuple[Key, str], float]:
    """Return the numbers of a table of the paper for :attr:`Experiment.paper`; a row may lack its last columns."""
    return {
        ((row, column), quantity.name): value
        for row, values in rows.items()
        for column, value in zip(columns, values, strict=False)
    }


def rank_correlation(outcome: Outcome, first: str, second: str, *, apart: bool = False) -> tuple[float, ...]:
    """Return for each seed Spearman's correlation of two things measured together, over all times of all cases.

    With ``apart`` of each case by itself, and the mean of those.
    """

    def of(seed: int) -> float | None:
        groups = [[(r.get(first), r.get(second)) for r in runs.get(seed, [])] for runs in outcome.runs.values()]
        return mean_correlation(groups if apart else [[pair for group in groups for pair in group]])

    return outcome.per_seed(of)


def best_key(outcome: Outcome, keys: Sequence[Key]) -> Key:
    """Return the case with the best mean validation accuracy, the first of equals."""

    def judged(key: Key) -> float:
        found = outcome.summary(key, VALIDATION_ACCURACY) or outcome.summary(key, TEST_ACCURACY)
        return -1.0 if found is None else found.mean

    return max(keys, key=judged)
