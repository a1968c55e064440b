"""Every Triton configuration that can be launched compiles for every GPU we name, into what it is meant to be.

None spills a register, none turns many pointers through shared memory, and what is aligned moves 16 bytes at a time.
For the H100 here, and for the others in ``make nightly``; so is float16, which differs from bfloat16 in a conversion.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from fastfisher import ops
from fastfisher.kernels.compile import CAPABILITIES, Configuration, configurations
from fastfisher.kernels.lists import SIGNS
from tests.conftest import is_nightly

FILES = sorted(set(ops.GPU_KERNELS.values()))
COMPILED = CAPABILITIES if is_nightly() else (90,)  # each takes most of a minute
LEFT_OUT = None if is_nightly() else "fp16"


# How many arrays of a block each kernel reads and writes in words of 16 bytes.
READ, WRITTEN = "read", "written"
ALIGNED = {
    "sample_resident": {READ: 1, WRITTEN: 1},
    "sample_looped": {READ: 1, WRITTEN: 1},
    "product_resident": {READ: 2, WRITTEN: 1},
    "product_looped": {READ: 2, WRITTEN: 1},
    "rademacher_resident": {READ: 1, WRITTEN: 1},
    "rademacher_looped": {READ: 1, WRITTEN: 1},
    "relu": {READ: 1, WRITTEN: 1},
    "apply": {READ: 1, WRITTEN: 1},
    "max_pool": {READ: 0, WRITTEN: 1},  # and the indices
    "take": {READ: 0, WRITTEN: 1},  # and the indices are read
    "_axpy_diff": {READ: 3, WRITTEN: 1},
    "_sum_squares": {READ: 1, WRITTEN: 0},
    "_channel_products": {READ: 2, WRITTEN: 0},
}
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def wide_accesses(configuration: Configuration, which: str) -> int:
    """The least number of 16-byte accesses of a thread, by the bytes of its block."""
    constants, name = configuration.constants, configuration.kernel.fn.__name__
    if name not in ALIGNED:
        return 0
    # Rows of any other length begin anywhere; only whole blocks of two passes have a boundary of their own.
    if constants.get("MULTIPLE", 8) == 1 and name not in ("sample_looped", "product_looped"):
        return 0
    if name in ("_axpy_diff", "_sum_squares"):
        elements, kind = SIGNS.value, str(constants["DTYPE"])
    else:
        sizes = (constants.get(each, 1) for each in ("ROWS", "TILES", "WIDTH", "SIZE", "BLOCK"))
        elements, kind = math.prod(sizes), next(iter(configuration.signature.values()))[1:]
    return ALIGNED[name][which] * (elements * ITEMSIZE[kind] // (16 * 32 * configuration.num_warps))


@pytest.fixture(scope="module")
def usages() -> dict[tuple[str, int, int], dict[str, int]]:
    """What the compiler says, by file, index and capability: from a process in which Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "fastfisher.kernels.compile"]
    command += [f"--capability={each}" for each in COMPILED]
    command += [f"--without={LEFT_OUT}"] * (LEFT_OUT is not None)
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
        if LEFT_OUT is None or LEFT_OUT not in str(configuration)
    ],
)
def test_every_configuration_is_compiled_into_what_it_is_meant_to_be(
    file: str, index: int, capability: int, usages: dict[tuple[str, int, int], dict[str, int]]
) -> None:
    usage = usages[file, index, capability]
    assert usage["spill_bytes"] == 0
    assert usage["shared_bytes"] <= 99 * 1024  # what a block may have on every GPU since the A100
    assert usage["turned_pointers"] < 256
    configuration = configurations(file)[index]
    assert usage["wide_loads"] >= wide_accesses(configuration, READ)
    assert usage["wide_stores"] >= wide_accesses(configuration, WRITTEN)


def test_kernels_are_held_to_wide_accesses_under_their_own_names() -> None:
    asked = {
        configuration.kernel.fn.__name__
        for file in FILES
        for configuration in configurations(file)
        if wide_accesses(configuration, READ) + wide_accesses(configuration, WRITTEN)
    }
    assert asked == set(ALIGNED)


def test_every_kernel_has_a_host_function_and_every_file_configurations() -> None:
    for name, file in ops.GPU_KERNELS.items():
        module = __import__(f"fastfisher.kernels.{file}", fromlist=[name])
        assert callable(getattr(module, name))
        assert configurations(file), file
