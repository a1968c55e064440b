from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastfisher.cli import main
from fastfisher.paper import reproduce
from fastfisher.paper.cases import Case, tuned
from fastfisher.paper.experiment import MAX_TRACE, TEST_ACCURACY, Experiment
from fastfisher.paper.plan import Place, Plan, Run
from fastfisher.paper.runner import train_plan, train_run
from fastfisher.training import loop, pool
from fastfisher.training.config import TrainConfig, to_values
from fastfisher.training.folder import RunFolder
from fastfisher.training.pool import Job, LocalWorkers
from tests.paper import commands
from tests.paper.plans import RememberedPlace, digits
from tests.training.runs import assert_same_state, interrupt_at, metrics

# ---- workers that only pretend ---------------------------------------------------------------------------------------


class FakeJob:
    def __init__(self, looks: int, reason: str, end: Callable[[], None]) -> None:
        self.looks, self.reason, self.end = looks, reason, end
        self.stopped = False

    def failure(self) -> str | None:
        self.looks -= 1
        if self.looks > 0:
            return None
        self.end()
        return self.reason

    def stop(self) -> None:
        self.stopped = True

    def wait(self) -> None:
        assert self.stopped


class FakeWorkers:
    """Runs end after as many looks as ``looks`` says; those that ``fails`` says do so without being finished."""

    def __init__(
        self,
        place: RememberedPlace,
        capacity: int = 2,
        fails: Callable[[Run, int], str | None] = lambda run, attempt: None,
        looks: Callable[[Run], int] = lambda run: 1,
    ) -> None:
        self.place, self.capacity, self.fails, self.looks = place, capacity, fails, looks
        self.started: list[Run] = []
        self.running: set[str] = set()
        self.most = 0

    def start(self, run: Run) -> Job:
        assert run.name not in self.running
        self.started.append(run)
        self.running.add(run.name)
        self.most = max(self.most, len(self.running))
        reason = self.fails(run, sum(each.name == run.name for each in self.started))

        def end() -> None:
            self.running.remove(run.name)
            if reason is None:
                self.place.finish(run)

        return FakeJob(self.looks(run), reason or "", end)

    def close(self) -> None:
        raise AssertionError("whoever made them closes them")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> RememberedPlace:
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0)
    return RememberedPlace(Path("/out"))


def rates(*values: float) -> list[tuple[Case, int]]:
    return [(digits(lr=lr), 0) for lr in values]


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_never_more_than_there_is_room_for_and_no_less(capacity: int, place: RememberedPlace) -> None:
    lengths = iter([5, 1, 7, 2, 2, 9, 1, 1, 3, 4])
    workers = FakeWorkers(place, capacity, looks=lambda run: next(lengths))
    wanted = rates(*(0.1 * number for number in range(1, 11)))
    assert train_plan(Plan(wanted, place), workers) == []
    assert workers.most == min(capacity, 10)
    # Each once, in the order in which they are wanted.
    assert [run.config.lr for run in workers.started] == [case["lr"] for case, _ in wanted]


def test_a_run_that_fails_once_is_trained_again(place: RememberedPlace, capsys: pytest.CaptureFixture[str]) -> None:
    workers = FakeWorkers(place, fails=lambda run, attempt: "no luck" if attempt == 1 else None)
    assert train_plan(Plan(rates(0.1, 0.2, 0.3), place), workers) == []
    assert sorted(run.config.lr for run in workers.started) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert capsys.readouterr().out.count("no luck; once more") == 3


@pytest.mark.parametrize("capacity", [1, 2])
def test_what_fails_twice_is_reported_and_what_depends_on_it_is_not_trained(
    capacity: int, place: RememberedPlace
) -> None:
    start = digits(lr=0.7)
    wanted = [
        (tuned("lr", (0.1, 0.2, 0.3), digits()), 0),
        (tuned("lr", (0.3, 0.4), digits()), 0),
        (Case(digits(lr=0.8).options, start=start), 0),
        (Case(digits(lr=0.9).options, start=digits(lr=0.6)), 0),
        *rates(0.5),
    ]
    bad = (0.2, 0.7)
    workers = FakeWorkers(place, capacity, fails=lambda run, attempt: "bad luck" if run.config.lr in bad else None)
    failures = train_plan(Plan(wanted, place), workers)
    assert sorted(failure.task.config.lr for failure in failures) == [0.2, 0.7]
    for failure in failures:
        name = failure.task.name
        assert str(failure) == f"{name} failed: bad luck (/out/runs/{name}.log)"
    trained = sorted(run.config.lr for run in workers.started)
    # 0.3 is tuned once for both grids, and is the best of the second.
    assert trained == [0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.9]


def test_a_run_that_ends_without_a_reason_and_without_an_outcome_has_failed(place: RememberedPlace) -> None:
    workers = FakeWorkers(place, fails=lambda run, attempt: "")
    assert len(train_plan(Plan(rates(0.1), place), workers)) == 1
    assert len(workers.started) == 2


