"""What figures 4 and 10 share: the cases of four columns of table 1, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Callable

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import rows_of
from fastfisher.paper.experiment import MAX_TRACE, Outcome
from fastfisher.paper.settings import Setting, table_1

COLUMNS = ("η*", "baseline", "GP_x", "FP")


def cases_of(*settings: Setting) -> Callable[[Scale], dict[Key, Case]]:
    """Return the cases of some settings."""

    def cases(scale: Scale) -> dict[Key, Case]:
        return {(s.name, column): table_1(s, scale)[column] for s in settings for column in COLUMNS}

    return cases


def checks(outcome: Outcome) -> list[Check]:
    """Claims 1 and 4: the peaks."""

    def ratio(first: str, second: str) -> tuple[float, ...]:
        return outcome.ratios([((row, first), (row, second)) for row in rows_of(outcome)], MAX_TRACE)

    number = "maximum of Tr(F), {} / {}"
    return [
        Check(
            "the small learning rate has the higher peak",
            number.format("baseline", "η*"),
            ratio("baseline", "η*"),
            above=1,
            claim=1,
        ),
        Check(
            "FP lowers the peak of Tr(F)", number.format("FP", "baseline"), ratio("FP", "baseline"), below=1, claim=4
        ),
    ]
