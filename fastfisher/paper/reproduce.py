"""``fastfisher reproduce``: any table or figure of the paper, from training to report, by its id."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfisher.paper.cases import Case, Key, Scale
from fastfisher.paper.claims import HOW_TESTED, Check
from fastfisher.paper.estimate import Estimate
from fastfisher.paper.experiment import Experiment, Outcome
from fastfisher.paper.experiments import IDS, THEMES, load
from fastfisher.paper.plan import TUNING_SEED, Place, Plan
from fastfisher.paper.report import DRY, summary_of_claims, write_report
from fastfisher.paper.report import SCALES as SCALE_NOTES
from fastfisher.paper.runner import train_plan, train_run
from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.folder import check_writable, replacing
from fastfisher.training.pool import LocalWorkers, RayWorkers, Workers


@dataclasses.dataclass(frozen=True)
class Request:
    """What to reproduce, and how.

    Attributes:
        experiments: by id.
        seeds: for each run; None for what each experiment asks for.
    """

    experiments: Mapping[str, Experiment]
    scale: Scale
    place: Place
    seeds: int | None = None

    def seeds_of(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the seeds of an experiment's runs."""
        return tuple(range(1 if self.place.dry_run else self.seeds or experiment.seeds))

    def wanted(self, experiment: Experiment) -> list[tuple[Case, int]]:
        """Return the cases of an experiment with each of their seeds."""
        seeds = self.seeds_of(experiment)
        return [(case, seed) for case in experiment.cases(self.scale).values() for seed in seeds]

    def plan(self, *experiments: Experiment) -> Plan:
        """Return the runs of some experiments, or of all."""
        chosen = experiments or tuple(self.experiments.values())
        return Plan([each for experiment in chosen for each in self.wanted(experiment)], self.place)


