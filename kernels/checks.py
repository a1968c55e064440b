"""What the host functions check before they launch, in the words of csrc/host, and the names Triton has for dtypes.

Values are not looked at: reading them back would stall the stream.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that the kernels take, and Triton's names for them."""


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What arithmetic is done in: float64 for float64, and float32 for the others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def check(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_dtype(tensor: Tensor, name: str) -> None:
    """Raises ValueError where the tensor's dtype is not one of :data:`TYPES`."""
    check(tensor.dtype in TYPES, f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_key(key: Tensor, device: torch.device) -> None:
    """Raises ValueError where ``key`` is not a key on the device of the operator's other arguments."""
    good = key.dtype == torch.int64 and key.numel() == 2 and key.is_contiguous()
    check(good, "key: expected a contiguous int64 tensor of 2 elements (seed, offset)")
    check(key.device == device, f"key: expected a tensor on {device}, got one on {key.device}")
