from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fastfisher.cli import main
from fastfisher.paper.cases import Case
from fastfisher.paper.plan import Place, Plan
from fastfisher.paper.runner import train_plan, train_run
from fastfisher.training.pool import RayWorkers
from tests.paper.plans import digits

TIME_LIMIT = 180
"""Seconds: a cluster that does not answer would be waited for without end."""


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not within {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(TIME_LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[dict[str, Any]]]:
    """One cluster for all tests: who starts another one gets it. Returns how it was asked for."""
    ray = pytest.importorskip("ray")
    asked: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        # Ray gives way to everything else; beside other tests it would hardly come to anything.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        patch.setattr(ray, "init", lambda **options: asked.append(options))
        patch.setattr(ray, "shutdown", lambda: asked.append({"shutdown": True}))
        yield asked
    ray.shutdown()


def small(**options: Any) -> Case:
    return digits(examples=32, batch_size=16, trace_samples=8, epochs=1, **options)


def test_a_cluster_gives_the_table_of_this_machine(
    cluster: list[dict[str, Any]], dry_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "fig18", "--dry-run", "--out", str(tmp_path), "--ray", "local"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"1 of 1 reports in {tmp_path}, ")
    assert cluster[0]["address"] is None
    assert cluster[-1] == {"shutdown": True}
    for ending in ("csv", "md", "svg", "png"):
        assert (tmp_path / f"fig18.{ending}").read_bytes() == (dry_digits / f"fig18.{ending}").read_bytes()


@pytest.mark.parametrize(("deaths", "by"), [(1, "kill"), (2, "exit")])
def test_a_worker_that_dies_is_replaced_once(
    deaths: int, by: str, cluster: list[dict[str, Any]], tmp_path: Path
) -> None:
    def dying(values: dict[str, Any]) -> None:
        died = [tmp_path / f"died-{number}" for number in range(deaths)]
        left = [path for path in died if not path.exists()]
        if values["lr"] == 0.1 and left:
            left[0].touch()
            if by == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        train_run(values)

    place = Place(tmp_path, device="cpu", threads=1)
    wanted = [(small(lr=0.1), 0), (small(lr=0.2), 0)]
    failures = train_plan(Plan(wanted, place), RayWorkers("local", dying))
    assert len(list(tmp_path.glob("died-*"))) == deaths
    bad, good = (Plan([each], place).run(*each) for each in wanted)
    assert bad is not None and good is not None
    assert place.outcome(good) == "finished"
    if deaths == 1:
        assert failures == []
        assert place.outcome(bad) == "finished"
    else:
        assert [failure.task.name for failure in failures] == [bad.name]
        assert failures[0].reason
        assert place.outcome(bad) is None


def test_the_reason_of_a_failure_is_what_the_run_raised(cluster: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = [(digits(examples=5_000), 0)]
    (failure,) = train_plan(Plan(wanted, Place(tmp_path, device="cpu", threads=1)), RayWorkers("local", train_run))
    assert failure.reason == "--examples: got 5000, expected at most the 1097 training examples"


def test_a_run_that_is_stopped_saves_a_checkpoint(cluster: list[dict[str, Any]], tmp_path: Path) -> None:
    """One epoch of a thousand steps: a checkpoint within it is of an interruption."""
    wanted = [(digits(batch_size=1, epochs=1, trace_samples=8).but(network="small_vgg11", image_size=16), 0)]
    place = Place(tmp_path, device="cpu", threads=1)
    (run,) = Plan(wanted, place).ready()
    folder = place.folder(run)
    job = RayWorkers("local", train_run).start(run)
    while not folder.events.exists():
        time.sleep(0.02)
    assert job.failure() is None
    job.stop()
    job.wait()
    assert job.failure()
    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    assert 0 < checkpoint["steps"] < 1097
    assert place.outcome(run) is None


def test_without_ray_it_is_said_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    assert main(["reproduce", "fig18", "--dry-run", "--out", str(out), "--ray", "local"]) == 2
    expected = 'fastfisher reproduce: --ray: ray is not installed: pip install "fastfisher[ray]"\n'
    assert capsys.readouterr().err == expected
    assert not out.exists()


def test_a_cluster_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray")

    def absent(**options: Any) -> None:
        raise ConnectionError(f"no cluster at {options['address']}")

    monkeypatch.setattr(ray, "init", absent)
    out = tmp_path / "out"
    assert main(["reproduce", "fig18", "--dry-run", "--out", str(out), "--ray", "10.0.0.1:6379"]) == 2
    expected = "fastfisher reproduce: --ray: got '10.0.0.1:6379', expected the address of a cluster, or local (no clust"
    assert capsys.readouterr().err.startswith(expected)
    assert not out.exists()