def main(given: Mapping[str, Any]) -> int:
    """Run the command with its parsed options and return the exit code, as for ``fastfisher train``."""
    try:
        request = _request(given)
        if given["list"]:
            _list(request)
            return 0
        plan = request.plan()
        # Every option is checked before the first run starts; runs that wait for tuning have the same options.
        for run in plan.ready():
            resolve(dataclasses.replace(run.config, start_from=None))
        workers = _workers(given, request.scale)
    except ConfigError as error:
        print(f"fastfisher reproduce: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    try:
        failures = train_plan(plan, workers)
    except KeyboardInterrupt:
        print("interrupted; continue with the same command")
        return 130
    finally:
        workers.close()
    incomplete = write_reports(request, everything=given["all"])
    for failure in failures:
        print(f"fastfisher reproduce: {failure}", file=sys.stderr)
    for name in incomplete:
        print(f"fastfisher reproduce: {name} has no report: runs are missing", file=sys.stderr)
    done = [name for name in request.experiments if name not in incomplete]
    print(f"{len(done)} of {len(request.experiments)} reports in {request.place.out}, {_time(started)}")
    return 1 if failures or incomplete else 0


def _time(started: float) -> str:
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    return f"{minutes} min {seconds} s"


def _request(given: Mapping[str, Any]) -> Request:
    unknown = [name for name in given["ids"] if name not in THEMES]
    if unknown:
        raise ConfigError(f"ID: got {', '.join(unknown)}, expected some of {', '.join(THEMES)}")
    if given["ids"] and given["all"]:
        raise ConfigError("--all: got it beside ids, expected one of the two")
    if not (given["ids"] or given["all"] or given["list"]):
        raise ConfigError("ID: got none, expected some, or --all, or --list to see them")
    for name in ("seeds", "jobs"):
        if given[name] is not None and given[name] < 1:
            raise ConfigError(f"--{name}: got {given[name]}, expected an integer, at least 1")
    if given["seeds"] is not None and given["seeds"] > TUNING_SEED:
        raise ConfigError(f"--seeds: got {given['seeds']}, expected at most {TUNING_SEED}: the next is for tuning")
    scale: Scale = given["scale"]
    if scale == "paper" and "demo" in given["ids"]:
        raise ConfigError("--scale: got paper beside demo, expected digits: the paper has no such runs")
    if scale == "paper" and not given["list"] and not Path(given["data"]).is_dir():
        raise ConfigError(f"--data: got {given['data']!r}, expected an existing folder with the data sets")
    names = list(dict.fromkeys(given["ids"])) or IDS
    place = Place(
        out=Path(given["out"] or f"runs/{scale}"),
        data_dir=given["data"],
        device=given["device"] or ("cpu" if scale == "digits" else "auto"),
        # One thread each at digits: a step is too small for two, and the numbers do not depend on the machine.
        threads=1 if scale == "digits" else max(1, (os.cpu_count() or 1) // (given["jobs"] or 1)),
        dry_run=given["dry_run"],
    )
    if not given["list"]:
        check_writable(place.out)
    return Request({name: load(name) for name in names}, scale, place, given["seeds"])


def _workers(given: Mapping[str, Any], scale: Scale) -> Workers:
    if given["ray"] is not None:
        try:
            return RayWorkers(given["ray"], train_run)
        except ModuleNotFoundError as error:
            raise ConfigError(f'--ray: {error.name} is not installed: pip install "fastfisher[ray]"') from error
        except (ConnectionError, ValueError) as error:
            got = f"--ray: got {given['ray']!r}, expected the address of a cluster, or local"
            raise ConfigError(f"{got} ({str(error).partition(chr(10))[0]})") from error
    return LocalWorkers(given["jobs"] or ((os.cpu_count() or 1) if scale == "digits" else 1), train_run)


def write_reports(request: Request, *, everything: bool) -> list[str]:
    """Write the reports of the experiments whose runs are all finished, and return the ids of the others.

    With ``everything`` also ``README.md``: the ids, and the twelve claims with a line each.
    """
    incomplete = []
    checks: dict[str, list[Check]] = {}
    for name, experiment in request.experiments.items():
        plan = request.plan(experiment)
        found = read_outcome(request, experiment, plan)
        if found is None:
            incomplete.append(name)
            continue
        out, dry = request.place.out, request.place.dry_run
        checks[name] = write_report(name, experiment, found, plan.tuned_values(), out, dry_run=dry)
    if everything:
        with replacing(request.place.out / "README.md") as file:
            file.write(_index(request, checks).encode())
    return incomplete


def read_outcome(request: Request, experiment: Experiment, plan: Plan) -> Outcome | None:
    """Return what the experiment's runs measured, None if one is not finished."""
    seeds = request.seeds_of(experiment)
    runs: dict[Key, dict[int, list[dict[str, Any]]]] = {}
    configs: dict[Key, TrainConfig] = {}
    diverged: dict[Key, tuple[int, ...]] = {}
    folders = {}
    for key, case in experiment.cases(request.scale).items():
        runs[key], diverged[key] = {}, ()
        for seed in seeds:
            run = plan.run(case, seed)
            outcome = None if run is None else plan.outcome(run)
            if run is None or outcome is None:
                return None
            configs.setdefault(key, run.config)
            folders[key, seed] = request.place.folder(run)
            if outcome == "diverged":
                diverged[key] += (seed,)
            else:
                runs[key][seed] = request.place.metrics(run)
    return Outcome(request.scale, seeds, runs, configs, diverged, folders)


def _index(request: Request, checks: Mapping[str, Sequence[Check]]) -> str:
    dry_run = request.place.dry_run
    command = f"fastfisher reproduce --all --scale {request.scale}" + (" --dry-run" if dry_run else "")
    lines = [
        f"# The paper's tables and figures at the scale of {request.scale}",
        "",
        f"Made by `{command}`. {SCALE_NOTES[request.scale]}",
        "",
        *([DRY, ""] if dry_run else []),
        "## The twelve claims",
        "",
        *summary_of_claims(checks),
        "",
        HOW_TESTED,
        "",
        "## Everything",
        "",
        *(f"- [{name}]({name}.md): {request.experiments[name].title}" for name in checks),
    ]
    return "\n".join(lines) + "\n"


def _list(request: Request) -> None:
    estimate = Estimate(request.place.device)
    print(f"{'id':8} {'runs':>5} {'hours':>8}  title")
    for name, experiment in request.experiments.items():
        count, seconds = _cost(request.plan(experiment), estimate)
        print(f"{name:8} {count:5} {seconds / 3600:8.2f}  {experiment.title}")
    count, seconds = _cost(request.plan(), estimate)
    print(f"{'together':8} {count:5} {seconds / 3600:8.2f}  runs that several ids share are trained once")
    print("Hours are of one run after the other on this machine, estimated from a few steps of each network.")


def _cost(plan: Plan, estimate: Estimate) -> tuple[int, float]:
    runs = plan.everything()
    return len(runs), sum(estimate.seconds(run.config) for run in runs)
