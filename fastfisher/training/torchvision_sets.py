"""What torchvision does: it reads CIFAR-10 and CIFAR-100, and fetches them and Fashion-MNIST."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfisher.training.config import ConfigError

# The class in torchvision.datasets, and the folder that it makes and reads.
SETS = {
    "fashion": ("FashionMNIST", Path("FashionMNIST") / "raw"),
    "cifar10": ("CIFAR10", Path("cifar-10-batches-py")),
    "cifar100": ("CIFAR100", Path("cifar-100-python")),
}


def fetch(name: str, data_dir: str) -> None:
    """Fetch the extracted files of a data set into its folder in ``data_dir``, which is made where there is none.

    torchvision checks what it fetches by its MD5. That is done in a folder of its own, so that what is cut off or fails
    the check leaves nothing behind; then each file takes the place of the one that was there.

    Raises:
        ConfigError: if torchvision cannot be imported, the data set cannot be fetched or its check failed, or nothing
            can be written in ``data_dir``.
    """
    kind, folder = SETS[name]
    datasets = _datasets(f"--download: got True with --data {name}")
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
            getattr(datasets, kind)(temporary, download=True)
            target = Path(data_dir) / folder
            target.mkdir(parents=True, exist_ok=True)
            for file in (Path(temporary) / folder).iterdir():
                # The archives are not read again.
                if file.suffix != ".gz":
                    os.replace(file, target / file.name)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"--download: {name} could not be fetched into {data_dir!r}: {str(error).strip()}. Try again, or put the "
            "files there by hand, as docs/training.md says"
        ) from error


def cifar(name: str, data_dir: str, download: bool) -> tuple[Tensor, Tensor, int]:
    """Return the images, uint8 ``[N, 3, 32, 32]``, the labels, int64 ``[N]``, and how many come first, for training.

    They are the extracted files in ``data_dir``, whose MD5 torchvision checks. Where they are not whole, they are
    fetched if ``download``.

    Raises:
        ConfigError: if a file is missing or damaged, torchvision cannot be imported, or they cannot be fetched.
    """
    datasets = _datasets(f"--data: got {name!r}")
    kind = getattr(datasets, SETS[name][0])
    try:
        parts = _parts(kind, data_dir)
    except RuntimeError as error:
        if not download:
            base = Path(data_dir) / kind.base_folder
            checksums = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
            intact = datasets.utils.check_integrity
            bad = [str(base / file) for file, md5 in checksums if not intact(str(base / file), md5)]
            raise ConfigError(
                f"--data-dir: got {data_dir!r}, expected a folder that holds {kind.base_folder}, the extracted files "
                f"of {name}, which --download fetches; missing or damaged: {', '.join(bad)}"
            ) from error
        fetch(name, data_dir)
        parts = _parts(kind, data_dir)
    images = torch.cat([torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts])
    return images, torch.cat([torch.tensor(part.targets) for part in parts]), len(parts[0])


def _parts(kind: Any, data_dir: str) -> list[Any]:
    return [kind(data_dir, train=train, download=False) for train in (True, False)]


def _datasets(what: str) -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails with a RuntimeError about a missing operator.
        raise ConfigError(
            f"{what}, which needs torchvision, and it cannot be imported ({error}): install builds of torch and "
            "torchvision that match, as described at https://pytorch.org/get-started"
        ) from error
    return datasets
