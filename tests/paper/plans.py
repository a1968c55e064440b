"""What the tests of plans and of those who carry them out share: runs that are finished by saying so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastfisher.paper.cases import Case, case
from fastfisher.paper.plan import Place, Plan, Run
from fastfisher.training.summary import Metrics


@dataclass(frozen=True)
class RememberedPlace(Place):
    """Runs that are nowhere but here: how each ended, and what it measured, by its name."""

    ended: dict[str, tuple[str, Metrics]] = field(default_factory=dict)

    def outcome(self, run: Run) -> str | None:
        return self.ended[run.name][0] if run.name in self.ended else None

    def metrics(self, run: Run) -> Metrics:
        return self.ended[run.name][1]

    def finish(self, run: Run, accuracy: float = 0.5) -> None:
        self.ended[run.name] = "finished", [epoch(accuracy)]


def epoch(validation: float | None, test: float = 0.5) -> dict[str, Any]:
    return {"epoch": 1, "step": 1, "validation_accuracy": validation, "test_accuracy": test}


def digits(**options: Any) -> Case:
    return case({"data": "digits", "network": "small_cnn", "image_size": 8}, **options)


def drive(plan: Plan, finish: Callable[[Run], None], at_least: int | None = None) -> list[Run]:
    """Finish what is ready until nothing is, and return the runs in that order."""
    trained = []
    while ready := plan.ready(at_least):
        for run in ready:
            finish(run)
        trained += ready
    return trained
