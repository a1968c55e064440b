"""What a kill -9, a full disk or a stranger may leave in a run's folder: the run resumes with the same result, or says
by name which file is damaged and what to do."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastfisher.cli import main
from fastfisher.training import loop
from fastfisher.training.config import ConfigError, TrainConfig, to_values
from fastfisher.training.folder import RunFolder, replacing
from fastfisher.training.replicas import Replicas
from tests.training.runs import assert_same_state, interrupt_at, metrics

STEPS = 3  # in an epoch of 192 examples in batches of 64


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that was not interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = TrainConfig(
        out=str(tmp_path_factory.mktemp("runs") / "whole"), epochs=2, batch_size=64, examples=192, image_size=8,
        method="FP", penalty_every=2, measure="trace_fisher", measure_every="2steps", trace_samples=8, device="cpu",
        save_predictions=True,
    )  # fmt: skip
    assert loop.train(config) == "finished"
    torch.set_num_threads(threads)
    return config


@pytest.fixture
def stopped(finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The same run, stopped in its second epoch, to be resumed."""
    config = dataclasses.replace(finished, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as context:
        interrupt_at(STEPS + 2, context)
        assert loop.train(config) == "interrupted"
    return dataclasses.replace(config, resume=True)


def same_result(config: TrainConfig, finished: TrainConfig) -> bool:
    """Whether a run ended as the one that was not interrupted did; anything else fails."""
    assert metrics(config) == metrics(finished)
    assert_same_state(RunFolder(config.out).load_checkpoint(), RunFolder(finished.out).load_checkpoint())
    return True


def resumes(config: TrainConfig, finished: TrainConfig, file: Path) -> bool:
    """Whether the run resumes to the same result; if not, the error has to name the file and the remedy."""
    try:
        assert loop.train(config) == "finished"
    except ConfigError as error:
        assert str(file) in str(error) and "restore it from a copy" in str(error)
        return False
    return same_result(config, finished)


class Restored:
    """A folder that is put back before each try."""

    def __init__(self, config: TrainConfig, tmp_path: Path) -> None:
        self.path, self.copy = Path(config.out), tmp_path / "copy"
        shutil.copytree(self.path, self.copy)

    def put_back(self) -> None:
        shutil.rmtree(self.path)
        shutil.copytree(self.copy, self.path)


def test_metrics_cut_at_every_byte(
    stopped: TrainConfig, finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, restored = RunFolder(stopped.out), Restored(stopped, tmp_path)
    whole = folder.metrics.read_bytes()
    needed = len(whole.splitlines(keepends=True))
    assert needed == 3  # of steps 2 and 3, and of step 4, after which it was stopped at step 5
    later = whole + b'{"step": 6, "epoch": 2, "loss": 1.5}\n'
    for cut in range(len(later)):
        folder.metrics.write_bytes(later[:cut])
        if cut < len(whole):
            with pytest.raises(ConfigError, match=r"expected at least 3 whole lines, found [0-2]; restore it") as error:
                folder.check_metrics(needed)
            assert str(folder.metrics) in str(error.value)
            assert folder.metrics.read_bytes() == later[:cut]
        else:
            folder.check_metrics(needed)
            folder.truncate_metrics(5)
            assert folder.metrics.read_bytes() == whole
    for cut in (0, len(whole) - 1, len(whole), len(whole) + 9):
        restored.put_back()
        folder.metrics.write_bytes(later[:cut])
        assert resumes(stopped, finished, folder.metrics) == (cut >= len(whole))


def test_a_finished_run_that_lost_metrics_says_so(finished: TrainConfig, tmp_path: Path) -> None:
    out = shutil.copytree(finished.out, tmp_path / "finished")
    config = dataclasses.replace(finished, out=str(out), resume=True)
    assert loop.train(config) == "already finished"
    folder = RunFolder(out)
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: expected at least 4 whole lines, found 3"):
        loop.train(config)


def test_a_damaged_line_of_metrics_is_named(stopped: TrainConfig) -> None:
    folder = RunFolder(stopped.out)
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    for damaged in (b"\xff{}\n", b"[1, 2]\n", b'{"loss": 1}\n', b'{"step": 1\n', b"\n"):
        folder.metrics.write_bytes(lines[0] + damaged + b"".join(lines[2:]))
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is damaged; restore it from a copy"):
            loop.train(stopped)


def places(length: int, count: int) -> list[int]:
    """Some positions in a file, the first and last ones among them."""
    chosen = random.Random(0).sample(range(length), count)
    return sorted({0, 1, 2, 3, length // 2, *range(length - 25, length), *chosen})


def test_a_cut_checkpoint_is_named(stopped: TrainConfig, finished: TrainConfig, tmp_path: Path) -> None:
    folder = RunFolder(stopped.out)
    whole = folder.checkpoint.read_bytes()
    for cut in places(len(whole), 60):
        folder.checkpoint.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"checkpoint\.pt: damaged .*; restore it from a copy, or delete it"):
            folder.load_checkpoint()
        assert folder.epochs_saved() in (0, 1)
    assert not resumes(stopped, finished, folder.checkpoint)
    folder.checkpoint.unlink()  # what the message advises
    assert resumes(stopped, finished, folder.checkpoint)


def test_a_bit_flipped_in_a_checkpoint_is_harmless_or_named(stopped: TrainConfig, finished: TrainConfig) -> None:
    folder = RunFolder(stopped.out)
    whole = folder.checkpoint.read_bytes()
    state = folder.load_checkpoint()
    named = 0
    for place in places(len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        folder.checkpoint.write_bytes(flipped)
        try:
            assert_same_state(folder.load_checkpoint(), state)
        except ConfigError as error:
            assert str(folder.checkpoint) in str(error)
            named += 1
    assert named > 100


def test_a_cut_config_is_named(stopped: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(stopped.out)
    whole = folder.config.read_bytes()
    assert whole.endswith(b"}\n")
    for cut in range(len(whole) - 1):
        folder.config.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"config\.json: damaged .*; restore it from a copy"):
            folder.read_config()
    expected = json.loads(whole)
    folder.config.write_bytes(whole[:-1])
    assert to_values(folder.read_config()) == expected
    folder.config.write_bytes(whole[:50])
    assert main(["train", "--resume", "--out", stopped.out]) == 2
    assert "config.json: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected an object, got list"),
        ({"lr": "0.1"}, "--lr: got '0.1', expected float"),
        ({"lr": True}, "--lr: got True, expected float"),
        ({"seed": 1.5}, "--seed: got 1.5, expected int"),
        ({"resume": 1}, "--resume: got 1, expected bool"),
        ({"lr_milestones": ["x"]}, "--lr-milestones: got"),
        ({"network": {"__class__": "os.system"}}, "--network: got"),
        ({"__reduce__": "os.system"}, "unknown option"),
    ],
)
def test_a_config_of_a_stranger_is_refused_by_name(values: Any, message: str, stopped: TrainConfig) -> None:
    folder = RunFolder(stopped.out)
    folder.config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: ") as error:
        loop.train(stopped)
    assert message in str(error.value)


def test_a_config_leads_to_no_other_folder(stopped: TrainConfig, tmp_path: Path) -> None:
    folder = RunFolder(stopped.out)
    values = json.loads(folder.config.read_text())
    folder.config.write_text(json.dumps({**values, "out": str(tmp_path / "elsewhere")}))
    assert main(["train", "--resume", "--out", stopped.out]) == 0
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ('{"seeds": 2, "together": 1}', "config is missing"),
        ('{"seeds": "2", "together": 1, "config": {}}', "two integers"),
        ('{"seeds": 2, "together": 1, "config": {"lr": null}}', "--lr: got None"),
    ],
)
def test_damaged_replicas_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "replicas.json").write_text(text)
    with pytest.raises(ConfigError, match=r"replicas\.json: ") as error:
        Replicas.read(str(tmp_path))
    assert message in str(error.value)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def by_torch(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    torch.save({"model": bomb, "epoch": 1}, file)
    return file.getvalue()


def by_torch_of_old(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    torch.save({"model": bomb}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def by_torchscript(bomb: Bomb) -> bytes:
    """An archive that names itself a TorchScript module, which torch.load would hand to another reader."""
    file = io.BytesIO(by_torch(bomb))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(bomb))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [by_torch, by_torch_of_old, by_torchscript, pickle.dumps])
def test_a_pickle_in_a_checkpoint_runs_nothing(
    form: Callable[[Bomb], bytes], stopped: TrainConfig, tmp_path: Path
) -> None:
    folder, target = RunFolder(stopped.out), tmp_path / "ran"
    Path(tmp_path / "bomb").write_bytes(form(Bomb(target)))
    shutil.copy(tmp_path / "bomb", folder.checkpoint)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: damaged"):
        loop.train(stopped)
    assert folder.epochs_saved() == 0
    with pytest.raises(ConfigError, match="--start-from"):
        folder.load_weights(torch.nn.Linear(2, 2), stopped.network)
    assert not target.exists()


def test_a_pickle_in_predictions_runs_nothing(stopped: TrainConfig, tmp_path: Path) -> None:
    folder, target = RunFolder(stopped.out), tmp_path / "ran"
    step = next(iter(folder.read_predictions()))
    path = folder.predictions / f"{step}.npy"
    for data in (np.array([Bomb(target)], dtype=object), None):
        if data is None:
            path.write_bytes(pickle.dumps(Bomb(target)))
        else:
            np.save(path, data, allow_pickle=True)
        with pytest.raises(ConfigError, match=rf"{step}\.npy: damaged"):
            folder.read_predictions()
    assert not target.exists()


@pytest.mark.parametrize("change", [lambda s: s.pop("optimizer"), lambda s: s.update(model={}), lambda s: s.clear()])
def test_a_checkpoint_of_something_else_is_named(change: Callable[[dict[str, Any]], Any], stopped: TrainConfig) -> None:
    folder = RunFolder(stopped.out)
    state = folder.load_checkpoint()
    assert state is not None
    change(state)
    folder.save_checkpoint(state)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: not a checkpoint of the run in config\.json"):
        loop.train(stopped)


def test_a_kill_while_a_file_is_written_leaves_the_old_one(stopped: TrainConfig, finished: TrainConfig) -> None:
    """kill -9 runs no cleanup: what was written so far stays, under the name of the temporary file."""
    folder = RunFolder(stopped.out)
    for path in (folder.checkpoint, folder.metrics, folder.config):
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            left = path.with_suffix(".tmp").read_bytes()
            file.seek(0)
            file.write(path.read_bytes())
            file.truncate()
        path.with_suffix(".tmp").write_bytes(left)
    assert resumes(stopped, finished, folder.path)
