"""Many seeds of one configuration, several at once: ``fastfisher train --seeds N --together K``.

Each replica is the run that ``fastfisher train`` makes of its seed alone, in a process of its own: whatever trains
alone trains here, with the same bits for the same number of threads, and what ends one leaves the others. Stacking
the parameters of all replicas (``torch.func.vmap``) was measured and is slower on the CPU, see docs/many_seeds.md;
neither has been measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastfisher.training.config import (
    AT_LEAST_ONE,
    ConfigError,
    TrainConfig,
    flag,
    from_values,
    resolve,
    to_values,
)
from fastfisher.training.folder import REMEDY, RunFolder, read_json_object, refuse_other_options, replacing
from fastfisher.training.loop import Run, catch_interrupt, describe
from fastfisher.training.measurements import BELOW, TITLES

Metrics = list[dict[str, Any]]

ACCURACY_TITLES = {
    "clean_accuracy": "train clean",
    "noisy_accuracy": "noisy",
    "validation_accuracy": "validation",
    "test_accuracy": "test",
}
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Replicas:
    """Runs of one configuration that differ in ``--seed`` alone, each in a folder ``seed-<seed>`` of ``config.out``.

    ``config.seed`` is the seed of the first; the others have the numbers that follow. The label noise has the seed of
    each run, or ``config.noise_seed`` in all of them. At most ``together`` runs train at the same time.

    ``config.out`` also holds ``replicas.json``, which says all this, ``summary.json``, see :func:`summarise`, and what
    each run printed, ``seed-<seed>.log``.
    """

    config: TrainConfig
    seeds: int
    together: int = 1

    def configs(self) -> list[TrainConfig]:
        """Return each run's configuration; one whose folder holds a run continues it."""
        out = Path(self.config.out)
        return [
            dataclasses.replace(
                self.config,
                out=str(folder := out / f"seed-{seed}"),
                seed=seed,
                resume=RunFolder(folder).config.exists(),
            )
            for seed in range(self.config.seed, self.config.seed + self.seeds)
        ]

    def resolved(self) -> Replicas:
        """Check every option and share out the CPU's threads among the runs at once, unless their number is given.

        Touches nothing on disk.

        Raises:
            ConfigError: naming the option, its value and what was expected.
        """
        for name, value in (("seeds", self.seeds), ("together", self.together)):
            if not AT_LEAST_ONE.holds(value):
                raise ConfigError(f"{flag(name)}: got {value}, expected {AT_LEAST_ONE.expected}")
        config = resolve(self.config)
        resolve(dataclasses.replace(config, seed=config.seed + self.seeds - 1))
        threads = config.threads or max(1, torch.get_num_threads() // min(self.together, self.seeds))
        # Resolved, the seed of the noise would be that of the first run in all of them.
        config = dataclasses.replace(config, noise_seed=self.config.noise_seed, threads=threads)
        return dataclasses.replace(self, config=config)

    def check(self) -> None:
        """Check that ``config.out`` can take new runs, or that those in it are the ones to resume.

        Raises:
            ConfigError: as :meth:`RunFolder.check` does.
        """
        out = self.config.out
        if self.config.resume:
            if not _file(out).exists():
                raise ConfigError(f"--resume: got --out {out!r}, expected a folder with runs that --seeds started")
            refuse_other_options(self.config, Replicas.read(out).config, f"what --seeds started in {out}")
        elif _file(out).exists():
            raise ConfigError(
                f"--out: got {out!r}, which already holds runs of several seeds: add --resume to continue them, "
                "or name another folder"
            )
        else:
            RunFolder(out).check(self.config)

    @staticmethod
    def read(out: str) -> Replicas:
        """Return what :meth:`write` wrote to the folder.

        Raises:
            ConfigError: if ``replicas.json`` is damaged.
        """
        path = _file(out)
        try:
            values = read_json_object(path)
            config, seeds, together = values["config"], values["seeds"], values["together"]
            if not (isinstance(config, dict) and type(seeds) is int and type(together) is int):
                raise ConfigError(f"damaged (expected an object and two integers); {REMEDY}")
            return Replicas(from_values(config), seeds=seeds, together=together)
        except KeyError as error:
            raise ConfigError(f"{path}: damaged ({error.args[0]} is missing); {REMEDY}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def write(self) -> None:
        """Write ``replicas.json``."""
        values = {"seeds": self.seeds, "together": self.together, "config": to_values(self.config)}
        _write_json(_file(self.config.out), values)


def _file(out: str) -> Path:
    return Path(out) / "replicas.json"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def asked_for(given: Mapping[str, Any]) -> Replicas | None:
    """Return the replicas that the options given ask for, or None if they ask for a single run.

    With ``resume``, what is not given is as it was when the runs were started; ``seeds`` may grow, or shrink to the
    first few.

    Raises:
        ConfigError: naming the option, its value and what was expected.
    """
    options = {name: value for name, value in given.items() if name not in ("seeds", "together")}
    config = from_values(options)
    counts = {name: given[name] for name in ("seeds", "together") if name in given}
    if config.resume and _file(config.out).exists():
        stored = Replicas.read(config.out)
        config = from_values({**to_values(stored.config), **options})
        return dataclasses.replace(stored, config=config, **counts).resolved()
    if "seeds" in counts:
        return Replicas(config, **counts).resolved()
    if "together" in counts:
        raise ConfigError(f"--together: got {counts['together']}, expected --seeds beside it")
    return None


@dataclass(frozen=True)
class Failure:
    """A run that ended before it was finished, and why."""

    config: TrainConfig
    reason: str

    def __str__(self) -> str:
        """Return ``seed 3 failed: why (the log)``."""
        return f"seed {self.config.seed} failed: {self.reason} ({_log(self.config)})"


def train_replicas(replicas: Replicas) -> tuple[dict[str, Any], list[Failure]]:
    """Run or resume ``replicas`` (resolved) and return :func:`summarise` of them all, and which of them failed.

    Those that are finished are skipped, and where one fails the others go on. Everything is checked, the data read and
    the network built once before anything is created. Sets PyTorch's global seed.

    Raises:
        ConfigError: for an option that cannot be used; nothing has been written.
        KeyboardInterrupt: after Ctrl-C, once every run under way has saved a checkpoint.
    """
    replicas.check()
    configs = replicas.configs()
    if not all(map(finished, configs)):
        # On the CPU, where it takes none of the memory that the runs will need.
        Run(resolve(dataclasses.replace(configs[0], device="cpu")))
    replicas.write()
    failures = train_together(configs, replicas.together)
    summary = summarise(configs, failures)
    _write_json(Path(replicas.config.out) / "summary.json", summary)
    return summary, failures


def finished(config: TrainConfig) -> bool:
    """Return whether the run in ``config.out`` has its last checkpoint."""
    return RunFolder(config.out).epochs_saved() >= config.epochs


def command(config: TrainConfig) -> list[str]:
    """Return the command line that trains ``config``."""
    words = [sys.executable, "-m", "fastfisher", "train"]
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        # Defaults are named too: a run that is resumed would take what is left out from its folder.
        if value is True:
            words.append(flag(option.name))
        elif value is not False and value is not None and value != ():
            words += [flag(option.name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def _log(config: TrainConfig) -> Path:
    return Path(f"{config.out}.log")


class Process:
    """One run in a process of its own, which writes to a log beside the run's folder."""

    def __init__(self, config: TrainConfig) -> None:
        """Start the training of ``config``."""
        self.config = config
        log = _log(config)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.log_start = file.tell()
            # In a session of its own, so that Ctrl-C in the terminal reaches it once, through stop().
            # Unbuffered: what it says last is its reason, should it fail.
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(
                command(config), stdout=file, stderr=file, start_new_session=True, env=environment
            )

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self.process.poll() is not None

    def failure(self) -> Failure | None:
        """Return why the ended run failed: what ended it, or the last that it printed; None if it did not fail."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return Failure(self.config, f"killed by {signal.Signals(-code).name}")
        with _log(self.config).open("rb") as file:
            file.seek(self.log_start)
            printed = file.read().decode(errors="replace").split("\n")
        lines = [line.strip() for line in printed if line.strip()]
        return Failure(self.config, lines[-1].removeprefix("fastfisher train: ") if lines else f"exit code {code}")

    def stop(self) -> None:
        """Tell the run to save a checkpoint and end."""
        if not self.ended():
            self.process.send_signal(signal.SIGINT)


def ending_signals() -> list[int]:
    """Return the signals on which runs that have sessions of their own are to be ended too: all but for nohup's."""
    return [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]


def train_together(configs: Sequence[TrainConfig], together: int) -> list[Failure]:
    """Train what is not finished yet, ``together`` runs at a time, and return those that failed.

    One bar shows the epochs of all. Whatever ends this early, the runs under way are told to save a checkpoint first;
    a second Ctrl-C ends them where they are, with the checkpoints they have.

    Raises:
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once every run under way has ended.
    """
    measured = {config.out: RunFolder(config.out).epochs_measured() for config in configs}
    waiting = [config for config in configs if not finished(config)]
    running: list[Process] = []
    failures: list[Failure] = []
    with (
        catch_interrupt(ending_signals()) as interrupted,
        tqdm(
            total=sum(config.epochs for config in configs), initial=sum(measured.values()), unit="epoch", disable=None
        ) as bar,
    ):
        try:
            while (waiting or running) and not interrupted():
                while waiting and len(running) < together:
                    running.append(Process(waiting.pop(0)))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                ended = [run for run in running if run.ended()]
                for run in running:
                    measured[run.config.out] = RunFolder(run.config.out).epochs_measured()
                bar.update(sum(measured.values()) - bar.n)
                for run in ended:
                    running.remove(run)
                    failure = run.failure()
                    if failure is None:
                        last = RunFolder(run.config.out).read_metrics()[-1]
                        tqdm.write(f"{run.config.out}: {describe(last, run.config.epochs)}")
                    else:
                        failures.append(failure)
                        tqdm.write(str(failure))
        finally:
            _end(running)
        if interrupted() and (waiting or running):
            raise KeyboardInterrupt
    return sorted(failures, key=lambda failure: configs.index(failure.config))


def _end(running: Sequence[Process]) -> None:
    """Stop the runs, all of them before any is waited for."""
    for run in running:
        run.stop()
    try:
        for run in running:
            run.process.wait()
    finally:
        for run in running:
            if not run.ended():
                run.process.kill()
                run.process.wait()


@dataclass(frozen=True)
class Summary:
    """A quantity: mean and sample standard deviation over seeds, None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise a value for each seed."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        """Return ``mean ± std``."""
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


def final(run: Metrics, name: str) -> Any:
    """Return the last that ``run`` says about ``name``, None if it says nothing."""
    return next((record[name] for record in reversed(run) if name in record), None)


def summarise(configs: Sequence[TrainConfig], failures: Sequence[Failure]) -> dict[str, Any]:
    """Return what the finished runs ended with, ready for JSON.

    ``final`` has the accuracies, all that ``--measure`` names and Tr(F) at ``--trace-thresholds``, each as ``mean``,
    ``standard_deviation`` (the sample's; None for a single seed) and ``by_seed``; ``seeds`` are those of the finished
    runs, ``failed`` says of each other seed why it failed. What a run does not have, such as noisy examples, is left
    out.
    """
    runs = {config.seed: RunFolder(config.out).read_metrics() for config in configs if finished(config)}
    quantities = {}
    at_thresholds = (f"{BELOW}{threshold}" for threshold in configs[0].trace_thresholds)
    for name in (*ACCURACY_TITLES, "noisy_true_accuracy", *TITLES, *at_thresholds):
        by_seed = {seed: value for seed, run in runs.items() if (value := final(run, name)) is not None}
        if by_seed:
            over_seeds = Summary.of(list(by_seed.values()))
            quantities[name] = {
                "mean": over_seeds.mean,
                "standard_deviation": over_seeds.std,
                "by_seed": {str(seed): value for seed, value in by_seed.items()},
            }
    return {
        "seeds": list(runs),
        "failed": {str(failure.config.seed): failure.reason for failure in failures},
        "final": quantities,
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Return the line that is printed about a summary."""

    def title(name: str) -> str:
        mean, std = summary["final"][name]["mean"], summary["final"][name]["standard_deviation"]
        if name in ACCURACY_TITLES:
            return f"{ACCURACY_TITLES[name]} {100 * mean:.1f}" + (" %" if std is None else f" ± {100 * std:.1f} %")
        return f"{TITLES[name]} {mean:.3g}" + ("" if std is None else f" ± {std:.3g}")

    count = len(summary["seeds"])
    if count == 0:
        return "no run has finished"
    named = [title(name) for name in (*ACCURACY_TITLES, *TITLES) if name in summary["final"]]
    return ("1 seed" if count == 1 else f"mean ± standard deviation over {count} seeds") + ": " + "  ".join(named)
