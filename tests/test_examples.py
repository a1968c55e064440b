"""Every script of examples/ runs within seconds, alone, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_learns(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install .[train]")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr, run.stderr
    accuracies = [float(x) for x in re.findall(r"test accuracy ([\d.]+)", run.stdout)]
    assert accuracies and accuracies[-1] > 0.8, run.stdout
    assert not list(tmp_path.iterdir()), "it writes nothing"
