"""How tests run in several processes (tests/support/processes.py), with processes that are only pretended."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support import processes
from tests.support.processes import PASSED, UNFINISHED, report, run_all


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The tests of each launch, of two processes: rank 1 fails in "bad", where rank 0 hangs; both hang in "stuck"."""
    launched: list[list[str]] = []

    def pretend(count: int, module: str, folder: Path, *tests: str) -> CompletedProcess[str]:
        launched.append(list(tests))
        if tests[0] != "absent":
            report(folder, "begun", 0).touch()
            for test in tests:
                if test in ("bad", "stuck"):
                    if test == "bad":
                        report(folder, test, 1).write_text("its traceback")
                    break
                for rank in range(count):
                    report(folder, test, rank).write_text(PASSED)
        return CompletedProcess([], 1, stderr="where it was")

    monkeypatch.setattr(processes, "launch", pretend)
    return launched


def test_new_processes_run_what_comes_after_a_failure(launches: list[list[str]], tmp_path: Path) -> None:
    said = run_all(["first", "bad", "second", "stuck"], 2, tmp_path)
    assert launches == [["first", "bad", "second", "stuck"], ["second", "stuck"]]
    assert said == {
        "first": [PASSED, PASSED],
        "bad": [UNFINISHED, "its traceback"],
        "second": [PASSED, PASSED],
        "stuck": [f"{UNFINISHED}\nwhere it was", UNFINISHED],
    }


def test_processes_that_do_not_begin_are_not_started_again(launches: list[list[str]], tmp_path: Path) -> None:
    said = run_all(["absent", "first"], 2, tmp_path)
    assert len(launches) == 1
    assert all(texts == [f"{UNFINISHED}\nwhere it was"] * 2 for texts in said.values()) and len(said) == 2
