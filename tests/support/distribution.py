"""Installs what ``make dist`` built and tries it: ``python -m tests.support.distribution``.

Two environments, one for the wheel and one for a wheel made from the sdist. Each has the package alone; torch and what
the tests need come from the environment that runs this, by a .pth file, so that nothing is fetched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "dist"
WORK = ROOT / "build" / "installed"
TESTS = [f"tests/ops/test_{family}.py" for family in ("rows", "lists", "norms")]
OPERATORS = "second_order or combines_check or public_wrapper or norms_of_linear"
"""Tests of the operators that need the compiled library and take seconds."""


def run(*words: str | Path, cwd: Path) -> str:
    """Runs a command without the caller's PYTHONPATH; returns what it printed, shows it where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if ended.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{ended.stdout}")
    return ended.stdout


def only(folder: Path, pattern: str) -> Path:
    """The one file of this pattern."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder}: expected one {pattern}, found {[path.name for path in found]}")
    return found[0]


def install(wheel: Path, environment: Path) -> Path:
    """A fresh environment with this wheel; returns its python."""
    venv.create(environment, clear=True)
    python = environment / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=WORK).strip()
    (Path(packages) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # The environment that is shared may have the package too, which pip would take for this one.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=WORK)
    return python


def main() -> None:
    """Tries both; ends with what failed."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    wheel, sdist = only(BUILT, "*.whl"), only(BUILT, "*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    # The tests, away from the sources: what they import is what is installed.
    (WORK / "tried").mkdir()
    for folder in ("tests", "bench"):
        shutil.move(WORK / f"fastfisher-{version[1]}" / folder, WORK / "tried" / folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", WORK, sdist, cwd=WORK)
    for name, file in (("wheel", wheel), ("sdist", only(WORK, "*.whl"))):
        python = install(file, WORK / name)
        program = "import fastfisher.ops as ops; print(ops.__file__); assert ops.UNAVAILABLE is None, ops.UNAVAILABLE"
        imported = run(python, "-c", program, cwd=WORK / "tried").strip()
        if not Path(imported).is_relative_to(WORK / name):
            sys.exit(f"{name}: expected fastfisher to be imported from {WORK / name}, got {imported}")
        info = run(WORK / name / "bin" / "fastfisher", "info", cwd=WORK / "tried")
        if info.splitlines()[0].split() != ["fastfisher", version[1]]:
            sys.exit(f"{name}: expected fastfisher {version[1]}, got {info}")
        tests = run(python, "-m", "pytest", "-q", *TESTS, "-k", OPERATORS, cwd=WORK / "tried")
        print(f"{file.name}, from the {name}: {tests.splitlines()[-1]}\n{info}")


if __name__ == "__main__":
    main()
