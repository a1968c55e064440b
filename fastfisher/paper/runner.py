"""Trains the runs of a plan: what the pool asks about them, and how one is begun, continued and marked as finished."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastfisher.paper.plan import NOT_IN_NAME, Plan, Run, write_outcome
from fastfisher.training.config import TrainConfig, from_values
from fastfisher.training.endings import TrainingDivergedError
from fastfisher.training.folder import RunFolder
from fastfisher.training.pool import Failure, Task, Workers, train_all


def train_plan(plan: Plan, workers: Workers) -> list[Failure]:
    """Train what of a plan is not finished, each run twice if need be; see :func:`fastfisher.training.pool.train_all`.

    One bar counts the runs, those for tuning too.
    """
    return train_all(_PlannedRuns(plan), workers)


class _PlannedRuns:
    attempts = 2
    unit = "run"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._done: int | None = None

    def total(self) -> int:
        return self.plan.count()

    def progress(self, running: Sequence[Task]) -> int:
        if self._done is None:
            self._done = self.plan.count_finished()
        return self._done

    def ready(self, at_least: int | None = None) -> Sequence[Run]:
        return self.plan.ready(at_least)

    def finished(self, task: Task) -> bool:
        assert isinstance(task, Run)
        # Counting looks at the disk once for each run that is not finished: only where one has ended.
        self._done = None
        return self.plan.outcome(task) is not None

    def describe(self, task: Task) -> str:
        return ""


def train_run(values: dict[str, Any]) -> None:
    """Train the run with these options in this process: begin it, continue it, or do nothing if it is finished.

    A run that diverges is finished: it would do so again.
    """
    # Here, because it takes seconds and planning does without it.
    from fastfisher.training.loop import train

    config = from_values(values)
    folder = RunFolder(config.out)
    with _alone(folder):
        if (folder.path / "outcome.json").exists():
            return
        if folder.checkpoint.exists():
            config = _as_started(config, folder.read_config())
        else:
            # It was cut off before its first checkpoint: there is nothing to continue from.
            shutil.rmtree(folder.path, ignore_errors=True)
        try:
            outcome = train(config)
        except TrainingDivergedError as error:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_outcome(folder, "diverged", str(error))
            return
        if outcome == "interrupted":
            raise KeyboardInterrupt
        write_outcome(folder, "finished")


def _as_started(config: TrainConfig, stored: TrainConfig) -> TrainConfig:
    """Return the options that continue a run: where and how it is computed stays as it was when it was started."""
    same = {name: getattr(stored, name) for name in NOT_IN_NAME if name not in ("out", "resume", "data_dir")}
    return dataclasses.replace(config, resume=True, **same)


@contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Wait until no other process trains the run: one that was cut off may take a moment to end."""
    path = Path(f"{folder.path}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
