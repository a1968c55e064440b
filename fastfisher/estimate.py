"""TraceEstimate: a number with its error bar, as every estimator of this package returns it."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """

    value: float
    standard_error: float
    samples: int
    draws: int
    method: str
    per_parameter: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.standard_error:.2g} ({self.method}, {self.samples} examples)"
