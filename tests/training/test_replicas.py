from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfisher.cli import main
from fastfisher.training import loop, pool, replicas
from fastfisher.training.arguments import add_arguments
from fastfisher.training.config import ConfigError, TrainConfig, from_values, resolve, to_values
from fastfisher.training.endings import TrainingDivergedError
from fastfisher.training.folder import RunFolder
from fastfisher.training.pool import Failure, LocalWorkers, Task, Train
from fastfisher.training.replicas import Replicas
from fastfisher.training.summary import Summary, describe_summary, summarise
from tests.training.runs import assert_same_state, command, interrupt_at, metrics

STEPS = 4  # in an epoch of 1,097 examples in batches of 256
SEED = 5


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "runs"),
        epochs=2,
        batch_size=256,
        image_size=8,
        label_noise=0.5,
        method="FP",
        penalty_every=3,
        trace_samples=8,
        seed=SEED,
        threads=1,
        device="cpu",
    )


def words(config: TrainConfig) -> list[str]:
    return command(config)[3:]


def single(config: TrainConfig, seed: int) -> TrainConfig:
    """Train one seed alone, in this process, in a folder apart."""
    alone = dataclasses.replace(config, seed=seed, out=f"{config.out}-single-{seed}")
    assert loop.train(alone) == "finished"
    return alone


def assert_same_run(out: Path, alone: TrainConfig) -> None:
    run = dataclasses.replace(alone, out=str(out))
    assert metrics(run) == metrics(alone)
    assert len(metrics(run)) == alone.epochs
    assert_same_state(RunFolder(out).load_checkpoint(), RunFolder(alone.out).load_checkpoint())
    expected = dataclasses.replace(RunFolder(alone.out).read_config(), out=str(out))
    assert dataclasses.replace(RunFolder(out).read_config(), resume=False) == expected


