"""Runs the command as a user does, and ends it as a user, or a machine, does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PATIENCE = 120.0
"""Seconds: only a defect takes as long."""


def start(*words: str | Path) -> subprocess.Popen[str]:
    """Start ``fastfisher reproduce`` as the leader of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastfisher", "reproduce", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait until it ends, and return what it printed."""
    printed = process.communicate(timeout=5 * PATIENCE)[0]
    assert process.returncode == expected, printed
    return printed


def kill(process: subprocess.Popen[str]) -> None:
    """End the command alone, with -9: whoever else is in its group is left."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


def wait_until(holds: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until a condition holds; for no longer than is plausible."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def finished(out: Path) -> int:
    """Return how many runs are finished."""
    return sum(1 for _ in out.glob("runs/*/outcome.json"))


def descendants(parent: int) -> set[int]:
    """Return the processes that one started, and those that these started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            state, of, *_ = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(of)
    found = {parent}
    while more := {child for child, of in parents.items() if of in found} - found:
        found |= more
    return found - {parent}


def alive(processes: Iterable[int]) -> set[int]:
    """Return those that still run; one that ended and that nobody has waited for does not."""
    found = set()
    for process in processes:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            continue
        if state != "Z":
            found.add(process)
    return found
