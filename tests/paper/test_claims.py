from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fastfisher.paper.claims import CLAIMS, CONFIDENCE, Check, Verdict, correlation, interval, together
from fastfisher.paper.report import summary_of_claims

RANDOM = np.random.default_rng(0)


def check(values: tuple[float, ...], **bounds: Any) -> Check:
    return Check("a is larger", "a / b", values, **bounds)


@pytest.mark.parametrize("count", [2, 3, 5, 32])
def test_the_interval_is_that_of_students_t(count: int) -> None:
    values = RANDOM.normal(3.0, 2.0, count)
    expected = stats.t.interval(CONFIDENCE, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert interval(values.tolist()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("values", [(), (1.0,)])
def test_without_a_spread_there_is_no_interval(values: tuple[float, ...]) -> None:
    assert interval(values) == (-math.inf, math.inf)


# The interval of 1, 2, 3 is 2 ± 2.48, that of 1.9, 2.0, 2.1 is 2 ± 0.248.
@pytest.mark.parametrize(
    ("values", "bounds", "expected"),
    [
        ((1.9, 2.0, 2.1), {"above": 1.7}, "supported"),
        ((1.9, 2.0, 2.1), {"above": 1.8}, "undecided"),
        ((1.9, 2.0, 2.1), {"above": 2.2}, "undecided"),
        ((1.9, 2.0, 2.1), {"above": 2.3}, "contradicted"),
        ((1.9, 2.0, 2.1), {"below": 2.3}, "supported"),
        ((1.9, 2.0, 2.1), {"below": 2.2}, "undecided"),
        ((1.9, 2.0, 2.1), {"below": 1.8}, "undecided"),
        ((1.9, 2.0, 2.1), {"below": 1.7}, "contradicted"),
        ((1.0, 2.0, 3.0), {"above": 0.0}, "undecided"),
        ((1.9, 2.0, 2.1), {"above": 1.0, "below": 3.0}, "supported"),
        ((1.9, 2.0, 2.1), {"above": 1.8, "below": 3.0}, "undecided"),
        ((1.9, 2.0, 2.1), {"above": 1.0, "below": 2.2}, "undecided"),
        ((1.9, 2.0, 2.1), {"above": 2.3, "below": 3.0}, "contradicted"),
        ((1.9, 2.0, 2.1), {"above": 1.0, "below": 1.7}, "contradicted"),
        # Without a spread the interval is a point; a bound itself is not above or below it.
        ((2.0, 2.0, 2.0), {"above": 1.9999}, "supported"),
        ((2.0, 2.0, 2.0), {"above": 2.0}, "contradicted"),
        ((2.0, 2.0, 2.0), {"below": 2.0}, "contradicted"),
        ((2.0, 2.0), {"above": 1.0, "below": 3.0}, "supported"),
        # One seed is never enough, however clear.
        ((1e9,), {"above": 0.0}, "undecided"),
        ((-1e9,), {"above": 0.0}, "undecided"),
        ((), {"above": 0.0}, "undecided"),
    ],
)
def test_the_verdict_is_by_the_whole_interval(
    values: tuple[float, ...], bounds: dict[str, float], expected: Verdict
) -> None:
    assert check(values, **bounds).verdict == expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({"above": 1.5}, "above 1.5"), ({"below": -1}, "below -1"), ({"above": -1, "below": 1}, "between -1 and 1")],
)
def test_what_is_claimed_is_said(bounds: dict[str, float], expected: str) -> None:
    assert check((), **bounds).claimed == expected


def test_the_number_is_said_with_its_interval() -> None:
    assert str(check((1.9, 2.0, 2.1))) == "2 [1.75, 2.25]"
    assert str(check((1.9,))) == "1.9, one seed"
    assert str(check(())) == "no seed gives a value"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["supported"], "supported"),
        (["supported", "supported"], "supported"),
        (["supported", "undecided"], "undecided"),
        (["undecided"], "undecided"),
        (["supported", "contradicted", "undecided"], "contradicted"),
        (["contradicted"], "contradicted"),
        ([], "undecided"),
    ],
)
def test_a_claim_is_as_good_as_its_parts(parts: list[Verdict], expected: Verdict) -> None:
    assert together(parts) == expected


def test_each_claim_has_a_line_with_the_parts_of_every_experiment() -> None:
    supported, contradicted = check((2.0, 2.0), above=1.0, claim=1), check((2.0, 2.0), above=3.0, claim=1)
    none_of_them = check((2.0, 2.0), above=3.0)
    lines = summary_of_claims({"fig1": [supported, none_of_them], "table1": [contradicted]})
    assert len(lines) == len(CLAIMS) == 12
    assert lines[0] == (
        f"1. {CLAIMS[1]} **Contradicted.** [fig1](fig1.md): a / b 2 [2, 2], claimed above 1: supported; "
        "[table1](table1.md): a / b 2 [2, 2], claimed above 3: contradicted"
    )
    for number, line in enumerate(lines[1:], 2):
        assert line == f"{number}. {CLAIMS[number]} **Undecided.** Not looked at."


@pytest.mark.parametrize("ties", [False, True])
def test_the_correlation_is_that_of_the_ranks(ties: bool) -> None:
    x = RANDOM.normal(size=20)
    y = x + RANDOM.normal(size=20)
    if ties:
        x, y = x.round(), y.round()
    expected = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    assert correlation(x.tolist(), y.tolist()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1.0, 2.0], [2.0, 1.0]), ([1.0] * 4, [1.0, 2.0, 3.0, 4.0]), ([1.0, 2.0, 3.0], [5.0] * 3)]
)
def test_what_has_no_correlation(x: list[float], y: list[float]) -> None:
    assert correlation(x, y) is None
