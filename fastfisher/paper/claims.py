"""The twelve claims of the paper, and the test that says whether runs support one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

CLAIMS = {
    1: "A smaller learning rate gives a larger early peak of Tr(F) and a lower test accuracy (figures 1 and 2).",
    2: "A larger batch does the same (figures 7 and 19).",
    3: "Tr(F_i) correlates negatively with the final test accuracy over runs (figures 2 and 7).",
    4: "FP at the small learning rate closes the gap to η* (table 1) and lowers the peak of Tr(F) (table 4).",
    5: "FP does better than GP and GP_x, and as well as GP_r (table 1).",
    6: "FP must be on from early training: the later it starts, the lower the test accuracy (figure 3).",
    7: "Under label noise FP improves accuracy, and slows noisy examples more than clean ones (table 3, figure 5).",
    8: "The cosine between the gradients of noisy and of clean examples is negative early in training (figure 12).",
    9: "Low early Tr(F) leads to low final Tr(H) (figure 6).",
    10: "Tr(F) and Tr(F_B) correlate (figure 15), Tr(F) and Tr(H) correlate (figure 21).",
    11: "FP every 10 steps is as good as every step (figure 16); the approximation costs nothing (figure 17).",
    12: "A large learning rate never enters as sharp a region, even for one step (figure 18).",
}

CONFIDENCE = 0.95

AS_GOOD = 1.0
"""Percentage points of accuracy within which table 1 marks a run as having closed the gap."""

Verdict = Literal["supported", "contradicted", "undecided"]

HOW_TESTED = (
    "A claim is a number that each seed gives, and what it is claimed to be: above or below a bound, or between two. "
    f"The verdict is by the {CONFIDENCE:.0%} interval of Student's t for its mean over seeds: supported where the "
    "whole interval is as claimed, contradicted where none of it is, else undecided, as it is with a single seed. "
    "Where a claim is about several settings, a seed gives their mean. A claim with several parts is supported where "
    "all of them are, and contradicted where one is."
)


@dataclass(frozen=True)
class Check:
    """One part of a claim, as an experiment puts it to the test.

    Attributes:
        statement: what is claimed, in words.
        number: what each seed gives, with its unit.
        values: that number for each seed; of a seed that diverged there is none.
        above, below: what the number is claimed to be above, or below, or both.
        claim: which of :data:`CLAIMS` it is a part of; None for a statement that is none of them.
    """

    statement: str
    number: str
    values: tuple[float, ...]
    above: float = -math.inf
    below: float = math.inf
    claim: int | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The interval for the mean; infinite with fewer than two values."""
        return interval(self.values)

    @property
    def verdict(self) -> Verdict:
        """As :data:`HOW_TESTED` says."""
        if len(self.values) < 2:
            return "undecided"
        low, high = self.interval
        if low > self.above and high < self.below:
            return "supported"
        return "contradicted" if high <= self.above or low >= self.below else "undecided"

    @property
    def claimed(self) -> str:
        """What the number is claimed to be."""
        if self.above == -math.inf:
            return f"below {self.below:g}"
        return f"above {self.above:g}" if self.below == math.inf else f"between {self.above:g} and {self.below:g}"

    def __str__(self) -> str:
        """Return the number that was found, with its interval."""
        if not self.values:
            return "no seed gives a value"
        mean, (low, high) = statistics.mean(self.values), self.interval
        if len(self.values) < 2:
            return f"{mean:.3g}, one seed"
        return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of Student's t for the mean of independent values; infinite with fewer than two."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean = statistics.mean(values)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a claim from those on its parts."""
    found = set(verdicts)
    if "contradicted" in found:
        return "contradicted"
    return "supported" if found == {"supported"} else "undecided"


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, None where one of the two does not vary or there are less than 3 points."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(stats.spearmanr(x, y).statistic)


def mean_correlation(groups: Iterable[Iterable[tuple[float | None, float | None]]]) -> float | None:
    """Return the mean over groups of the correlation of their pairs; pairs that lack a number are left out.

    None where no group has a correlation.
    """
    found = []
    for group in groups:
        whole = [(x, y) for x, y in group if x is not None and y is not None]
        each = correlation([x for x, _ in whole], [y for _, y in whole])
        if each is not None:
            found.append(each)
    return statistics.mean(found) if found else None
