import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return resolve(TrainConfig(out=str(tmp_path / "a" / "run")))


def test_a_new_or_empty_folder_is_accepted_and_not_created(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    folder.check(config)
    assert not folder.path.parent.exists()
    folder.path.mkdir(parents=True)
    folder.check(config)
    assert list(folder.path.iterdir()) == []


def test_a_folder_with_a_run_needs_resume(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    folder.create(config)
    with pytest.raises(ConfigError, match="already holds a run: add --resume"):
        folder.check(config)
    folder.check(dataclasses.replace(config, resume=True))


def test_a_folder_with_other_files_is_refused(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        folder.check(config)


def test_a_file_is_refused(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    folder.path.parent.touch()
    with pytest.raises(ConfigError, match="nothing can be written in"):
        folder.check(config)


def test_resume_needs_a_run(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="expected a folder with a run"):
        RunFolder(config.out).check(dataclasses.replace(config, resume=True))


def test_resume_names_the_options_that_differ(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    folder.create(config)
    with pytest.raises(ConfigError) as refused:
        folder.check(dataclasses.replace(config, resume=True, lr=0.5, lr_milestones=(3,), data_dir="elsewhere"))
    assert "--lr 0.5 (was 0.05)" in str(refused.value)
    assert "--lr-milestones (3,) (was ())" in str(refused.value)
    assert "data-dir" not in str(refused.value)


def test_config_survives(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    folder.create(config)
    assert folder.read_config() == config
    assert json.loads(folder.config.read_text())["lr"] == 0.05


def test_metrics_are_appended_and_truncated(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    assert folder.read_metrics() == []
    folder.create(config)
    for step in (10, 15, 20):
        folder.append_metrics({"step": step, "penalty": None})
    folder.metrics.open("a").write('{"step": 25, "pen')  # what a crash may leave
    folder.truncate_metrics(20)
    assert [record["step"] for record in folder.read_metrics()] == [10, 15, 20]
    folder.truncate_metrics(19)
    assert folder.read_metrics() == [{"step": 10, "penalty": None}, {"step": 15, "penalty": None}]


def test_a_failed_save_keeps_the_old_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(config.out)
    folder.create(config)
    assert folder.load_checkpoint() is None
    folder.save_checkpoint({"weights": torch.ones(3), "epoch": 1})

    def failing(state: object, file: object) -> None:
        file.write(b"half a file")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        folder.save_checkpoint({"weights": torch.zeros(3), "epoch": 2})
    state = folder.load_checkpoint()
    assert state is not None
    assert state["epoch"] == 1
    assert torch.equal(state["weights"], torch.ones(3))


def test_predictions_are_read_in_order_of_steps(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(config.out)
    assert folder.read_predictions() == {}
    folder.create(config)
    written = {step: np.full((3, 2), step, np.float16) for step in (100, 9, 10)}
    for step, probabilities in written.items():
        folder.save_predictions(step, probabilities)

    def failing(file: object, array: object) -> None:
        file.write(b"half a file")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", failing)
    for step in (9, 11):
        with pytest.raises(OSError, match="disk full"):
            folder.save_predictions(step, written[9])
    found = folder.read_predictions()
    assert list(found) == [9, 10, 100]
    for step, probabilities in found.items():
        assert probabilities.dtype == np.float16
        assert np.array_equal(probabilities, written[step])


def test_epochs_are_counted_without_reading_much(config: TrainConfig) -> None:
    folder = RunFolder(config.out)
    assert (folder.epochs_measured(), folder.epochs_saved()) == (0, 0)
    folder.create(config)
    for record in ({"step": 5, "trace_fisher": 1.0}, {"step": 10, "epoch": 1}, {"step": 20, "epoch": 2}):
        folder.append_metrics(record)
    folder.save_checkpoint({"weights": torch.ones(3), "epoch": 1})
    assert (folder.epochs_measured(), folder.epochs_saved()) == (2, 1)
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:100])
    assert folder.epochs_saved() == 0
