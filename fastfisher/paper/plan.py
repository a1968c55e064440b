"""From cases to runs: stable names, the order that tuning asks for, and what of it is finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfisher.paper.cases import Case, Tuned
from fastfisher.training.config import NORMALISED_NETWORKS, TrainConfig
from fastfisher.training.folder import RunFolder, replacing
from fastfisher.training.pool import Task
from fastfisher.training.summary import Metrics

TUNING_SEED = 1000
"""The seed of the runs that tune an option; no report is about it."""

REPEAT = 10_000
"""How far apart the seeds of two repeats are."""

# Options that decide how and where a run is computed, not what it computes.
NOT_IN_NAME = ("out", "resume", "data_dir", "download", "device", "threads", "graphs", "start_from")

DRY_BATCH = 4
DRY_STEPS = 2


@dataclass(frozen=True)
class Run(Task):
    """One training run; its name follows from all the options that decide what is computed."""

    start: Run | None = None


@dataclass(frozen=True)
class Place:
    """Where runs are, and what is said once for all of them."""

    out: Path
    data_dir: str = "data"
    device: str = "auto"
    threads: int = 1
    dry_run: bool = False

    def folder(self, run: Run) -> RunFolder:
        """Return the run's folder."""
        return RunFolder(self.out / "runs" / run.name)

    def outcome(self, run: Run) -> str | None:
        """Return "finished", "diverged", or None where the run is neither."""
        path = _outcome_file(self.folder(run))
        return str(json.loads(path.read_text())["outcome"]) if path.exists() else None

    def metrics(self, run: Run) -> Metrics:
        """Return what a finished or diverged run measured, a record for each epoch and measurement."""
        return self.folder(run).read_metrics()


def _outcome_file(folder: RunFolder) -> Path:
    return folder.path / "outcome.json"


def write_outcome(folder: RunFolder, outcome: str, reason: str = "") -> None:
    """Say in the folder that nothing is left to do, and how it ended."""
    with replacing(_outcome_file(folder)) as file:
        file.write((json.dumps({"outcome": outcome, "reason": reason}) + "\n").encode())


