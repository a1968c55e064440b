"""Tests that run in each of several processes: ``@in_processes(2, 4)`` on a function without arguments.

pytest finds such a test once for each number of processes. The first that it runs starts the processes, with torchrun
and gloo; they run all of these tests that pytest has selected, one after the other, and each test then reports what its
processes said. So processes start once a session, also where pytest-xdist spreads the tests.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:  # the processes do without what pytest needs
    from tests.conftest import Once

ROOT = Path(__file__).parents[2]
PASSED, UNFINISHED = "passed", "did not finish"
LIMIT = 300.0
"""Seconds that a test may take in one process; it then says where it is and ends."""


def in_processes(*counts: int, last_rank_ends: bool = False) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """A test that runs in each of so many processes, in a group of all of them.

    Args:
        counts: the numbers of processes.
        last_rank_ends: the test ends the process of the last rank. It runs after all others.
    """

    def decorate(case: Callable[[], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("count", counts, ids=lambda count: f"{count} processes")
        def test(count: int, once: Once, request: pytest.FixtureRequest) -> None:
            def make(folder: Path) -> None:
                (folder / "said.json").write_text(json.dumps(run_all(selected(request.session, count), count, folder)))

            said = json.loads((once(f"{count} processes", make) / "said.json").read_text())[name_of(test)]
            failed = [f"rank {rank} of {count}: {text}" for rank, text in enumerate(said) if text != PASSED]
            if last_rank_ends and said[-1] == UNFINISHED:
                failed.pop()
            if failed:
                pytest.fail("\n".join(failed), pytrace=False)

        # The name, docstring, file and line are the case's, but not the arguments: those are pytest's fixtures.
        fixtures = inspect.signature(test)
        functools.update_wrapper(test, case)
        test.__signature__ = fixtures  # type: ignore[attr-defined]
        test.last_rank_ends = last_rank_ends  # type: ignore[attr-defined]
        return test

    return decorate


def name_of(test: Callable[..., None]) -> str:
    """As the processes find it."""
    return f"{test.__module__}:{test.__name__}"


def selected(session: pytest.Session, count: int) -> list[str]:
    """The tests of ``count`` processes that this session runs; one that ends a process comes last."""
    functions = [item for item in session.items if isinstance(item, pytest.Function)]
    ours = [item for item in functions if hasattr(item.function, "last_rank_ends")]
    tests = [item.function for item in ours if item.callspec.params["count"] == count]
    return [name_of(test) for test in sorted(tests, key=lambda test: test.last_rank_ends)]


def run_all(tests: list[str], count: int, folder: Path) -> dict[str, list[str]]:
    """What each rank says of each test. After one that failed, processes may be out of step: new ones run the rest."""
    said: dict[str, list[str]] = {}
    while left := tests[len(said) :]:
        reports = folder / str(len(said))
        reports.mkdir()
        ran = launch(count, "tests.support.processes", reports, *left)
        if not any(reports.iterdir()):
            return said | {test: [f"{UNFINISHED}\n{ran.stderr}"] * count for test in left}
        for test in left:
            files = [report(reports, test, rank) for rank in range(count)]
            said[test] = [file.read_text() if file.exists() else UNFINISHED for file in files]
            if set(said[test]) == {UNFINISHED}:
                said[test][0] += f"\n{ran.stderr}"
            if set(said[test]) != {PASSED}:
                break
    return said


def launch(count: int, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program in so many processes."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)),
            *("-m", module, *map(str, arguments)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def report(folder: Path, test: str, rank: int) -> Path:
    """Where a rank says how a test went."""
    return folder / f"{test} {rank}"


def main() -> None:
    """In each process: runs the tests in order, up to the first that fails here."""
    folder, *tests = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report(Path(folder), "begun", dist.get_rank()).touch()
    for test in tests:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        module, name = test.split(":")
        said = report(Path(folder), test, dist.get_rank())
        try:
            getattr(importlib.import_module(module), name).__wrapped__()
        except BaseException:
            said.write_text(traceback.format_exc())
            wait_for([report(Path(folder), test, rank) for rank in range(dist.get_world_size())], 10.0)
            os._exit(1)  # torchrun then ends the others, which may wait for this one
        said.write_text(PASSED)
    os._exit(0)  # a process may have ended in the last test: there is no group left to leave


def wait_for(files: list[Path], seconds: float) -> None:
    """Until there are all of them, or that long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(file.exists() for file in files):
        time.sleep(0.05)


if __name__ == "__main__":
    main()
