from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastfisher.info
from fastfisher.cli import main

TINY = ["--image-size", "8", "--batch-size", "512", "--trace-samples", "4", "--threads", "1", "--device", "cpu"]


def test_info_prints_the_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out == fastfisher.info.describe() + "\n"


def test_train_resume_and_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "--out", out, "--epochs", "2", *TINY]) == 0
    text = capsys.readouterr().out
    assert "epoch 1/2" in text
    assert "epoch 2/2" in text
    assert text.endswith(f"finished: {out}\n")

    assert main(["train", "--out", out, "--epochs", "2", *TINY]) == 2
    assert "already holds a run: add --resume" in capsys.readouterr().err
    # Options that are not repeated are read from the run; those that are have to agree.
    assert main(["train", "--out", out, "--resume"]) == 0
    assert capsys.readouterr().out == f"already finished: {out}\n"
    assert main(["train", "--out", out, "--resume", "--lr", "0.5"]) == 2
    assert "--lr 0.5 (was 0.05)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "-1"], "--lr: got -1.0, expected a finite number above 0"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "--data-dir: got '/nowhere', expected an existing folder"),
        (["--resume"], "expected a folder with a run"),
    ],
)
def test_bad_options_end_with_2(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


def test_divergence_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--lr", "1e20", *TINY]) == 1
    assert "diverged in epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["tqdm", "tensorboard", "sklearn"])
def test_a_missing_extra_is_one_line(missing: str, tmp_path: Path) -> None:
    # Under a name of its own the module is found nowhere, as on a machine without the extra.
    script = f"import sys; sys.modules[{missing!r}] = None; from fastfisher.cli import main; sys.exit(main())"
    out = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", script, "train", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert 'pip install "fastfisher[train]"' in ended.stderr
    assert missing in ended.stderr
    assert not out.exists()


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastfisher", "train", "--out", str(out), "--epochs", "100000", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = printed.splitlines()[-1]
    assert last == f"interrupted; continue with: fastfisher train --resume --out '{out}'"
