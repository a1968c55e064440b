"""What tests share: how Triton runs without a GPU, and torchvision beside a CPU build of torch."""

import os
from typing import Any

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision, which beside a CPU build of torch misses two operators that nothing here uses."""
    pytest.importorskip("PIL")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        yield pytest.importorskip("torchvision", exc_type=ImportError)
    finally:
        library._destroy()
