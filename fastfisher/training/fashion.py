"""Fashion-MNIST from its four idx files, gzipped or not: where they may be, and reading them with every check."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastfisher.training.config import ConfigError
from fastfisher.training.torchvision_sets import fetch

SIZE = 28
CLASSES = 10

# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# The files with the CRC-32 of their contents: MNIST and others have files of the same names and shapes.
CHECKSUMS = {
    "train-images-idx3-ubyte": 0xB4F29F28,
    "train-labels-idx1-ubyte": 0x741A4657,
    "t10k-images-idx3-ubyte": 0x678FE0B1,
    "t10k-labels-idx1-ubyte": 0x80142C1F,
}

# The first four bytes say the type, 8 for bytes without a sign, and the number of dimensions.
MAGIC_IMAGES, MAGIC_LABELS = 0x803, 0x801

WAYS = (
    "install the package dataset-fashion-mnist of Debian or Ubuntu, which is found where it is, or add --download, for "
    "which torchvision has to be installed"
)


def fashion(data_dir: str, download: bool) -> tuple[Tensor, Tensor, int]:
    """Return the images, uint8 ``[N, 1, 28, 28]``, the labels, int64 ``[N]``, and how many come first, for training.

    The files are in ``data_dir``, in its ``FashionMNIST/raw``, as torchvision has it, or where Debian's package puts
    them, each as it is or gzipped. Where they are not, torchvision fetches them into ``data_dir`` if ``download``.
    Reading all of them takes about 0.4 s and holds 55 MB.

    Raises:
        ConfigError: if there is no data set, naming the two ways to get it; if it cannot be fetched; or naming a file
            that is damaged or belongs to another data set.
    """
    folder = _find(data_dir)
    if folder is None and download:
        fetch("fashion", data_dir)
        folder = _find(data_dir)
    if folder is None:
        raise _not_found(data_dir)
    train_images, train_labels, test_images, test_labels = CHECKSUMS
    training = _read_part(folder, train_images, train_labels)
    test = _read_part(folder, test_images, test_labels)
    images, labels = (torch.cat(parts) for parts in zip(training, test, strict=True))
    return images, labels, len(training[1])


def _folders(data_dir: str) -> tuple[Path, ...]:
    return Path(data_dir), Path(data_dir) / "FashionMNIST" / "raw", DEBIAN


def _file(folder: Path, name: str) -> Path | None:
    """Return a file of the data set, the one that is not gzipped where there are both; None where there is neither."""
    # os.path's answer is False where the folder may not be looked into.
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)


def _find(data_dir: str) -> Path | None:
    """Return the first of the folders that has all four files, or None."""
    return next((each for each in _folders(data_dir) if all(_file(each, name) for name in CHECKSUMS)), None)


def _not_found(data_dir: str) -> ConfigError:
    places = []
    for folder in _folders(data_dir):
        missing = [name for name in CHECKSUMS if _file(folder, name) is None]
        places.append(f"{folder} ({'has none' if len(missing) == len(CHECKSUMS) else 'lacks ' + ', '.join(missing)})")
    return ConfigError(
        f"--data-dir: got {data_dir!r}, expected the files {', '.join(CHECKSUMS)} of fashion, each as it is or with "
        f".gz, together in one of {'; '.join(places)}: {WAYS}"
    )


def _read_part(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    """Return images, uint8 ``[n, 1, 28, 28]``, and labels, int64 ``[n]``, of the training or of the test set."""
    images_file, labels_file = _Idx.read(folder, images_name), _Idx.read(folder, labels_name)
    images = images_file.values(MAGIC_IMAGES, (SIZE, SIZE))
    labels = labels_file.values(MAGIC_LABELS, ())
    if len(images) != len(labels):
        raise labels_file.refused(f"{len(labels)} labels", f"one for each of the {len(images)} images")
    if (labels >= CLASSES).any():
        first = int((labels >= CLASSES).int().argmax())
        raise labels_file.refused(f"label {int(labels[first])} of image {first}", f"labels from 0 to {CLASSES - 1}")
    for file, name in ((images_file, images_name), (labels_file, labels_name)):
        found = zlib.crc32(file.content)
        if found != CHECKSUMS[name]:
            raise file.refused(f"contents with the CRC-32 {found:08x}", f"{CHECKSUMS[name]:08x}, Fashion-MNIST's")
    return images.unsqueeze(1), labels.long()


@dataclass(frozen=True)
class _Idx:
    """The contents of an idx file: magic number, the length of each dimension, all big-endian, and the bytes."""

    path: Path
    content: bytes

    @classmethod
    def read(cls, folder: Path, name: str) -> _Idx:
        path = _file(folder, name)
        assert path is not None
        try:
            return cls(path, gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"--data-dir: cannot read {path} ({error}): delete it, and {WAYS}") from error

    def refused(self, got: str, expected: str) -> ConfigError:
        return ConfigError(f"--data-dir: got {got} in {self.path}, expected {expected}: delete it, and {WAYS}")

    def values(self, magic: int, each: tuple[int, ...]) -> Tensor:
        """Return what it holds, uint8 ``[n, *each]``, after checking ``magic``, ``each`` and the number of bytes."""
        begin = 4 * (2 + len(each))
        if len(self.content) < begin:
            raise self.refused(f"{len(self.content)} bytes", f"at least the {begin} of an idx file's beginning")
        found, count, *lengths = struct.unpack(f">{2 + len(each)}I", self.content[:begin])
        if found != magic:
            raise self.refused(f"the magic number {found}", f"{magic}")
        if tuple(lengths) != each:
            raise self.refused(f"images of {' x '.join(map(str, lengths))}", f"{' x '.join(map(str, each))}")
        size = begin + count * math.prod(each)
        if len(self.content) != size:
            raise self.refused(f"{len(self.content)} bytes", f"{size}, for the {count} that its beginning says")
        # A copy: the bytes belong to Python and may not be written.
        return torch.from_numpy(np.frombuffer(self.content, np.uint8, offset=begin).reshape(count, *each).copy())
