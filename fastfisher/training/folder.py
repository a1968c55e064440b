"""What a run leaves on disk: its options, a line per epoch and measurement, and the checkpoint it continues from."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfisher.training.config import ConfigError, TrainConfig, differences, flag, from_values, to_values

REMEDY = "restore it from a copy, or begin the run anew in another folder"
RECORDS = "metrics_lines"
"""The checkpoint's entry for the number of lines of ``metrics.jsonl``."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file that holds an object.

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigError: if it is damaged.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"damaged ({error}); {REMEDY}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"damaged (expected an object, got {type(values).__name__}); {REMEDY}")
    return values


class RunFolder:
    """The output folder of one run.

    ``config.json``, ``metrics.jsonl``, ``checkpoint.pt``, ``events/``; ``predictions/`` with ``--save-predictions``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the folder; nothing is created or read."""
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.events = self.path / "events"
        self.predictions = self.path / "predictions"

    def check(self, config: TrainConfig) -> None:
        """Check that the folder can take a new run, or that the run in it is the one to resume.

        Raises:
            ConfigError: if the folder holds a run and ``config.resume`` is off, holds none or one with other
                options and it is on, or cannot be written.
        """
        if config.resume:
            refuse_other_options(config, self.read_config(), f"the run in {self.path}")
        elif self.config.exists():
            raise ConfigError(
                f"--out: got {str(self.path)!r}, which already holds a run: add --resume to continue it, "
                "or name another folder"
            )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(f"--out: got {str(self.path)!r}, expected a new or empty folder")
        check_writable(self.path)

    def read_config(self) -> TrainConfig:
        """Return the options the run was started with.

        Raises:
            ConfigError: if the folder holds no run, or ``config.json`` is damaged.
        """
        try:
            return from_values(read_json_object(self.config))
        except FileNotFoundError:
            raise ConfigError(f"--resume: got --out {str(self.path)!r}, expected a folder with a run") from None
        except ConfigError as error:
            raise ConfigError(f"{self.config}: {error}") from error

    def create(self, config: TrainConfig) -> None:
        """Create the folder and write ``config.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, to_values(config))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl`` and wait until it is on disk."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return what was measured so far: a dictionary for each step that ended an epoch or had a measurement.

        The first have an ``epoch`` (see ``Run.finish_epoch``), the second what ``--measure`` names. A last line without
        its end, as a crash may leave one, does not count.

        Raises:
            ConfigError: if a line before the last is damaged.
        """
        return [record for _, record in self._metrics_lines()]

    def _metrics_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the whole lines of ``metrics.jsonl``, each with what it says."""
        if not self.metrics.exists():
            return []
        lines = [line for line in self.metrics.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ConfigError(f"{self.metrics}: line {number} is damaged; {REMEDY}")
            found.append((line, record))
        return found

    def epochs_measured(self) -> int:
        """Return how many epochs ``metrics.jsonl`` has: how far a run got, whether or not its checkpoint is written."""
        return self.metrics.read_bytes().count(b'"epoch": ') if self.metrics.exists() else 0

    def truncate_metrics(self, steps: int) -> None:
        """Keep the lines about the first ``steps`` steps: what came after the checkpoint will be written again.

        Raises:
            ConfigError: if a line is damaged; nothing has been written.
        """
        if self.metrics.exists():
            kept = [line for line, record in self._metrics_lines() if record["step"] <= steps]
            with replacing(self.metrics) as file:
                file.write(b"".join(kept))

    def save_predictions(self, step: int, probabilities: NDArray[np.float16]) -> None:
        """Write the test examples' probabilities ``[N, classes]`` after so many steps to ``predictions/<step>.npy``."""
        self.predictions.mkdir(exist_ok=True)
        with replacing(self.predictions / f"{step}.npy") as file:
            np.save(file, probabilities)

    def read_predictions(self) -> dict[int, NDArray[np.float16]]:
        """Return what ``--save-predictions`` wrote: probabilities ``[N, classes]`` by step, in order of steps.

        Raises:
            ConfigError: if a file is damaged.
        """
        found = {}
        for step in sorted(int(path.stem) for path in self.predictions.glob("*.npy")):
            path = self.predictions / f"{step}.npy"
            try:
                found[step] = np.load(path, allow_pickle=False)
            except Exception as error:  # whatever a damaged file raises
                raise ConfigError(f"{path}: damaged ({error}); {REMEDY}") from error
        return found

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write ``checkpoint.pt``; whatever happens meanwhile, the old or the new one is there, whole.

        It also says how many lines ``metrics.jsonl`` has by now.
        """
        with replacing(self.checkpoint) as file:
            torch.save({**state, RECORDS: len(self._metrics_lines())}, file)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return what was saved, on the CPU, or None if the run stopped before its first checkpoint.

        Tensors and plain values alone are read: a file that would run code is refused.

        Raises:
            ConfigError: if ``checkpoint.pt`` is damaged, or ``metrics.jsonl`` has lost lines since it was written.
        """
        if not self.checkpoint.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:  # PyTorch does not look at the checksums itself
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            records = int(state.pop(RECORDS, 0))  # checkpoints made before there was this count do not have it
        except Exception as error:  # whatever a damaged file raises
            raise ConfigError(
                f"{self.checkpoint}: damaged ({str(error).splitlines()[0]}); restore it from a copy, or delete it "
                "to begin this run anew"
            ) from error
        self.check_metrics(records)
        return state

    def check_metrics(self, lines: int) -> None:
        """Check that ``metrics.jsonl`` has at least so many whole lines.

        Raises:
            ConfigError: if it has not, or one is damaged.
        """
        found = len(self._metrics_lines())
        if found < lines:
            raise ConfigError(f"{self.metrics}: expected at least {lines} whole lines, found {found}; {REMEDY}")

    def load_weights(self, model: nn.Module, network: str) -> None:
        """Give ``model``, a ``network``, the parameters and buffers of the checkpoint: what ``--start-from`` does.

        Raises:
            ConfigError: if there is no checkpoint, it cannot be read, or it is of another network or has other shapes;
                the model is then as it was.
        """
        got = f"--start-from: got {str(self.path)!r}"
        if not (self.config.exists() and self.checkpoint.exists()):
            raise ConfigError(f"{got}, expected the folder of a run that has a checkpoint")
        try:
            trained = self.read_config().network
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            weights: dict[str, Tensor] = state["model"]
            found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        except Exception as error:  # whatever damaged files raise
            raise ConfigError(f"{got}, whose run cannot be read: {error}") from error
        if trained != network:
            raise ConfigError(f"{got}, a run of {trained}, expected one of --network {network}")
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in expected | found:
            if found.get(name) != expected.get(name):
                raise ConfigError(
                    f"{got}, whose {network} has {name} of shape {found.get(name)}, expected {expected.get(name)}, as "
                    "--data and --image-size make it"
                )
        model.load_state_dict(weights)

    def finished(self, config: TrainConfig) -> bool:
        """Return whether the run with these options has its last checkpoint."""
        return self.epochs_saved() >= config.epochs

    def epochs_saved(self) -> int:
        """Return how many epochs the checkpoint is about, reading none of its tensors; 0 if it cannot be read."""
        if not self.checkpoint.exists():
            return 0
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            return int(state["epoch"])
        except Exception:  # whatever a damaged file raises; the run that continues from it says what
            return 0


def check_writable(out: Path) -> None:
    """Check that a folder can be written to, or made.

    Raises:
        ConfigError: naming what is in the way.
    """
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"--out: got {str(out)!r}, but nothing can be written in {existing}")


def refuse_other_options(config: TrainConfig, stored: TrainConfig, where: str) -> None:
    """Check that a run to resume has the options it was started with.

    Raises:
        ConfigError: naming those that decide what is computed and differ; ``where`` says what was to be resumed.
    """
    differing = differences(config, stored)
    if differing:
        details = ", ".join(f"{flag(name)} {getattr(config, name)} (was {getattr(stored, name)})" for name in differing)
        raise ConfigError(f"--resume: {where} has other options: {details}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that holds an object, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """Open a temporary file, with another suffix, that takes the place of ``path`` once it is whole and on disk."""
    temporary = path.with_suffix(suffix)
    with temporary.open("wb") as file:
        try:
            yield file
        except BaseException:
            temporary.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
