"""Who trains the runs: processes on this machine, or a cluster through Ray. Each run has a process of its own."""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from fastfisher.paper.plan import NOT_IN_NAME, Run, write_outcome
from fastfisher.training.config import ConfigError, TrainConfig, from_values, to_values
from fastfisher.training.folder import RunFolder

# What a process would import before it trains: the server that it is forked from has it already. An optimiser imports
# torch._dynamo when it is made.
PRELOADED = [
    "fastfisher.paper.workers",
    "fastfisher.training.loop",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch._dynamo",
]

INTERRUPTED = 130


class Job(Protocol):
    """A run under way."""

    def failure(self) -> str | None:
        """Return why the run ended before it was finished, "" if it did not, None while it goes on."""

    def stop(self) -> None:
        """Tell the run to save a checkpoint and end; it need not have ended yet."""

    def wait(self) -> None:
        """Wait until it has ended."""


class Workers(Protocol):
    """Takes runs; starts each in a process of its own."""

    capacity: int

    def start(self, run: Run) -> Job:
        """Start a run, whose folder may hold a part of it."""

    def close(self) -> None:
        """Let go of what is held."""


def train_run(values: dict[str, Any]) -> None:
    """Train the run with these options in this process: begin it, continue it, or do nothing if it is finished.

    A run that diverges is finished: it would do so again.
    """
    # Slow, and not needed by who only plans.
    from fastfisher.training.loop import TrainingDivergedError, train

    config = from_values(values)
    folder = RunFolder(config.out)
    with _alone(folder):
        if (folder.path / "outcome.json").exists():
            return
        if folder.checkpoint.exists():
            config = _as_started(config, folder.read_config())
        else:
            # Cut off before there was anything to continue from.
            shutil.rmtree(folder.path, ignore_errors=True)
        try:
            outcome = train(config)
        except TrainingDivergedError as error:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_outcome(folder, "diverged", str(error))
            return
        if outcome == "interrupted":
            raise KeyboardInterrupt
        write_outcome(folder, "finished")


def _as_started(config: TrainConfig, stored: TrainConfig) -> TrainConfig:
    """Return the options that continue a run: where and how it is computed stays as it was when it was started."""
    same = {name: getattr(stored, name) for name in NOT_IN_NAME if name not in ("out", "resume", "data_dir")}
    return dataclasses.replace(config, resume=True, **same)


@contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Wait until no other process trains the run: one that was cut off may take a moment to end."""
    path = Path(f"{folder.path}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _log(config: TrainConfig) -> Path:
    return Path(f"{config.out}.log")


def _process(values: dict[str, Any]) -> None:
    """Train a run in a new process that writes to its log and ends when its parent does."""
    log = _log(from_values(values))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # Ctrl-C in the terminal reaches a run once, through stop().
        os.setsid()
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
        try:
            train_run(values)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        except ConfigError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


class _LocalJob:
    def __init__(self, process: multiprocessing.process.BaseProcess, log: Path) -> None:
        self.process, self.log = process, log
        self.log_start = log.stat().st_size if log.exists() else 0
        process.start()

    def failure(self) -> str | None:
        code = self.process.exitcode
        if code is None:
            return None
        if code == 0:
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return last_line(self.log, self.log_start) or f"exit code {code}"

    def stop(self) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGINT)

    def wait(self) -> None:
        self.process.join()


def last_line(log: Path, start: int) -> str:
    """Return the last line in the log, behind byte ``start``, that says something; "" where there is no log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").split("\n")]
    return next((line for line in reversed(lines) if line), "")


class LocalWorkers:
    """At most ``jobs`` processes on this machine."""

    def __init__(self, jobs: int) -> None:
        self.capacity = jobs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, run: Run) -> Job:
        """As :meth:`Workers.start`."""
        return _LocalJob(self.context.Process(target=_process, args=(to_values(run.config),)), _log(run.config))

    def close(self) -> None:
        """As :meth:`Workers.close`."""


class _RayJob:
    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def failure(self) -> str | None:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            self.ray.get(self.reference)
        except Exception as error:  # whatever the run raised, or Ray about its worker
            cause = getattr(error, "cause", None) or error
            return str(cause).strip().split("\n")[-1] or type(cause).__name__
        return ""

    def stop(self) -> None:
        self.ray.cancel(self.reference)

    def wait(self) -> None:
        self.ray.wait([self.reference])


class RayWorkers:
    """A Ray cluster: each run takes as many of its CPUs as it has threads, and a GPU if it is to train on one.

    The folder of the runs has to be one that every machine of the cluster sees, under the same path.
    """

    def __init__(self, address: str) -> None:
        """Connect to the cluster at an address, or start one on this machine where that is ``local``.

        Raises:
            ModuleNotFoundError: if Ray is not installed.
        """
        import ray

        self.ray: Any = ray
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
        self.resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        # Ray queues what it has no room for.
        self.capacity = 1 << 16

    def start(self, run: Run) -> Job:
        """As :meth:`Workers.start`."""
        config = run.config
        gpu = config.device.startswith("cuda") or (config.device == "auto" and self.resources.get("GPU", 0) > 0)
        options = {"num_cpus": max(1, config.threads), "num_gpus": 1 if gpu else 0, "max_retries": 0, "max_calls": 1}
        return _RayJob(self.ray, self.ray.remote(**options)(train_run).remote(to_values(config)))

    def close(self) -> None:
        """Disconnect, and end a cluster started here."""
        self.ray.shutdown()
