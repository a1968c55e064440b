"""Every Triton configuration that can be launched compiles for every GPU we name, and none spills a register.

For the H100 here, and for the others in ``make nightly``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from fastfisher import ops
from fastfisher.kernels.compile import CAPABILITIES, configurations
from tests.conftest import is_nightly

FILES = sorted(set(ops.GPU_KERNELS.values()))
COMPILED = CAPABILITIES if is_nightly() else (90,)  # each takes most of a minute


@pytest.fixture(scope="module")
def usages() -> dict[tuple[str, int, int], dict[str, int]]:
    """What the compiler says, by file, index and capability: from a process in which Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "fastfisher.kernels.compile"]
    command += [f"--capability={each}" for each in COMPILED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    return {(file, index, capability): usage for file, index, capability, usage in results}


@pytest.mark.parametrize("capability", COMPILED)
@pytest.mark.parametrize(
    ("file", "index"),
    [
        pytest.param(file, index, id=f"{file}-{configuration}")
        for file in FILES
        for index, configuration in enumerate(configurations(file))
    ],
)
def test_no_configuration_spills(
    file: str, index: int, capability: int, usages: dict[tuple[str, int, int], dict[str, int]]
) -> None:
    usage = usages[file, index, capability]
    assert usage["spill_bytes"] == 0
    assert usage["shared_bytes"] <= 99 * 1024  # what a block may have on every GPU since the A100


def test_every_kernel_has_a_host_function_and_every_file_configurations() -> None:
    for name, file in ops.GPU_KERNELS.items():
        module = __import__(f"fastfisher.kernels.{file}", fromlist=[name])
        assert callable(getattr(module, name))
        assert configurations(file), file