def test_what_is_finished_is_not_trained(place: RememberedPlace) -> None:
    plan = Plan(rates(0.1, 0.2), place)
    place.finish(plan.ready()[0])
    workers = FakeWorkers(place)
    assert train_plan(plan, workers) == []
    assert [run.config.lr for run in workers.started] == [0.2]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_what_is_under_way(
    sent: signal.Signals, place: RememberedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    class Endless(FakeWorkers):
        def start(self, run: Run) -> Job:
            jobs.append(job := super().start(run))
            return job

    before = signal.getsignal(sent)
    monkeypatch.setattr(pool.time, "sleep", lambda seconds: signal.raise_signal(sent))
    with pytest.raises(KeyboardInterrupt):
        train_plan(Plan(rates(0.1, 0.2, 0.3), place), Endless(place, looks=lambda run: 10**9))
    assert [job.stopped for job in jobs] == [True, True]
    assert signal.getsignal(sent) == before


# ---- processes -------------------------------------------------------------------------------------------------------


def small(**options: Any) -> Case:
    return digits(examples=64, batch_size=16, trace_samples=8, **options)


def run_of(case: Case, out: Path) -> Run:
    (run,) = Plan([(case, 0)], Place(out, device="cpu", threads=1)).ready()
    return run


def whole(run: Run, out: Path) -> TrainConfig:
    """Train the run in this process, elsewhere and undisturbed."""
    config = dataclasses.replace(run.config, out=str(out / run.name))
    assert loop.train(config) == "finished"
    return config


def assert_same_run(run: Run, undisturbed: TrainConfig) -> None:
    assert metrics(run.config) == metrics(undisturbed)
    first, second = (RunFolder(config.out).load_checkpoint() for config in (run.config, undisturbed))
    assert_same_state(first, second)


class Killing(LocalWorkers):
    """Kills the process of a run once it has saved a checkpoint, as often as it is told to."""

    def __init__(self, jobs: int, victim: str, times: int) -> None:
        super().__init__(jobs, train_run)
        self.victim, self.times = victim, times
        self.started: list[str] = []
        self.killers: list[threading.Thread] = []

    def start(self, run: Run) -> Job:
        self.started.append(run.name)
        job = super().start(run)
        if run.name == self.victim and self.times > 0:
            self.times -= 1
            pid = job.process.pid
            checkpoint = RunFolder(run.config.out).checkpoint
            before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

            def kill() -> None:
                commands.wait_until(
                    lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before, "a new checkpoint"
                )
                os.kill(pid, signal.SIGKILL)

            self.killers.append(threading.Thread(target=kill))
            self.killers[-1].start()
        return job


@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_worker_loses_its_own_run_only(times: int, tmp_path: Path) -> None:
    victim, other = (run_of(small(lr=lr, epochs=epochs), tmp_path) for lr, epochs in ((0.05, 60), (0.1, 20)))
    wanted = [(small(lr=0.05, epochs=60), 0), (small(lr=0.1, epochs=20), 0)]
    place = Place(tmp_path, device="cpu", threads=1)
    workers = Killing(2, victim.name, times)
    failures = train_plan(Plan(wanted, place), workers)
    for killer in workers.killers:
        killer.join()
    assert sorted(workers.started) == sorted([victim.name, victim.name, other.name])
    assert place.outcome(other) == "finished"
    assert_same_run(other, whole(other, tmp_path / "whole"))
    if times == 2:
        assert [str(failure) for failure in failures] == [
            f"{victim.name} failed: killed by SIGKILL ({victim.config.out}.log)"
        ]
        # Started again it goes on.
        assert train_plan(Plan(wanted, place), LocalWorkers(1, train_run)) == []
    else:
        assert failures == []
    assert place.outcome(victim) == "finished"
    assert_same_run(victim, whole(victim, tmp_path / "whole"))


def test_a_run_that_diverges_is_an_outcome_and_no_failure(tmp_path: Path) -> None:
    place = Place(tmp_path, device="cpu", threads=1)
    case = small(lr=1e30, epochs=3)
    assert train_plan(Plan([(case, 0)], place), LocalWorkers(1, train_run)) == []
    run = run_of(small(lr=1e30, epochs=3), tmp_path / "other")
    assert place.outcome(run) == "diverged"
    stored = json.loads((place.folder(run).path / "outcome.json").read_text())
    assert "training diverged in epoch 1" in stored["reason"]
    assert Plan([(case, 0)], place).ready() == []


def test_the_reason_of_a_failure_is_the_last_that_the_run_said(tmp_path: Path) -> None:
    case = digits(examples=5_000)
    (failure,) = train_plan(Plan([(case, 0)], Place(tmp_path, device="cpu", threads=1)), LocalWorkers(1, train_run))
    expected = "--examples: got 5000, expected at most the 1097 training examples"
    assert failure.reason == expected
    assert Path(f"{failure.task.config.out}.log").read_text().splitlines() == [expected] * 2


def test_a_run_that_cannot_even_have_a_log_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder of the runs would be")
    (failure,) = train_plan(Plan([(small(), 0)], Place(tmp_path, device="cpu", threads=1)), LocalWorkers(1, train_run))
    assert failure.reason == "exit code 1"


def test_a_folder_cut_off_before_its_first_checkpoint_is_cleared(tmp_path: Path) -> None:
    for number, files in enumerate((["config.tmp"], ["config.json", "metrics.jsonl"])):
        run = run_of(small(epochs=2), tmp_path / str(number))
        folder = RunFolder(run.config.out)
        folder.path.mkdir(parents=True)
        for name in files:
            (folder.path / name).write_text("cut of")
        train_run(to_values(run.config))
        assert not (folder.path / "config.tmp").exists()
        assert json.loads((folder.path / "outcome.json").read_text())["outcome"] == "finished"
        assert len(metrics(run.config)) == 2


def test_a_run_goes_on_where_and_as_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many threads a run has follows from --jobs, and where its start is from --out: both may be others later."""
    run = run_of(small(epochs=3), tmp_path)
    config = dataclasses.replace(run.config, threads=1)
    with monkeypatch.context() as context:
        interrupt_at(6, context)
        with pytest.raises(KeyboardInterrupt):
            train_run(to_values(config))
    later = dataclasses.replace(config, threads=2, device="auto", start_from="/elsewhere")
    train_run(to_values(later))
    assert_same_run(run, whole(run, tmp_path / "whole"))
    assert RunFolder(config.out).read_config().threads == 1


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[Run, Any]]:
    run = run_of(small(epochs=2), tmp_path)
    Path(run.config.out).parent.mkdir(parents=True)
    with Path(f"{run.config.out}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield run, file


def test_of_two_processes_on_one_run_the_second_waits(locked: tuple[Run, Any], tmp_path: Path) -> None:
    run, held = locked
    workers = LocalWorkers(2, train_run)
    jobs = [workers.start(run), workers.start(run)]
    log = Path(f"{run.config.out}.log")
    commands.wait_until(log.exists, "the start of a run")
    time.sleep(1.0)
    assert [job.failure() for job in jobs] == [None, None]
    assert not Path(run.config.out).exists()
    fcntl.flock(held, fcntl.LOCK_UN)
    for job in jobs:
        job.wait()
    assert [job.failure() for job in jobs] == ["", ""]
    # One of them trained, and the other found nothing left to do.
    assert log.read_text().count("epoch 1/2") == 1
    assert_same_run(run, whole(run, tmp_path / "whole"))


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def slow() -> Case:
    """One epoch of a thousand steps: a checkpoint within it is of an interruption."""
    return digits(batch_size=1, epochs=1, trace_samples=8).but(network="small_vgg11", image_size=16)


TINY = Experiment(
    title="two runs",
    cases=lambda scale: {("a",): slow().but(lr=1e-3), ("b",): slow().but(lr=2e-3)},
    quantities=(TEST_ACCURACY, MAX_TRACE),
    draw=lambda figure, outcome: None,
)


def test_ctrl_c_saves_checkpoints_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "load", lambda name: TINY)
    runs = Plan([(case, 0) for case in TINY.cases("digits").values()], Place(tmp_path, device="cpu", threads=1)).ready()
    folders = [RunFolder(run.config.out) for run in runs]
    command = ["reproduce", "fig1", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path)]
    sleep, deadline = time.sleep, time.monotonic() + commands.PATIENCE

    def pressing(seconds: float) -> None:
        sleep(seconds)
        assert time.monotonic() < deadline
        # Written to while training alone.
        if all(folder.events.exists() for folder in folders):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as context:
        context.setattr(pool.time, "sleep", pressing)
        assert main(command) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted; continue with the same command"
    assert not list(tmp_path.glob("fig1*"))
    for run, folder in zip(runs, folders, strict=True):
        checkpoint = folder.load_checkpoint()
        assert checkpoint is not None
        assert 0 < checkpoint["steps"] < 1097
        assert metrics(run.config) == []

    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"1 of 1 reports in {tmp_path}, ")
    for run in runs:
        assert_same_run(run, whole(run, tmp_path / "whole"))


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def test_when_the_command_is_killed_its_workers_end(tmp_path: Path) -> None:
    process = commands.start("talk2", "--jobs", "2", "--out", tmp_path)
    commands.wait_until(lambda: len(list(tmp_path.glob("runs/*/config.json"))) == 2, "two runs under way")
    workers = commands.descendants(process.pid)
    # Beside them the server that they are forked from, and what watches over shared memory.
    assert len(workers) >= 3
    commands.kill(process)
    commands.wait_until(lambda: not commands.alive(workers), "the end of the workers", seconds=30)
    assert commands.finished(tmp_path) == 0
