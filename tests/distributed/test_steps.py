"""Several processes beside one, by torchrun and gloo; each case is in tests/support/distributed_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastfisher import FisherPenalty
from fastfisher.distributed import messages

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests.conftest import Once
from tests.support.distributed_worker import CASES, OF_TWO

Results = dict[str, str]


def launch(processes: int, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program in so many processes."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", module, *map(str, arguments)),
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def results(request: pytest.FixtureRequest, once: Once) -> list[Results]:
    """What each process says of each case."""

    def make(folder: Path) -> None:
        ran = launch(request.param, "tests.support.distributed_worker", folder / "rank")
        assert len(list(folder.iterdir())) == request.param, ran.stderr

    folder = once(f"{request.param} processes", make)
    return [json.loads((folder / f"rank.{rank}").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_several_processes(results: list[Results], case: str) -> None:
    if CASES[case] in OF_TWO and len(results) > 2:
        pytest.skip("of two processes")
    for rank, result in enumerate(results):
        if case == "a_rank_that_ends" and rank == len(results) - 1:
            continue  # it ended
        said = result.get(case, "not run")
        assert said == "passed", f"rank {rank}: {said}"


@pytest.fixture(scope="module")
def saved(once: Once) -> Path:
    """Checkpoints of two processes."""

    def make(folder: Path) -> None:
        ran = launch(2, "tests.support.checkpoint_worker", "save", folder)
        assert ran.returncode == 0, ran.stderr

    return once("checkpoint", make)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_is_resumed_by_new_processes(saved: Path, processes: int) -> None:
    ran = launch(processes, "tests.support.checkpoint_worker", "load", saved)
    assert ran.returncode == 0, ran.stderr


def test_process_groups_that_end(tmp_path: Path) -> None:
    ran = launch(2, "tests.support.checkpoint_worker", "regroup", tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scope": "all"}, "scope: expected"), ({"timeout": 0.0}, "timeout: expected a number of seconds > 0")],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherPenalty(nn.Linear(3, 3), 0.1, **options)  # type: ignore[arg-type]


def test_without_processes_nothing_is_asked_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    for name in ("all_gather", "all_reduce", "broadcast", "new_group"):
        monkeypatch.setattr(messages.dist, name, never)
    monkeypatch.setattr(messages.Messages, "gather", never)
    penalty = FisherPenalty(nn.Linear(3, 3), 0.1)
    assert penalty._world.alone
    penalty.backward(torch.ones(2, 3), torch.tensor([0, 1]))
