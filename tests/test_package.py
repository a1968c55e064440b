"""The package as a whole: what imports what, what it says of itself, and that it works without compiled kernels."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastfisher
from fastfisher import info, ops
from fastfisher.moved import MOVED

ROOT = Path(__file__).parent.parent


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_the_library_never_imports_training_or_paper() -> None:
    run = python("import sys, fastfisher; print([m for m in sys.modules if 'fastfisher.' in m])")
    assert run.returncode == 0, run.stderr
    assert "fastfisher.penalise.function" in run.stdout
    assert not any(name in run.stdout for name in ("fastfisher.training", "fastfisher.paper", "fastfisher.cli"))


def test_every_public_name_is_documented() -> None:
    for name in fastfisher.__all__:
        assert getattr(fastfisher, name).__doc__, name


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_leads_to_what_was_there(old: str) -> None:
    was = importlib.import_module(f"fastfisher.{old}")
    for new in MOVED[old]:
        module = importlib.import_module(f"fastfisher.{new}")
        names = [name for name, found in vars(module).items() if getattr(found, "__module__", None) == module.__name__]
        name = (names or module.__all__)[-1]
        with pytest.warns(DeprecationWarning, match=f"fastfisher.{old}.{name} is fastfisher."):
            assert getattr(was, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        was.no_such_name  # noqa: B018 (asking is the test)


def test_info_names_versions_backends_and_reasons() -> None:
    text = info.describe()
    for word in ("torch ", "python ", "threads ", "cpu ", "cuda "):
        assert word in text
    if ops.UNAVAILABLE is None:
        assert "SIMD level" in text


def test_without_kernels_the_reference_serves_and_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fastfisher", tmp_path / "fastfisher", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, fastfisher\n"
        f"assert fastfisher.__file__.startswith({str(tmp_path)!r})\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))\n"
        "x, y = torch.randn(5, 4), torch.randint(3, (5,))\n"
        "for method in ('double_backprop', 'finite_difference'):\n"
        "    fastfisher.FisherPenalty(model, 0.1, method=method).backward(x, y)\n"
        "from fastfisher import info; print(info.describe())\n"
    )
    run = python(program)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("SlowPathWarning") == 1, run.stderr
    assert "built without a C++ compiler" in run.stderr
    assert "PyTorch reference only" in run.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_sources_shared_with_the_gpu_compile_as_cuda(tmp_path: Path) -> None:
    kernel = tmp_path / "philox.cu"
    kernel.write_text(
        f'#include "{ROOT / "csrc" / "philox.h"}"\n'
        "__global__ void words(unsigned long long seed, unsigned long long offset, unsigned* out) {\n"
        "  const auto w = fastfisher::philox({seed, offset}, threadIdx.x);\n"
        "  out[threadIdx.x] = w.w[0] ^ w.w[1] ^ w.w[2] ^ w.w[3];\n}\n"
    )
    command = ["nvcc", "-arch=sm_90", "-cubin", "-o", str(tmp_path / "philox.cubin"), str(kernel)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
