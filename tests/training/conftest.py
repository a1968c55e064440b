from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def everything_runs_on(one_thread: None) -> None:
    """One thread."""
