"""The paper's own networks, formats of data and methods, for two steps each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastfisher.cli import main
from fastfisher.paper import reproduce
from fastfisher.paper.experiments import IDS, load
from fastfisher.paper.plan import Place, Run
from fastfisher.paper.report import DRY, SCALES
from fastfisher.paper.runner import train_run
from fastfisher.training.config import to_values
from fastfisher.training.folder import RunFolder
from fastfisher.training.pool import Job
from tests.conftest import Once, is_nightly
from tests.support.archives import accept_any_cifar, write_cifar, write_imagenet, write_tiny_imagenet


class Done:
    def failure(self) -> str | None:
        return ""

    def stop(self) -> None:
        raise AssertionError("it has ended")

    wait = stop


class InThisProcess:
    """Trains each run when it is started: the data sets are read with this process' idea of torchvision."""

    capacity = 1

    def start(self, run: Run) -> Job:
        train_run(to_values(run.config))
        return Done()

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def archives(once: Once) -> Path:
    def make(folder: Path) -> None:
        # Five thousand examples are held out for validation, and a dry run trains on 16.
        write_cifar(folder, 10, training=5_020)
        write_cifar(folder, 100, training=5_020)
        write_tiny_imagenet(folder)
        write_imagenet(folder, each=6)

    return once("archives", make)


@pytest.fixture(scope="session")
def out(once: Once) -> Path:
    """One folder for all ids: they share runs, each of which has a lock of its own."""
    return once("dry-paper", lambda folder: None)


LONG = () if is_nightly() else ("table3",)
"""Left to the nightly tests: forty runs of the largest networks. At digits' scale it is with the others."""


@pytest.mark.parametrize("name", [name for name in IDS if name not in LONG])
def test_a_dry_run_at_the_papers_scale(
    name: str, archives: Path, out: Path, torchvision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    accept_any_cifar(datasets, monkeypatch)
    monkeypatch.setattr(reproduce, "_workers", lambda given, scale: InThisProcess())
    # With as many jobs as there are cores a run has one thread.
    jobs = str(os.cpu_count())
    command = ["reproduce", name, "--scale", "paper", "--dry-run", "--data", str(archives), "--out", str(out)]
    assert main([*command, "--device", "cpu", "--jobs", jobs]) == 0

    report = (out / f"{name}.md").read_text()
    assert SCALES["paper"] in report
    assert DRY in report
    assert SCALES["digits"] not in report
    for ending in ("csv", "png", "svg"):
        assert (out / f"{name}.{ending}").stat().st_size > 100

    cases = load(name).cases("paper")
    request = reproduce.Request({name: load(name)}, "paper", Place(out, dry_run=True))
    found = reproduce.read_outcome(request, load(name), request.plan())
    assert found is not None
    assert found.configs.keys() == cases.keys()
    for key, case in cases.items():
        config, asked = found.configs[key], dict(case.options)
        assert RunFolder(config.out).epochs_measured() == 1
        for option in ("method", "network", "data", "label_noise", "augment", "penalty_reduction", "penalty_method"):
            if option in asked:
                assert getattr(config, option) == asked[option]
        if config.method != "baseline":
            # The penalty was computed: on its first step at the least.
            assert all(record["penalty"] > 0 for record in found.runs[key][0] if "epoch" in record)
