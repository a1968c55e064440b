"""What the value of an option may be, in words and as a test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value has to satisfy, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a finite number above 0", lambda value: 0 < value < math.inf)
NON_NEGATIVE = Rule("a finite number, at least 0", lambda value: 0 <= value < math.inf)
FRACTION = Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Rule("a number from 0 up to, not including, 1", lambda value: 0 <= value < 1)
AT_LEAST_ONE = Rule("an integer, at least 1", lambda value: value >= 1)
AT_LEAST_ZERO = Rule("an integer, at least 0", lambda value: value >= 0)
AT_LEAST_8 = Rule("an integer, at least 8", lambda value: value >= 8)
SEED = Rule("an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
INCREASING = Rule(
    "increasing epochs, each at least 1", lambda value: all(a < b for a, b in itertools.pairwise((0, *value)))
)
DECREASING = Rule(
    "decreasing finite numbers above 0",
    lambda value: all(a > b for a, b in itertools.pairwise((math.inf, *value, 0.0))),
)
ONE_OR_TWO = Rule(
    "one or two integers, each at least 1", lambda value: len(value) <= 2 and all(each >= 1 for each in value)
)
