"""What is installed, which backends serve which device, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from fastfisher import ops


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """Versions, backends by device, SIMD level and threads, one fact a line."""
    lines = [
        f"fastfisher   {_version('fastfisher')}",
        f"python       {platform.python_version()} on {platform.machine()}",
        f"torch        {torch.__version__}",
        f"triton       {_version('triton')}",
        f"torchvision  {_version('torchvision')}",
        f"threads      {torch.get_num_threads()}",
    ]
    if ops.UNAVAILABLE is None:
        from fastfisher import _native

        lines.append(f"cpu          compiled kernels, SIMD level {_native.simd_level()}, built by {_native.compiler()}")
    else:
        lines.append(f"cpu          PyTorch reference only: {ops.UNAVAILABLE}")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        if ops.GPU_UNAVAILABLE is None:
            lines.append(f"cuda         Triton kernels on {device} for {', '.join(sorted(ops.GPU_KERNELS))}")
        else:
            lines.append(f"cuda         PyTorch reference on {device}: {ops.GPU_UNAVAILABLE}")
    else:
        built = torch.version.cuda
        reason = "no device was found" if built else "this torch is built without CUDA"
        lines.append(f"cuda         not usable: {reason}")
    return "\n".join(lines)
