from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Once
from tests.paper import commands


@pytest.fixture(autouse=True)
def everything_runs_on(one_thread: None) -> None:
    """One thread."""


@pytest.fixture(scope="session")
def dry_digits(once: Once) -> Path:
    """Everything at digits, as a dry run that nothing disturbed; not to be written to."""

    def make(out: Path) -> None:
        commands.finish(commands.start("--all", "--scale", "digits", "--dry-run", "--out", out))

    return once("dry-digits", make)
