"""TraceEstimate: a number with its error bar, as every estimator of this package returns it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from fastfisher.checks import is_number


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of the trace of a matrix over the parameters.

    Attributes:
        value: the estimate.
        standard_error: the standard error of ``value`` over the randomness that ``method`` names (examples, labels,
            probes); 0 where the value is exact for the data given.
        samples: how many examples it was taken over.
        draws: how many labels or cotangents were drawn per example, or how many probes; 0 where nothing was drawn.
        method: how it was made, in words that a log can keep, such as ``"fisher, labels=rademacher"``.
        per_parameter: the parts of ``value`` by parameter name; they add up to it. Empty where a method has none.
        fallbacks: which parameters went a slower way, and why, by name.
        degrees: the degrees of freedom of ``standard_error``: how many independent numbers its spread was taken from,
            less one. Few of them make an error bar that is itself uncertain; :meth:`interval` allows for that.
    """

    value: float
    standard_error: float
    samples: int
    draws: int
    method: str
    per_parameter: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    degrees: float = math.inf

    def __float__(self) -> float:
        return self.value

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that holds the trace with probability ``level``: value ± t·standard_error, with Student's t.

        Raises:
            ValueError: ``level`` is no probability between 0 and 1.
        """
        reach = self._reach(level)
        return self.value - reach, self.value + reach

    def _reach(self, level: float) -> float:
        if not (is_number(level) and 0 < level < 1):
            raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
        if self.standard_error == 0:
            return 0.0
        return student_quantile(level, self.degrees) * self.standard_error

    def __str__(self) -> str:
        low, high = self.interval()
        within = "" if self.standard_error == 0 else f"; 95 %: {low:.4g} to {high:.4g}"
        error = f"{self.value:.6g} ± {self.standard_error:.2g}"
        return f"{error} ({self.method}, {self.samples} examples{within})"


def student_quantile(level: float, degrees: float) -> float:
    """The t for which |T| ≤ t with probability ``level``, T with Student's distribution; ``degrees`` is rounded down.

    By bisection of the finite sums for whole numbers of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    Infinite where there are none.
    """
    if math.isnan(degrees) or degrees < 1:
        return math.inf
    if degrees >= 1001:
        return statistics.NormalDist().inv_cdf((1 + level) / 2)
    n = int(degrees)

    def probability(angle: float) -> float:
        """Of |T| ≤ √n tan(angle)."""
        cosine, sine = math.cos(angle), math.sin(angle)
        term = cosine if n % 2 else 1.0
        total = term if n > 1 else 0.0
        for k in range(2 + n % 2, n, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + sine * total) if n % 2 else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(n) * math.tan(low)
