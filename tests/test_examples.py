"""Every script of examples/ runs within seconds, alone, and says what came out."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass
class Example:
    """How it is called, the number that it prints (the last such one) and its least value, what it writes and needs."""

    printed: str
    least: float = 0.0
    arguments: str = ""
    writes: str | None = None
    needs: str = "sklearn"


EXAMPLES = {
    "plain_loop": Example(r"test accuracy ([\d.]+)", 0.8),
    "mixed_precision": Example(r"test accuracy ([\d.]+)", 0.8),
    "lightning_callback": Example(
        r"R = ([\d.]+)", arguments="--steps 20 --out logs", writes="metrics.csv", needs="pytorch_lightning"
    ),
    "transformers_trainer": Example(r"Tr\(F\) per position = ([\d.]+)", arguments="--steps 4", needs="transformers"),
    "wgan_gp": Example(r"cosine ([\d.]+)", 0.999, "3"),
    "regression": Example(r"R² ([\d.]+)", 0.2),
    "multilabel": Example(r"test accuracy ([\d.]+)", 0.8),
    "segmentation": Example(r"test accuracy ([\d.]+)", 0.75),
    "policy_gradient": Example(r"mean reward ([\d.]+)", 0.5, needs="torch"),
    "char_gpt": Example(r"α = 0, ([\d.]+)", 0.1, "--steps 3 --length 8", "char_gpt.png", needs="transformers"),
}


# Transformers and Lightning import torchvision where it is: also one whose operators are for another build of torch.
PROGRAM = """
import runpy, sys
from tests.support.networks import torchvision_operators
del sys.argv[0]
with torchvision_operators():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_each_has_its_test() -> None:
    assert sorted(EXAMPLES) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    if importlib.util.find_spec(example.needs) is None:
        pytest.skip(f"{example.needs} is not installed")
    script = str(ROOT / "examples" / f"{name}.py")
    command = [sys.executable, "-c", PROGRAM, script, *example.arguments.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "SlowPathWarning" not in run.stderr, run.stderr
    numbers = [float(x) for x in re.findall(example.printed, run.stdout)]
    assert numbers and numbers[-1] >= example.least, run.stdout
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert example.writes in written if example.writes else not written
