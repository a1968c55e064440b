"""Compiles every kernel configuration for given GPUs, with no GPU at hand, and says what each takes of a processor.

A spilled register is a trip to memory in the middle of arithmetic: no shipped configuration may spill. Nor may one hand
many pointers between threads through shared memory, or read element by element what is aligned to 16 bytes: Triton
does both without a warning. A test holds every configuration to all three.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

CAPABILITIES = (80, 90, 100)
"""Compute capabilities, times ten, of the GPUs that the kernels are compiled for: A100, H100 and H200, B200."""


@dataclass(frozen=True)
class Configuration:
    """One form in which a kernel is launched."""

    kernel: Any
    """A function under ``triton.jit``."""
    signature: dict[str, str]
    """Triton's type of each argument that is no constant, by name, as in ``"*fp32"`` or ``"i64"``."""
    constants: dict[str, Any]
    """The value of each ``tl.constexpr`` argument, by name."""
    num_warps: int = 4
    num_stages: int = 3

    def __str__(self) -> str:
        """The kernel's name with its types and constants."""
        values = [*self.signature.values(), *(f"{name}={value}" for name, value in self.constants.items())]
        return f"{self.kernel.fn.__name__}({', '.join(values)}, warps={self.num_warps}, stages={self.num_stages})"


@dataclass(frozen=True)
class Usage:
    """What one thread of a compiled kernel takes, and one block of threads (shared memory)."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    turned_pointers: int
    """Elements of the largest tensor of pointers whose layout over the threads changes."""
    wide_loads: int
    """Instructions that read 16 bytes of global memory at once."""
    wide_stores: int


def compile_offline(configuration: Configuration, capability: int) -> Usage:
    """Compiles a configuration for ``capability`` (90 for sm_90), pointers aligned to 16 bytes as torch allocates them.

    Raises:
        RuntimeError: Triton's interpreter is on (TRITON_INTERPRET), which leaves nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_offline: TRITON_INTERPRET is set; unset it before triton is imported")
    kernel = configuration.kernel
    types = {name: configuration.signature.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel, types, constexprs=configuration.constants, attrs={(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The line of the function: "REG:30 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:568 ..."; spills lie on the stack.
    function = report.split(" Function ", 1)[1]
    used = dict(field.split(":", 1) for field in function.split() if field.split(":", 1)[0] in ("REG", "STACK"))
    turned = re.findall(r"ttg\.convert_layout .*: tensor<([\dx]+)x!tt\.ptr", compiled.asm["ttgir"])
    wide = [len(re.findall(rf"{each}\.global\S*\.(?:v4\.b32|v2\.b64)", compiled.asm["ptx"])) for each in ("ld", "st")]
    return Usage(
        int(used["REG"]),
        int(used["STACK"]),
        compiled.metadata.shared,
        max((math.prod(map(int, shape.split("x"))) for shape in turned), default=0),
        *wide,
    )


def configurations(file: str) -> list[Configuration]:
    """Every configuration that ``kernels/<file>.py`` launches."""
    return importlib.import_module(f"fastfisher.kernels.{file}").CONFIGURATIONS  # type: ignore[no-any-return]


def _compile_one(file: str, index: int, capability: int) -> tuple[str, int, int, dict[str, int]]:
    return file, index, capability, asdict(compile_offline(configurations(file)[index], capability))


def main() -> None:
    """Prints a line of JSON for each configuration and GPU: file, index in its list, capability, usage."""
    from fastfisher.ops import GPU_KERNELS

    parser = argparse.ArgumentParser(prog="python -m fastfisher.kernels.compile", description=__doc__)
    parser.add_argument("files", nargs="*", default=sorted(set(GPU_KERNELS.values())), help="default: all")
    parser.add_argument("--capability", type=int, action="append", help="as in 90 for sm_90; default: 80, 90 and 100")
    parser.add_argument(
        "--without", metavar="TYPE", help="a type as Triton names it, as in fp16: leaves out what has it"
    )
    arguments = parser.parse_args()
    jobs = [
        (file, index, capability)
        for capability in arguments.capability or CAPABILITIES
        for file in arguments.files
        for index, configuration in enumerate(configurations(file))
        if arguments.without is None or arguments.without not in str(configuration)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(_compile_one, *zip(*jobs, strict=True)):
            print(json.dumps(result))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
