"""The examples run to their end, with small settings."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.usefixtures("torchvision", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("lightning_callback.py", monkeypatch, capsys, "--steps", "20", "--out", str(tmp_path))
    assert "Tr(F) over the training is in" in out
    (table,) = tmp_path.rglob("metrics.csv")
    assert len(table.read_text().splitlines()) >= 3


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("transformers_trainer.py", monkeypatch, capsys, "--steps", "4", "--out", str(tmp_path))
    assert "Tr(F) per position = " in out


def test_char_gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    out = run("char_gpt.py", monkeypatch, capsys, "--steps", "3", "--length", "8")
    assert "loss and Tr(F) at α = 0, 0.1" in out
    assert (tmp_path / "char_gpt.png").stat().st_size > 10_000
