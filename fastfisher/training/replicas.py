"""Many seeds of one configuration, several at once: ``fastfisher train --seeds N --together K``.

Each replica is the run that ``fastfisher train`` makes of its seed alone, in a process of its own: whatever trains
alone trains here, with the same bits for the same number of threads, and what ends one leaves the others. Stacking
the parameters of all replicas (``torch.func.vmap``) was measured and is slower on the CPU, see docs/many_seeds.md;
neither has been measured on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastfisher.training.config import ConfigError, TrainConfig, flag, from_values, resolve, to_values
from fastfisher.training.endings import how_to_continue
from fastfisher.training.folder import REMEDY, RunFolder, read_json_object, refuse_other_options, write_json
from fastfisher.training.loop import Run, train
from fastfisher.training.measurements import describe
from fastfisher.training.pool import Failure, LocalWorkers, Task, train_all
from fastfisher.training.rules import AT_LEAST_ONE
from fastfisher.training.summary import summarise


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
        # As it was given: resolve() would give every run the noise of the first.
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
        Path(self.config.out).mkdir(parents=True, exist_ok=True)
        write_json(_file(self.config.out), values)


def _file(out: str) -> Path:
    return Path(out) / "replicas.json"


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
    if not all(RunFolder(each.out).finished(each) for each in configs):
        # Built once to find errors; on the CPU, so that it takes no GPU memory from the runs.
        Run(resolve(dataclasses.replace(configs[0], device="cpu")))
    replicas.write()
    failures = train_together(configs, replicas.together)
    summary = summarise(configs, {failure.task.config.seed: failure.reason for failure in failures})
    write_json(Path(replicas.config.out) / "summary.json", summary)
    return summary, failures


def train_seed(values: dict[str, Any]) -> None:
    """Train one replica in this process, and print what ``fastfisher train`` does."""
    config = from_values(values)
    outcome = train(config)
    if outcome == "interrupted":
        print(how_to_continue(config.out))
        raise KeyboardInterrupt
    print(f"{outcome}: {config.out}")


class _Replicas:
    """Replicas as the pool sees them. The bar counts their epochs; a replica that fails is not started again."""

    attempts = 1
    unit = "epoch"

    def __init__(self, configs: Sequence[TrainConfig]) -> None:
        self.configs = configs
        self.measured = {config.out: RunFolder(config.out).epochs_measured() for config in configs}
        self.waiting = [Task(f"seed {each.seed}", each) for each in configs if not RunFolder(each.out).finished(each)]

    def total(self) -> int:
        return sum(config.epochs for config in self.configs)

    def progress(self, running: Sequence[Task]) -> int:
        for task in running:
            self.measured[task.config.out] = RunFolder(task.config.out).epochs_measured()
        return sum(self.measured.values())

    def ready(self, at_least: int | None = None) -> Sequence[Task]:
        return self.waiting

    def finished(self, task: Task) -> bool:
        return RunFolder(task.config.out).finished(task.config)

    def describe(self, task: Task) -> str:
        last = RunFolder(task.config.out).read_metrics()[-1]
        return f"{task.config.out}: {describe(last, task.config.epochs)}"


def train_together(configs: Sequence[TrainConfig], together: int) -> list[Failure]:
    """Train what is not finished yet, ``together`` runs at a time, and return those that failed, in their order.

    See :func:`fastfisher.training.pool.train_all`.
    """
    failures = train_all(_Replicas(configs), LocalWorkers(together, train_seed))
    return sorted(failures, key=lambda failure: configs.index(failure.task.config))
