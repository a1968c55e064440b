from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fastfisher.cli import main
from fastfisher.paper.cases import Key
from fastfisher.paper.experiment import Outcome
from fastfisher.paper.experiments import IDS, demo, load
from fastfisher.training import replicas
from fastfisher.training.config import TrainConfig
from fastfisher.training.pool import LocalWorkers, Task
from fastfisher.training.summary import Metrics, Summary


def run(test: float, noisy: float, validation: tuple[float, float] = (0.9, 0.8)) -> Metrics:
    """Two epochs: first 95 % on the test examples, and at the end what is asked for."""
    fixed = {"clean_accuracy": 0.97, "train_seconds": 0.5}
    return [
        {
            **fixed,
            "epoch": 1,
            "step": 1,
            "test_accuracy": 0.95,
            "noisy_accuracy": 0.1,
            "trace_fisher": 7.0,
            "validation_accuracy": validation[0],
        },
        {
            **fixed,
            "epoch": 2,
            "step": 2,
            "test_accuracy": test,
            "noisy_accuracy": noisy,
            "trace_fisher": 3.0,
            "validation_accuracy": validation[1],
        },
    ]


def results(baseline: tuple[float, float], penalised: tuple[float, float], seeds: int = 3) -> Outcome:
    """Test and noisy accuracy of each method, 1 point apart between seeds."""
    runs: dict[Key, dict[int, Metrics]] = {
        (method,): {seed: run(test + seed / 100, noisy + seed / 100) for seed in range(seeds)}
        for method, (test, noisy) in zip(demo.METHODS, (baseline, penalised), strict=True)
    }
    return Outcome("digits", tuple(range(seeds)), runs, {})


@pytest.mark.parametrize(
    ("baseline", "penalised", "seeds", "expected"),
    [
        ((0.5, 0.9), (0.8, 0.2), 3, "This supports"),
        ((0.8, 0.9), (0.5, 0.2), 3, "This contradicts"),
        ((0.5, 0.5), (0.8, 0.9), 3, "This contradicts"),
        ((0.5, 0.9), (0.51, 0.9), 3, "neither supports nor contradicts"),
        ((0.5, 0.9), (0.8, 0.9), 3, "neither supports nor contradicts"),
        ((0.5, 0.1), (0.8, 0.05), 3, "memorised too little"),
        ((0.5, 0.9), (0.8, 0.2), 1, "nothing can be concluded"),
    ],
)
def test_the_conclusion_follows_the_numbers(
    baseline: tuple[float, float], penalised: tuple[float, float], seeds: int, expected: str
) -> None:
    assert expected in demo.conclusion(results(baseline, penalised, seeds))


def test_the_conclusion_names_means_and_directions() -> None:
    text = demo.conclusion(results((0.5, 0.9), (0.8, 0.2)))
    assert "raised the final test accuracy (51.0 % without, 81.0 % with it)" in text
    assert "lowered the final accuracy on noisy training examples (91.0 % without, 21.0 % with it)" in text
    assert "made no clear difference to the test accuracy at the best validation epoch" in text
    assert "Over 3 seeds" in text


@pytest.mark.parametrize(("mean", "expected"), [(14.1, 1), (13.9, 0), (6.1, 0), (5.9, -1)])
def test_a_change_counts_beyond_twice_the_larger_spread(mean: float, expected: int) -> None:
    assert demo.change(Summary(10.0, 2.0), Summary(mean, 0.1)) == expected
    assert demo.change(Summary(10.0, 0.1), Summary(mean, 2.0)) == expected


def test_the_best_validation_epoch_decides_early_stopping() -> None:
    assert demo.BEST_TEST.of(run(0.4, 0.9, validation=(0.9, 0.8))) == 95.0
    assert demo.BEST_TEST.of(run(0.4, 0.9, validation=(0.7, 0.8))) == 40.0


def plan(out: Path, **changes: Any) -> list[TrainConfig]:
    options: dict[str, Any] = {"seeds": 2, "epochs": 2, "alpha": 0.3, "penalty_every": 2}
    return demo.plan(out, **{**options, **changes})


