"""Small data sets in the formats of the real archives."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastfisher.training import fashion

# In another order than the alphabet's, as in the archive.
WORDNET = ("n02124075", "n04067472", "n01443537")


def write_image(path: Path, seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Blocks of 8 pixels: what is left of them after JPEG can be recognised.
    height, width = size[1] // 8, size[0] // 8
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1).squeeze(), mode).save(path, "JPEG", quality=95)


def write_tiny_imagenet(folder: Path, each: int = 10, test: int = 7) -> Path:
    """Write the layout of the archive: 3 classes, of which one has a grey image as some have."""
    root = folder / "tiny-imagenet-200"
    for label, name in enumerate(WORDNET):
        files = [f"{name}_{index}.JPEG" for index in range(each)]
        for index, file in enumerate(files):
            mode = "L" if (label, index) == (1, 2) else "RGB"
            write_image(root / "train" / name / "images" / file, 100 * label + index, mode=mode)
        boxes = "".join(f"{file}\t0\t10\t63\t58\n" for file in files)
        (root / "train" / name / f"{name}_boxes.txt").write_text(boxes)
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in WORDNET))
    for index in range(test):
        write_image(root / "val" / "images" / f"val_{index}.JPEG", 1000 + index)
    lines = [f"val_{index}.JPEG\t{WORDNET[(index + 1) % 3]}\t0\t32\t44\t62\n" for index in range(test)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write_image(root / "test" / "images" / "test_0.JPEG", 5000)  # without a label: left alone
    return root


def write_imagenet(folder: Path, each: int = 4) -> None:
    """Write three classes of photographs of several shapes, one of them a PNG by another name and one in CMYK."""
    sizes = [(96, 64), (64, 96), (40, 40), (80, 160)]
    for label, name in enumerate(sorted(WORDNET)):
        for index in range(each):
            size = sizes[index % len(sizes)]
            write_image(folder / "train" / name / f"{name}_{index}.JPEG", 100 * label + index, size)
        write_image(folder / "val" / name / f"ILSVRC2012_val_0000000{label}.JPEG", 1000 + label, (72, 64))
    odd = folder / "train" / WORDNET[0]
    write_image(odd / "cmyk.JPEG", 1, mode="CMYK")
    Image.new("RGBA", (50, 70), (10, 20, 30, 255)).save(odd / "png.JPEG", "PNG")


def write_cifar(folder: Path, classes: int, training: int, test: int = 50) -> Path:
    """Write the layout of CIFAR-10 or of CIFAR-100, by their number of classes, with random images."""
    if classes == 10:
        base, labels, names = folder / "cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)]
        files = [*((name, training // 5) for name in names), ("test_batch", test)]
        meta, titles = "batches.meta", "label_names"
    else:
        base, labels, files = folder / "cifar-100-python", "fine_labels", [("train", training), ("test", test)]
        meta, titles = "meta", "fine_label_names"
    base.mkdir()
    random = np.random.default_rng(0)
    for name, count in files:
        images = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": images, labels: [i % classes for i in range(count)]}
        (base / name).write_bytes(pickle.dumps(content))
    (base / meta).write_bytes(pickle.dumps({titles: [str(i) for i in range(classes)]}))
    return base


def accept_any_cifar(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take what :func:`write_cifar` wrote: the sums are those of the real files."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).exists())


FASHION_MAGIC = {"images": 2051, "labels": 2049}


def idx(magic: int, values: Any) -> bytes:
    """Return the contents of an idx file: the magic number, the lengths of the dimensions and the bytes."""
    array = np.asarray(values, dtype=np.uint8)
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def write_fashion(folder: Path, training: int = 5_200, test: int = 30, *, gzipped: bool = False) -> dict[str, Any]:
    """Write the four files of Fashion-MNIST with random images, labels 0, 1, ..., 9, 0, ...; return what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", training), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, values in arrays.items():
        content = idx(FASHION_MAGIC[name.split("-")[1]], values)
        if gzipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (folder / name).write_bytes(content)
    return arrays


def accept_fashion(arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what :func:`write_fashion` returned be the contents of Fashion-MNIST."""
    sums = {name: zlib.crc32(idx(FASHION_MAGIC[name.split("-")[1]], values)) for name, values in arrays.items()}
    assert list(sums) == list(fashion.CHECKSUMS)
    monkeypatch.setattr(fashion, "CHECKSUMS", sums)
