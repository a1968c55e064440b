"""What tests share: how Triton runs without a GPU, and torchvision beside a CPU build of torch."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.networks import torchvision_operators

# Before anything imports Triton: without a GPU its kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision, also beside a CPU build of torch."""
    pytest.importorskip("PIL")
    with torchvision_operators():
        yield pytest.importorskip("torchvision", exc_type=ImportError)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, wait for those of a busy machine, and bits depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
