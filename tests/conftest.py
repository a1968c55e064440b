"""What tests share: how Triton runs without a GPU, and torchvision beside a CPU build of torch."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

Once = Callable[[str, Callable[[Path], None]], Path]

# Before anything imports Triton: without a GPU its kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The same cases on every machine; `make nightly` takes others each time, and says how to repeat one that fails.
settings.register_profile(
    "default", max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=10_000, derandomize=False)
settings.load_profile("default")


def is_nightly() -> bool:
    """Whether these are the tests of ``make nightly``, which leave nothing out."""
    return settings.get_current_profile_name() == "nightly"


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision, also beside a CPU build of torch."""
    from bench.problems import torchvision_operators  # not above: it imports the library

    pytest.importorskip("PIL")
    with torchvision_operators():
        yield pytest.importorskip("torchvision", exc_type=ImportError)


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tensors are small: they too go through the kernels that serve large ones."""
    from fastfisher.engine.fused import forward  # which may import Triton

    monkeypatch.setattr(forward, "FUSED_ELEMENTS", 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, wait for those of a busy machine, and bits depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """Makes a folder, by its name, that all processes of the session share."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = shared / name
        whole = shared / f"{name}.whole"
        with FileLock(shared / f"{name}.lock"):
            if not whole.exists():
                path.mkdir()
                make(path)
                whole.touch()
        return path

    return folder
