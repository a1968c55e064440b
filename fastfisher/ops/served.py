"""Which backend serves an operator: compiled kernels on the CPU, Triton's on CUDA, its definition everywhere else."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch

from fastfisher.ops.derivatives import Derivative
from fastfisher.slow_path import warn_slow_path

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = Path(__file__).parents[1] / "libfastfisher_ops.so"
TRITON = ("rows", "gates", "lists", "norms")
"""The families that kernels/ has, a file each; on CUDA the operators of others take their definitions."""


def _load() -> str | None:
    """Loads the compiled operators; returns the reason where that is impossible."""
    if not _LIBRARY.exists():
        return "the package was built without a C++ compiler"
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{_LIBRARY.name} does not load beside torch {torch.__version__}: {error}"
    return None


UNAVAILABLE: str | None = _load()
"""Why the compiled CPU kernels do not serve, or None where they do."""


def _load_gpu() -> str | None:
    """Imports the Triton kernels where a GPU can run them; returns the reason where none can."""
    if UNAVAILABLE is not None:
        return f"the operators are declared by the compiled library, and {UNAVAILABLE}"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    try:
        for family in TRITON:
            importlib.import_module(f"fastfisher.kernels.{family}")
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    return None


GPU_UNAVAILABLE: str | None = _load_gpu()
"""Why the Triton kernels do not serve CUDA devices, or None where they do."""

FAMILIES: dict[str, str] = {}
"""The family of each operator."""

# The registrations last as long as this object.
_gpu_library = torch.library.Library("fastfisher", "IMPL")  # type: ignore[no-untyped-call]


def compiled(name: str, device: torch.device) -> bool:
    """Whether a compiled kernel serves this operator on this device; where not, says so once."""
    if device.type == "cpu":
        reason = UNAVAILABLE
    elif device.type == "cuda":
        reason = GPU_UNAVAILABLE or (None if FAMILIES[name] in TRITON else f"there is no kernel of {name} yet")
    else:
        reason = "there are no compiled kernels for it"
    if reason is not None:
        warn_slow_path(f"fastfisher runs its PyTorch reference on {device.type}: {reason}")
    return reason is None


def operator(
    family: str, definition: Callable[P, R], fake: Callable[..., Any], derivative: Derivative | None = None
) -> Callable[P, R]:
    """The operator that is defined by a function of the same name in reference.py, as a function that users call.

    Args:
        family: the name of the files that have its kernels.
        definition: takes the tensor or the list of tensors that decides on the device first.
        fake: the outputs without their values, for tracing. An argument that has its default is not passed.
        derivative: for autograd, where the operator is differentiable.
    """
    name = definition.__name__
    FAMILIES[name] = family
    if UNAVAILABLE is None:
        torch.library.register_fake(f"fastfisher::{name}", fake)
        if derivative is not None:
            torch.library.register_autograd(
                f"fastfisher::{name}", derivative.backward, setup_context=derivative.setup_context
            )
    if GPU_UNAVAILABLE is None and family in TRITON:
        kernels = importlib.import_module(f"fastfisher.kernels.{family}")
        _gpu_library.impl(name, getattr(kernels, name), "CUDA")  # type: ignore[no-untyped-call]

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = cast(Any, args[0])
        device = first[0].device if isinstance(first, list | tuple) else first.device
        serving = getattr(torch.ops.fastfisher, name) if compiled(name, device) else definition
        return cast(R, serving(*args, **kwargs))

    return call
