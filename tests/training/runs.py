"""What the tests of whole runs share."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastfisher.training import loop
from fastfisher.training.config import TrainConfig, flag
from fastfisher.training.folder import RunFolder


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    records = RunFolder(config.out).read_metrics()
    return [{name: value for name, value in record.items() if not name.endswith("_seconds")} for record in records]


def assert_same_state(first: Any, second: Any) -> None:
    """Compare two checkpoints bit by bit, but for the seconds."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            if name != "train_seconds":
                assert_same_state(first[name], second[name])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_state(a, b)
    else:
        assert first == second


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Press Ctrl-C while the step with this number (from 1, over the whole run) is taken."""
    original: Callable[[loop.Run], None] = loop.Run.step

    def stepping(run: loop.Run) -> None:
        original(run)
        if run.steps == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Run, "step", stepping)


def command(config: TrainConfig) -> list[str]:
    """Return the command line that trains ``config``."""
    words = [sys.executable, "-m", "fastfisher", "train"]
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if value is True:
            words.append(flag(option.name))
        elif value is not False and value is not None and value != ():
            words += [flag(option.name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words
