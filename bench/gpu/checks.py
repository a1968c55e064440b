"""Calls 1 and 4: the compiler, the tests, many seeds, and compute-sanitizer, each in processes of its own."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu.bars import SANITIZER, SEEDS, TESTS
from bench.gpu.report import Figure
from bench.gpu.timing import Setting, case

ROOT = Path(__file__).parent.parent.parent


def logged(at: Setting, log: str, command: list[str], **environment: str) -> tuple[int, str]:
    """Runs a command in the repository; its exit code and output, which goes to a file in ``at.out`` as it comes."""
    at.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with (at.out / log).open("a") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            file.flush()
            print(line, end="", flush=True)
    return process.wait(), "".join(lines)


# ---- call 1 ---------------------------------------------------------------------------------------------------------


@case(1, TESTS, limit=200)
def compile_all(at: Setting) -> Iterator[Figure]:
    """Every configuration of every kernel for this device, on all processors."""
    major, minor = (9, 0) if at.dry else torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "fastfisher.kernels.compile", f"--capability={10 * major + minor}"]
    begin = time.monotonic()
    code, output = logged(at, "compile.log", command + ["gates"] * at.dry, TRITON_INTERPRET="0")
    found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    yield Figure("compiled", "kernels", len(found))
    yield Figure("compiled in", "s", time.monotonic() - begin)
    yield Figure("with spilled registers", "kernels", sum(usage["spill_bytes"] > 0 for *_, usage in found))
    if code:
        raise RuntimeError(f"the compiler ended with exit code {code}; see compile.log")


@case(1, TESTS, limit=480)
def gpu_tests(at: Setting) -> Iterator[Figure]:
    """The tests that are marked gpu."""
    marked = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    if at.dry:
        marked = ["tests/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-ra", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--durations=10", *marked]
    if importlib.util.find_spec("xdist") and not at.dry:
        command += ["-n", "8", "--dist", "worksteal"]
    _, output = logged(at, "tests.log", command)
    summary = output.splitlines()[-1] if output else ""  # as in "3 failed, 120 passed, 1 error in 60.0s"
    counted = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if not counted:
        raise RuntimeError(f"pytest ended with {summary!r}; see tests.log")
    yield Figure("passed", "tests", counted.get("passed", 0))
    yield Figure("skipped", "tests", counted.get("skipped", 0))
    yield Figure("failed", "tests", counted.get("failed", 0) + counted.get("error", 0))


# ---- call 4 ---------------------------------------------------------------------------------------------------------


@functools.cache
def seconds_a_seed(at: Setting, seeds: int, together: int) -> float:
    """Wall time for each seed of whole runs of SimpleCNN on digits with the penalty, start-up included."""
    network, size, epochs = ("small_cnn", 8, 1) if at.dry else ("simple_cnn", 32, 40)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastfisher", "train", "--network", network, "--image-size", str(size)]
        command += ["--epochs", str(epochs), "--method", "FP", "--measure", "none", "--out", f"{folder}/runs"]
        command += ["--seeds", str(seeds), "--together", str(together), "--device", at.device]
        begin = time.monotonic()
        code, output = logged(at, "seeds.log", command)
        if code:
            raise RuntimeError(f"fastfisher train ended with exit code {code}: {output[-200:]}")
        return (time.monotonic() - begin) / seeds


@case(4, SEEDS, limit=150, together=(8, 16, 32))
def many_seeds(at: Setting, together: int) -> Iterator[Figure]:
    """32 seeds, some at a time, against 4 one after another; one measurement of each."""
    one, all_of_them, at_once = (1, 1, 1) if at.dry else (4, 32, together)
    alone, shared = seconds_a_seed(at, one, 1), seconds_a_seed(at, all_of_them, at_once)
    name = f"SimpleCNN, 32 seeds, {together} together"
    yield Figure(name, "s a seed", shared)
    yield Figure(name, "times the throughput of one at a time", alone / shared)


@case(4, SANITIZER, limit=120, check=("memcheck", "racecheck"))
def sanitizer(at: Setting, check: str) -> Iterator[Figure]:
    """Each operator's smallest case under NVIDIA's checkers."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        raise ModuleNotFoundError("compute-sanitizer was not found on PATH or in /usr/local/cuda/bin")
    tested = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_gpu_ops.py", "-k", "nothing_waits"]
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, *tested]
    code, _ = logged(at, "sanitizer.log", command)
    yield Figure(check, "exit code", code)
