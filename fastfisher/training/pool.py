"""Trains many runs, several at once, each in a process of its own: on this machine, or on a cluster through Ray.

Who wants runs trained, ``fastfisher train --seeds`` or ``fastfisher reproduce``, says in a :class:`Queue` which they
are; :class:`LocalWorkers` or :class:`RayWorkers` start them; :func:`train_all` decides when.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fastfisher.training.config import ConfigError, TrainConfig, from_values, to_values
from fastfisher.training.endings import TrainingDivergedError, catch_interrupt, ending_signals

SECONDS_BETWEEN_LOOKS = 0.02
INTERRUPTED = 130

# Imported once, by the server from which the processes are forked. (Making an optimiser imports torch._dynamo.)
PRELOADED = ["fastfisher.training.loop", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]

Train = Callable[[dict[str, Any]], None]
"""Trains the run with these options (see :func:`fastfisher.training.config.to_values`) in the process that calls it.

A function of a module, so that another process can find it. KeyboardInterrupt says that it was told to end.
"""


@dataclass(frozen=True)
class Task:
    """A run to train, whose folder is its own; ``name`` is what messages call it."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Failure:
    """A run that ended before it was finished, as often as it may be started, and why the last time."""

    task: Task
    reason: str

    def __str__(self) -> str:
        """Return ``name failed: why (the log)``."""
        return f"{self.task.name} failed: {self.reason} ({log_of(self.task.config)})"


class Queue(Protocol):
    """The runs that somebody wants trained, as far as they are known."""

    attempts: int
    """How often a run that fails is started."""
    unit: str
    """What the progress bar counts."""

    def total(self) -> int:
        """Return how many units there are."""

    def progress(self, running: Sequence[Task]) -> int:
        """Return how many units are done, of which only those of ``running`` may be new since the last call."""

    def ready(self, at_least: int | None = None) -> Sequence[Task]:
        """Return the runs that can be trained now, or some ``at_least``, in the order in which they are wanted.

        What runs, has failed or was finished by :func:`train_all` may be among them.
        """

    def finished(self, task: Task) -> bool:
        """Return whether nothing is left to do for a run whose process has ended."""

    def describe(self, task: Task) -> str:
        """Return the line to print about a run that has finished; "" for none."""


class Job(Protocol):
    """A run under way."""

    def failure(self) -> str | None:
        """Return why the run ended before it was finished, "" if it did not, None while it goes on."""

    def stop(self) -> None:
        """Tell the run to save a checkpoint and end; it need not have ended yet."""

    def wait(self) -> None:
        """Wait until it has ended."""

    def kill(self) -> None:
        """End the run at once, with the checkpoint that it has."""


class Workers(Protocol):
    """Takes runs; starts each in a process of its own."""

    capacity: int
    """How many runs may be under way."""

    def start(self, task: Task) -> Job:
        """Start a run, whose folder may hold a part of it."""

    def close(self) -> None:
        """Let go of what is held."""


def train_all(queue: Queue, workers: Workers) -> list[Failure]:
    """Train what is not finished, and return the runs that failed; what depends on those is not trained.

    A process that dies loses its own run only.

    Raises:
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once the runs under way have saved a checkpoint; a second
            Ctrl-C ends them where they are.
    """
    # By its folder: runs that differ in their method may have the same name.
    running: dict[str, tuple[Task, Job]] = {}
    starts: Counter[str] = Counter()
    taken: set[str] = set()  # those that run, have finished or have failed
    failures: list[Failure] = []
    ready = queue.ready()
    with (
        catch_interrupt(ending_signals()) as interrupted,
        tqdm(total=queue.total(), initial=queue.progress(ready), unit=queue.unit, disable=None, smoothing=0.05) as bar,
    ):
        try:
            while (waiting := [task for task in ready if task.config.out not in taken]) or running:
                if interrupted():
                    raise KeyboardInterrupt
                for task in waiting[: max(0, workers.capacity - len(running))]:
                    starts[task.config.out] += 1
                    taken.add(task.config.out)
                    running[task.config.out] = task, workers.start(task)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                looked_at = [task for task, _ in running.values()]
                ended = [(task, reason) for task, job in running.values() if (reason := job.failure()) is not None]
                for task, reason in ended:
                    del running[task.config.out]
                    if queue.finished(task):
                        line = queue.describe(task)
                    elif starts[task.config.out] < queue.attempts:
                        taken.remove(task.config.out)
                        line = f"{task.name}: {reason}; once more"
                    else:
                        failures.append(Failure(task, reason))
                        line = str(failures[-1])
                    if line:
                        tqdm.write(line)
                bar.update(queue.progress(looked_at) - bar.n)
                if ended:
                    # Those under way and those that failed may be among what the queue offers.
                    ready = queue.ready(2 * workers.capacity + len(running) + len(failures))
        finally:
            _end([job for _, job in running.values()])
    return failures


def _end(jobs: Sequence[Job]) -> None:
    """Stop the runs, all of them before any is waited for."""
    try:
        for job in jobs:
            job.stop()
        for job in jobs:
            job.wait()
    except BaseException:
        for job in jobs:
            job.kill()
        raise


# ---- on this machine -------------------------------------------------------------------------------------------------


def log_of(config: TrainConfig) -> Path:
    """Return the file that takes what a run on this machine prints, beside its folder."""
    return Path(f"{config.out}.log")


def _process(train: Train, values: dict[str, Any]) -> None:
    """Train a run in a new process that writes to its log and ends when its parent does."""
    log = log_of(from_values(values))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # Line by line: if the run fails, the last line of the log is given as the reason.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        # A session of its own: Ctrl-C in the terminal reaches the run once, through stop().
        os.setsid()
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
        try:
            train(values)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        except (ConfigError, TrainingDivergedError) as error:
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

    def kill(self) -> None:
        self.process.kill()
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
    """At most ``jobs`` processes on this machine, each of which calls ``train``."""

    def __init__(self, jobs: int, train: Train) -> None:
        self.capacity, self.train = jobs, train
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOADED, train.__module__])

    def start(self, task: Task) -> Job:
        """As :meth:`Workers.start`."""
        process = self.context.Process(target=_process, args=(self.train, to_values(task.config)))
        return _LocalJob(process, log_of(task.config))

    def close(self) -> None:
        """As :meth:`Workers.close`."""


# ---- on a cluster ----------------------------------------------------------------------------------------------------


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

    def kill(self) -> None:
        self.ray.cancel(self.reference, force=True)


class RayWorkers:
    """A Ray cluster: each run takes as many of its CPUs as it has threads, and a GPU if it is to train on one.

    The folder of the runs has to be one that every machine of the cluster sees, under the same path.
    """

    def __init__(self, address: str, train: Train) -> None:
        """Connect to the cluster at an address, or start one on this machine where that is ``local``.

        Raises:
            ModuleNotFoundError: if Ray is not installed.
        """
        import ray

        self.ray: Any = ray
        self.train = train
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
        self.resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        # Ray queues what it has no room for.
        self.capacity = 1 << 16

    def start(self, task: Task) -> Job:
        """As :meth:`Workers.start`."""
        config = task.config
        gpu = config.device.startswith("cuda") or (config.device == "auto" and self.resources.get("GPU", 0) > 0)
        options = {"num_cpus": max(1, config.threads), "num_gpus": 1 if gpu else 0, "max_retries": 0, "max_calls": 1}
        return _RayJob(self.ray, self.ray.remote(**options)(self.train).remote(to_values(config)))

    def close(self) -> None:
        """Disconnect, and end a cluster started here."""
        self.ray.shutdown()