class Plan:
    """The runs that cases need, as far as they are known: an option that is tuned is not, before its grid is finished.

    A case and a seed are planned once, whoever asks for them, and so are two that have the same options.
    """

    def __init__(self, wanted: Iterable[tuple[Case, int]], place: Place) -> None:
        """Plan each of ``wanted``, cases with their seeds."""
        self.place = place
        self.wanted = list(dict.fromkeys(wanted))
        self._open = list(self.wanted)
        self._finished: dict[str, str] = {}
        self._runs: dict[tuple[Case, int], Run] = {}
        self._values: dict[Tuned, float] = {}

    def count(self) -> int:
        """Return how many runs there are in all. Fewer, should a tuned run turn out to be one that is there anyway."""
        return len(self.everything())

    def _all(self) -> Iterator[tuple[Case, int]]:
        """Every case and seed, with those for tuning and those to start from; some more than once."""
        waiting = list(self.wanted)
        while waiting:
            case, seed = waiting.pop()
            yield case, seed
            waiting += [(each, seed) for each in (case.start,) if each is not None]
            for _, value in case.options:
                if isinstance(value, Tuned):
                    waiting += [(each, TUNING_SEED) for each in self._grid(value)]

    def everything(self) -> list[Run]:
        """Return all runs, with the first value of its grid for what is not tuned yet: to see what they will cost."""
        found = {}
        for case, seed in dict.fromkeys(self._all()):
            identity, config = self._expected(case, seed)
            found[identity] = Run("", config)
        return list(found.values())

    def _expected(self, case: Case, seed: int) -> tuple[Hashable, TrainConfig]:
        """Return what will be computed, as far as is known, and the options with a guess for what is not."""
        options = dict(case.options)
        unknown = []
        for name, value in case.options:
            if isinstance(value, Tuned):
                options[name] = self._values.get(value, value.factor * value.values[0])
                # A dry run has no other value to choose.
                if not (value in self._values or self.place.dry_run):
                    unknown.append((name, value))
        config = TrainConfig(**options, seed=seed + REPEAT * case.repeat)
        config = shortened(config) if self.place.dry_run else config
        start = None if case.start is None else self._expected(case.start, seed)[0]
        return (config, tuple(unknown), start), config

    def _grid(self, tuned: Tuned) -> list[Case]:
        values = tuned.values[:1] if self.place.dry_run else tuned.values
        return [tuned.case.but(**{tuned.option: value}) for value in values]

    def outcome(self, run: Run) -> str | None:
        """As :meth:`Place.outcome`, which is asked no more once the run has one.

        What starts from a run that diverged has diverged too: the weights it would get are of some epoch before.
        """
        if run.name not in self._finished:
            lost = run.start is not None and self.outcome(run.start) == "diverged"
            if outcome := "diverged" if lost else self.place.outcome(run):
                self._finished[run.name] = outcome
        return self._finished.get(run.name)

    def count_finished(self) -> int:
        """Return how many of them are known to be finished."""
        return len({run.name for run in self._runs.values() if self.outcome(run) is not None})

    def ready(self, at_least: int | None = None) -> list[Run]:
        """Return the runs that can be trained now, each once, in the order in which they are wanted.

        All of them, or, if there are more, some ``at_least``.
        """
        found: dict[str, Run] = {}
        still_open = []
        for index, (case, seed) in enumerate(self._open):
            if at_least is not None and len(found) >= at_least:
                still_open += self._open[index:]
                break
            run = self.run(case, seed, found)
            if run is None or self.outcome(run) is None:
                still_open.append((case, seed))
        self._open = still_open
        return list(found.values())

    def run(self, case: Case, seed: int, missing: dict[str, Run] | None = None) -> Run | None:
        """Return the run of a case, None as long as something that it depends on is not finished.

        What is to be trained for it next, itself or others, is added to ``missing``.
        """
        missing = {} if missing is None else missing
        run = self._runs.get((case, seed)) or self._make(case, seed, missing)
        if run is not None:
            self._runs[case, seed] = run
            if self.outcome(run) is None:
                missing.setdefault(run.name, run)
        return run

    def _make(self, case: Case, seed: int, missing: dict[str, Run]) -> Run | None:
        options = dict(case.options)
        known = True
        for name, value in case.options:
            if isinstance(value, Tuned):
                best = self.best(value, missing)
                known = known and best is not None
                options[name] = best
        start = None
        if case.start is not None:
            start = self.run(case.start, seed, missing)
            known = known and start is not None and self.outcome(start) is not None
        if not known:
            return None
        seed += REPEAT * case.repeat
        config = TrainConfig(
            **options,
            seed=seed,
            data_dir=self.place.data_dir,
            device=self.place.device,
            threads=self.place.threads,
            start_from=None if start is None else str(self.place.folder(start).path),
        )
        config = shortened(config) if self.place.dry_run else config
        name = run_name(config, start)
        return Run(name, dataclasses.replace(config, out=str(self.place.out / "runs" / name)), start)

    def best(self, tuned: Tuned, missing: dict[str, Run] | None = None) -> float | None:
        """Return the tuned value, None as long as a run of its grid is not finished."""
        missing = {} if missing is None else missing
        if tuned not in self._values:
            runs = [self.run(case, TUNING_SEED, missing) for case in self._grid(tuned)]
            done = [run for run in runs if run is not None and self.outcome(run) is not None]
            if len(done) < len(runs):
                return None
            accuracies = [self._accuracy(run, tuned) for run in done]
            best = tuned.values[accuracies.index(max(accuracies))]
            # Four digits: the rounding errors of the product would be printed, and be a part of names of runs.
            self._values[tuned] = float(f"{tuned.factor * best:.4g}")
        return self._values[tuned]

    def _accuracy(self, run: Run, tuned: Tuned) -> float:
        if self.outcome(run) == "diverged":
            return -1.0
        return judged(self.place.metrics(run), tuned.judged)

    def tuned_values(self) -> dict[Tuned, float]:
        """Return every tuned option whose value is known."""
        return dict(self._values)


def judged(metrics: Metrics, by: str) -> float:
    """Return the accuracy that tuning looks at; see :class:`Tuned`."""
    epochs = [record for record in metrics if "epoch" in record]
    name = "test_accuracy" if epochs[-1]["validation_accuracy"] is None else "validation_accuracy"
    tested = [record[name] for record in epochs if record[name] is not None]
    return float(tested[-1] if by == "final" else max(tested))


def run_name(config: TrainConfig, start: Run | None) -> str:
    """Return a name that is the same wherever and whenever the same thing is computed."""
    values = dataclasses.asdict(config)
    identity: dict[str, Any] = {name: value for name, value in values.items() if name not in NOT_IN_NAME}
    identity["start"] = None if start is None else start.name
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{config.data}-{config.network}-{config.method}-seed{config.seed}-{digest}"


def shortened(config: TrainConfig) -> TrainConfig:
    """Return the run with the same network, data and method, and two steps of four examples.

    What counts epochs is cut to the one there is, and what is measured to those eight examples.
    """
    changes: dict[str, Any] = {
        "examples": DRY_BATCH * DRY_STEPS,
        "evaluate": (DRY_STEPS,) * 2,
        "batch_size": DRY_BATCH,
        "epochs": 1,
        "penalty_start": 0,
        "trace_samples": DRY_BATCH * DRY_STEPS if config.measure != "none" else config.trace_samples,
    }
    if config.penalty_examples is not None:
        changes["penalty_examples"] = min(config.penalty_examples, DRY_BATCH // 2)
    if config.measure != "none":
        changes["measure_every"] = "1epoch"
    if config.network in NORMALISED_NETWORKS:
        # A hundred batches for the statistics would take fifty times as long as the steps.
        changes["bn_batches"] = min(config.bn_batches, DRY_STEPS)
    return dataclasses.replace(config, **changes)