def test_each_replica_has_the_bits_of_its_single_run(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(config.out)
    assert main([*words(config), "--seeds", "2", "--together", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for seed in (SEED, SEED + 1):
        assert_same_run(out / f"seed-{seed}", single(config, seed))
        assert f"finished: {out}/seed-{seed}" in (out / f"seed-{seed}.log").read_text()
        assert any(line.startswith(f"{out}/seed-{seed}: epoch 2/2") for line in printed)

    assert len(printed) == 3
    assert printed[-1].startswith("mean ± standard deviation over 2 seeds: train clean ")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["seeds"], summary["failed"]) == ([SEED, SEED + 1], {})
    for name in ("test_accuracy", "noisy_accuracy", "trace_fisher"):
        a, b = (RunFolder(out / f"seed-{seed}").read_metrics()[-1][name] for seed in (SEED, SEED + 1))
        assert summary["final"][name]["by_seed"] == {str(SEED): a, str(SEED + 1): b}
        assert summary["final"][name]["mean"] == pytest.approx((a + b) / 2)
        assert summary["final"][name]["standard_deviation"] == pytest.approx(abs(a - b) / 2**0.5)

    def starting(workers: LocalWorkers, task: Task) -> None:
        raise AssertionError(f"{task.name} is finished")

    monkeypatch.setattr(LocalWorkers, "start", starting)
    capsys.readouterr()
    assert main(["train", "--out", config.out, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == printed[-1:]
    assert main([*words(config), "--seeds", "2"]) == 2
    assert "already holds runs of several seeds: add --resume" in capsys.readouterr().err
    assert main(["train", "--out", config.out, "--resume", "--lr", "0.5"]) == 2
    assert "--lr 0.5 (was 0.05)" in capsys.readouterr().err


def test_resume_continues_what_was_cut_off_and_goes_on_past_a_failure(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, cut, damaged, new = range(SEED, SEED + 4)
    started = Replicas(config, seeds=4).resolved()
    started.write()
    configs = {each.seed: each for each in started.configs()}
    folders = {seed: RunFolder(each.out) for seed, each in configs.items()}
    loop.train(configs[done])
    with monkeypatch.context() as context:
        interrupt_at(STEPS + 2, context)
        assert loop.train(configs[cut]) == "interrupted"
    folders[damaged].create(resolve(configs[damaged]))
    folders[damaged].checkpoint.write_bytes(b"not a checkpoint")
    before = {path: path.stat().st_mtime_ns for path in folders[done].path.rglob("*")}
    capsys.readouterr()

    assert main(["train", "--resume", "--out", config.out, "--together", "3"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"fastfisher train: seed {damaged} failed: ")
    assert errors[0].endswith(f"({folders[damaged].path}.log)")
    assert {path: path.stat().st_mtime_ns for path in folders[done].path.rglob("*")} == before
    for seed in (done, cut, new):
        assert_same_run(folders[seed].path, single(config, seed))
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert summary["seeds"] == [done, cut, new]
    assert summary["failed"].keys() == {str(damaged)}
    assert summary["failed"][str(damaged)] in errors[0]


def test_ctrl_c_leaves_checkpoints(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, epochs=100_000)
    folders = [RunFolder(Path(config.out) / f"seed-{seed}") for seed in range(SEED, SEED + 3)]
    sleep, deadline = time.sleep, time.monotonic() + 60

    def pressing(seconds: float) -> None:
        sleep(seconds)
        assert time.monotonic() < deadline
        if all(folder.checkpoint.exists() for folder in folders[:2]):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pool.time, "sleep", pressing)
    assert main([*words(config), "--seeds", "3", "--together", "2"]) == 130
    expected = f"interrupted; continue with: fastfisher train --resume --out {config.out}"
    assert capsys.readouterr().out.splitlines() == [expected]
    for folder in folders[:2]:
        checkpoint = folder.load_checkpoint()
        assert checkpoint is not None
        # What was measured is in the checkpoint: the run ended by saving one, not between two of them.
        assert checkpoint["epoch"] == folder.read_metrics()[-1]["epoch"] > 0
        assert "interrupted; continue with" in Path(f"{folder.path}.log").read_text()
    assert not folders[2].path.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seeds", "0"], "--seeds: got 0, expected an integer, at least 1"),
        (["--seeds", "2", "--together", "0"], "--together: got 0, expected an integer, at least 1"),
        (["--together", "2"], "--together: got 2, expected --seeds beside it"),
        (["--seeds", "2", "--seed", str(2**63 - 1)], f"--seed: got {2**63}, expected an integer from 0"),
        (["--seeds", "2", "--lr", "-1"], "--lr: got -1.0"),
        # Only the data and the network tell.
        (["--seeds", "2", "--batch-size", "5000"], "--batch-size: got 5000, expected at most the 1097"),
        (["--seeds", "2", "--start-from", "/nowhere"], "--start-from: got '/nowhere', expected the folder of a run"),
        (["--seeds", "2", "--resume"], "expected a folder with runs that --seeds started"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_created(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "runs"), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_single_run_is_refused(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(config.out).create(resolve(config))
    assert main([*words(config), "--seeds", "2"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--out", config.out, "--seeds", "2", "--resume"]) == 2
    assert "expected a folder with runs that --seeds started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("threads", "seeds", "together", "expected"),
    [(0, 4, 1, 8), (0, 4, 3, 2), (0, 4, 16, 2), (0, 32, 16, 1), (5, 4, 3, 5)],
)
def test_the_threads_are_shared_out(
    threads: int, seeds: int, together: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    resolved = Replicas(TrainConfig(threads=threads), seeds=seeds, together=together).resolved()
    assert [config.threads for config in resolved.configs()] == [expected] * seeds


def test_options_not_given_are_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    out = str(tmp_path)
    given = {"out": out, "lr": 0.5, "lr_milestones": [3, 5], "seed": 7, "seeds": 4, "together": 2}
    started = replicas.asked_for(given)
    assert started is not None
    assert (started.seeds, started.together, started.config.threads) == (4, 2, 4)
    started.write()
    resumed = replicas.asked_for({"out": out, "resume": True})
    assert resumed == dataclasses.replace(started, config=dataclasses.replace(started.config, resume=True))
    resumed.check()
    # More seeds, or another number at once, leave every run as it was, its threads among the rest.
    more = replicas.asked_for({"out": out, "resume": True, "seeds": 6, "together": 8})
    assert more == dataclasses.replace(resumed, seeds=6, together=8)
    more.check()
    other = replicas.asked_for({"out": out, "resume": True, "seed": 8})
    assert other is not None
    with pytest.raises(ConfigError, match=r"--seed 8 \(was 7\)"):
        other.check()


def test_a_single_run_is_asked_for_without_seeds(tmp_path: Path) -> None:
    assert replicas.asked_for({}) is None
    assert replicas.asked_for({"out": str(tmp_path), "resume": True}) is None


@pytest.mark.parametrize(("noise_seed", "expected"), [(None, [7, 8, 9]), (1, [1, 1, 1])])
def test_replicas_differ_in_their_seed_alone(noise_seed: int | None, expected: list[int], tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path), seed=7, noise_seed=noise_seed, label_noise=0.5)
    configs = [resolve(each) for each in Replicas(config, seeds=3).resolved().configs()]
    assert [each.seed for each in configs] == [7, 8, 9]
    assert [each.noise_seed for each in configs] == expected
    assert [Path(each.out).name for each in configs] == ["seed-7", "seed-8", "seed-9"]
    neutral = {"out": "", "seed": 0, "noise_seed": 0}
    assert len({str(to_values(dataclasses.replace(each, **neutral))) for each in configs}) == 1


def test_the_command_line_means_the_same_run() -> None:
    for config in [
        TrainConfig(),
        TrainConfig(resume=True, data_dir="elsewhere"),
        TrainConfig(method="FP", mixed=True, penalty_every=1, lr=0.1 + 0.2, lr_milestones=(3, 5), noise_seed=4),
    ]:
        words = command(config)
        assert words[:4] == [sys.executable, "-m", "fastfisher", "train"]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        assert from_values(vars(parser.parse_args(words[4:]))) == config


# What stands in for the training of a run: it is found by its name in a process of its own.


def is_killed(values: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exits(values: dict[str, Any]) -> None:
    os._exit(3)


def diverges(values: dict[str, Any]) -> None:
    print("epoch 1")
    raise TrainingDivergedError("training diverged")


def fails(values: dict[str, Any]) -> None:
    raise OSError("no disk left")


def until_told(values: dict[str, Any]) -> list[int]:
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    Path(f"{values['out']}.ready").touch()
    for _ in range(6000):  # a minute: nothing is left behind where no signal comes
        if caught:
            break
        time.sleep(0.01)
    return caught


def takes_a_moment_to_end(values: dict[str, Any]) -> None:
    caught = until_told(values)
    time.sleep(0.3)
    Path(f"{values['out']}.caught").write_text(f"{len(caught)} {os.getsid(0)}")
    raise KeyboardInterrupt


def presses_ctrl_c_once_more_and_goes_on(values: dict[str, Any]) -> None:
    until_told(values)
    Path(f"{values['out']}.pid").write_text(str(os.getpid()))
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    os.kill(parent.pid, signal.SIGINT)
    time.sleep(60)


@pytest.mark.parametrize(
    ("stand_in", "expected"),
    [
        (is_killed, "killed by SIGKILL"),
        (exits, "exit code 3"),
        (diverges, "training diverged"),
        (fails, "OSError: no disk left"),
    ],
)
def test_a_failure_says_why(
    stand_in: Train, expected: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, out=str(tmp_path / "seed-5"))
    (tmp_path / "seed-5.log").write_text("of a run before\n")
    monkeypatch.setattr(replicas, "train_seed", stand_in)
    (failure,) = replicas.train_together([config], 1)
    assert failure == Failure(Task("seed 5", config), expected)
    assert str(failure) == f"seed 5 failed: {expected} ({config.out}.log)"
    assert (tmp_path / "seed-5.log").read_text().startswith("of a run before\n")


def test_no_more_than_asked_for_train_at_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    active: set[int] = set()

    class FakeJob:
        def __init__(self, seed: int) -> None:
            self.seed = seed
            self.looks = 0

        def failure(self) -> str | None:
            self.looks += 1
            if self.looks == 2 + self.seed % 3:
                active.remove(self.seed)
                return "on purpose"
            return None

    class Fake:
        def __init__(self, capacity: int, train: Train) -> None:
            self.capacity = capacity

        def start(self, task: Task) -> FakeJob:
            active.add(task.config.seed)
            most.append(len(active))
            return FakeJob(task.config.seed)

    monkeypatch.setattr(replicas, "LocalWorkers", Fake)
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0)
    configs = Replicas(config, seeds=10).configs()
    failures = replicas.train_together(configs, 3)
    # They end in another order than they are reported in.
    assert [failure.task.config for failure in failures] == configs
    assert len(most) == 10
    assert max(most) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_this_process_reaches_each_run_once(
    number: signal.Signals, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replicas, "train_seed", takes_a_moment_to_end)

    def pressing(seconds: float) -> None:
        if len(list(tmp_path.rglob("*.ready"))) == 2:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    monkeypatch.setattr(pool.time, "sleep", pressing)
    with pytest.raises(KeyboardInterrupt):
        replicas.train_together(Replicas(config, seeds=3).configs(), 2)
    counts, sessions = zip(*(path.read_text().split() for path in tmp_path.rglob("*.caught")), strict=True)
    assert counts == ("1", "1")
    # A terminal's Ctrl-C goes to every process of its session: theirs are their own.
    assert str(os.getsid(0)) not in sessions
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_waits_for_nobody(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replicas, "train_seed", presses_ctrl_c_once_more_and_goes_on)

    def pressing(seconds: float) -> None:
        if list(tmp_path.rglob("*.ready")):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pool.time, "sleep", pressing)
    with pytest.raises(KeyboardInterrupt):
        replicas.train_together(Replicas(config, seeds=1).configs(), 1)
    (pid,) = (int(path.read_text()) for path in tmp_path.rglob("*.pid"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def write_run(config: TrainConfig, records: list[dict[str, Any]], *, epochs_saved: int) -> None:
    folder = RunFolder(config.out)
    folder.create(config)
    for record in records:
        folder.append_metrics(record)
    folder.save_checkpoint({"epoch": epochs_saved})


def test_the_summary_is_that_of_the_finished_runs(config: TrainConfig) -> None:
    configs = Replicas(config, seeds=5).configs()
    for each, test, trace in zip(configs[:3], (0.5, 0.7, 0.9), (1.0, 2.0, 6.0), strict=True):
        # Measured in the middle of the last epoch.
        first = {"step": 4, "epoch": 1, "test_accuracy": 0.1, "noisy_accuracy": 0.2, "trace_fisher": 100.0}
        measured = {"step": 6, "trace_fisher": trace}
        last = {"step": 8, "epoch": 2, "test_accuracy": test, "noisy_accuracy": None}
        write_run(each, [first, measured, last], epochs_saved=2)
    # Cut off between the last line and the last checkpoint.
    write_run(configs[3], [{"step": 8, "epoch": 2, "test_accuracy": 0.0}], epochs_saved=1)
    summary = summarise(configs, {9: "no disk left"})
    assert summary == {
        "seeds": [5, 6, 7],
        "failed": {"9": "no disk left"},
        "final": {
            "test_accuracy": {
                "mean": pytest.approx(0.7),
                "standard_deviation": pytest.approx(0.2),
                "by_seed": {"5": 0.5, "6": 0.7, "7": 0.9},
            },
            "trace_fisher": {
                "mean": pytest.approx(3.0),
                "standard_deviation": pytest.approx(7**0.5),
                "by_seed": {"5": 1.0, "6": 2.0, "7": 6.0},
            },
        },
    }
    line = "mean ± standard deviation over 3 seeds: test 70.0 ± 20.0 %  Tr(F) 3 ± 2.65"
    assert describe_summary(summary) == line
    alone = summarise(configs[:1], {})
    assert alone["final"]["test_accuracy"]["standard_deviation"] is None
    assert describe_summary(alone) == "1 seed: test 50.0 %  Tr(F) 1"
    assert describe_summary(summarise(configs[4:], {})) == "no run has finished"


def test_the_summary_has_the_trace_at_each_threshold(config: TrainConfig) -> None:
    config = dataclasses.replace(config, trace_thresholds=(1.5, 0.5))
    configs = Replicas(config, seeds=2).configs()
    for each, trace in zip(configs, (2.0, 4.0), strict=True):
        first = {"step": 4, "epoch": 1, "test_accuracy": 0.5, "trace_fisher_below_1.5": trace}
        write_run(each, [first, {"step": 8, "epoch": 2, "test_accuracy": 0.5}], epochs_saved=2)
    found = summarise(configs, {})["final"]
    assert found.keys() == {"test_accuracy", "trace_fisher_below_1.5"}
    assert found["trace_fisher_below_1.5"]["by_seed"] == {"5": 2.0, "6": 4.0}


def test_summary_is_mean_and_sample_standard_deviation() -> None:
    several = Summary.of([1.0, 3.0])
    assert several == Summary(2.0, pytest.approx(2**0.5))
    assert str(several) == "2.00 ± 1.41"
    assert str(Summary.of([2.0])) == "2.00"
