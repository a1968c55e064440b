from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.paper import commands

Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(autouse=True)
def everything_runs_on(one_thread: None) -> None:
    """One thread."""


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """Makes a folder, by its name, that all processes of the session share."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = shared / name
        whole = shared / f"{name}.whole"
        with FileLock(shared / f"{name}.lock"):
            if not whole.exists():
                path.mkdir()
                make(path)
                whole.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def dry_digits(once: Once) -> Path:
    """Everything at digits, as a dry run that nothing disturbed; not to be written to."""

    def make(out: Path) -> None:
        commands.finish(commands.start("--all", "--scale", "digits", "--dry-run", "--out", out))

    return once("dry-digits", make)