def test_the_methods_differ_in_the_penalty_alone(tmp_path: Path) -> None:
    configs = plan(tmp_path)
    assert [(config.method, config.seed) for config in configs] == [
        ("baseline", 0),
        ("baseline", 1),
        ("FP", 0),
        ("FP", 1),
    ]
    neutral = {"out": "", "method": "baseline", "alpha": 0.1, "penalty_every": 10}
    for baseline, penalised in zip(configs[:2], configs[2:], strict=True):
        assert dataclasses.replace(baseline, **neutral) == dataclasses.replace(penalised, **neutral)
        assert (penalised.alpha, penalised.penalty_every) == (0.3, 2)


def test_main_from_start_to_report_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    arguments = ["--out", str(out), "--seeds", "1", "--epochs", "2"]
    assert demo.main(arguments) == 0
    assert (out / "noisy_digits.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    for quantity in demo.QUANTITIES:
        assert f"| {quantity.name} | " in text
    assert "not the paper's setting" in text
    assert demo.HOW_CHOSEN in text
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"baseline-seed0", "FP-seed0"}

    def starting(workers: LocalWorkers, task: Task) -> None:
        raise AssertionError(f"{task.name} is finished")

    monkeypatch.setattr(LocalWorkers, "start", starting)
    assert demo.main(arguments) == 0
    assert demo.main([*arguments, "--alpha", "3"]) == 2
    assert "--alpha 3.0 (was 1.0)" in capsys.readouterr().err


def test_a_bad_option_ends_with_2_before_anything_is_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out), "--alpha", "-1"]) == 2
    assert "--alpha: got -1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main(["--out", str(out), "--seeds", "0"])
    assert "--seeds: got 0, expected an integer, at least 1" in capsys.readouterr().err
    assert not out.exists()


def fails(values: dict[str, Any]) -> None:
    """Stands in for the training of a run, in a process of its own."""
    print("no disk left")
    sys.stdout.flush()
    os._exit(3)


def test_a_failing_run_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "train_seed", fails)
    assert demo.main(["--out", str(tmp_path), "--seeds", "1", "--epochs", "1"]) == 1
    errors = capsys.readouterr().err
    for method in demo.METHODS:
        assert f"{method}, seed 0 failed: no disk left ({tmp_path / method}-seed0.log)" in errors
    assert not (tmp_path / "report.md").exists()


def test_ctrl_c_says_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(configs: list[TrainConfig], together: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_together", interrupted)
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert "interrupted; continue with: python -m fastfisher.paper.experiments.demo" in capsys.readouterr().out


def test_the_demonstration_is_an_experiment_like_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = load("demo").cases("digits")
    configs = plan(tmp_path, seeds=1, epochs=demo.EPOCHS, alpha=demo.ALPHA, penalty_every=demo.PENALTY_EVERY)
    where = {"out": "", "threads": 0, "device": "auto"}
    assert [TrainConfig(**{**dict(case.options), "out": ""}) for case in cases.values()] == [
        dataclasses.replace(config, **where) for config in configs
    ]
    assert main(["reproduce", "demo", "--dry-run", "--out", str(tmp_path)]) == 0
    assert all((tmp_path / f"demo.{ending}").stat().st_size > 0 for ending in ("md", "csv", "png", "svg"))
    assert "Claim 7" in (tmp_path / "demo.md").read_text()
    # It is no figure of the paper: not a part of --all, nor of the paper's scale.
    assert "demo" not in IDS
    capsys.readouterr()
    assert main(["reproduce", "demo", "--scale", "paper", "--out", str(tmp_path)]) == 2
    assert "--scale: got paper beside demo, expected digits" in capsys.readouterr().err


def test_nothing_that_diverged_can_be_drawn(tmp_path: Path) -> None:
    figure = Figure()
    demo.draw(figure, Outcome("digits", (0,), {("baseline",): {}, ("FP",): {}}, {}))
    figure.savefig(tmp_path / "empty.png")
