"""Data sets that come as image files: which files they are, reading them at one size, and a cache of the result."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastfisher.training.config import ConfigError
from fastfisher.training.folder import replacing

# Of the free memory, what images may take: the rest is left to training.
SHARE_OF_MEMORY = 0.8
READ_TOGETHER = 1000


@dataclass(frozen=True)
class ImageFolder:
    """The files of a data set under ``root``, their labels from 0 to ``classes`` - 1, the ``training`` files first."""

    root: Path
    paths: list[str]
    labels: list[int]
    training: int
    classes: int

    @classmethod
    def of(cls, root: Path, training: list[tuple[str, int]], test: list[tuple[str, int]], classes: int) -> ImageFolder:
        """Make one from the paths and labels of either part."""
        files = training + test
        return cls(root, [path for path, _ in files], [label for _, label in files], len(training), classes)


def tiny_imagenet(data_dir: Path) -> ImageFolder:
    """List ``tiny-imagenet-200``, the extracted archive of TinyImageNet; its validation images are the test set.

    Raises:
        ConfigError: naming what is missing or cannot be understood.
    """
    root = data_dir / "tiny-imagenet-200"
    label_of = {name: label for label, name in enumerate(_read(root / "wnids.txt").split())}
    training = []
    for name, label in label_of.items():
        folder = root / "train" / name
        # The boxes name every image of the class: one that is absent is noticed.
        boxes = folder / f"{name}_boxes.txt"
        listed = {line.split("\t")[0] for line in _read(boxes).splitlines()} if boxes.exists() else set()
        files = sorted(listed | set(_files(folder / "images")))
        training += [(f"train/{name}/images/{file}", label) for file in files]
    test = []
    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(_read(annotations).splitlines(), 1):
        file, name, *_ = [*line.split("\t"), ""]
        if name not in label_of:
            raise ConfigError(
                f"--data-dir: got {name!r} in line {number} of {annotations}, expected a class of {root / 'wnids.txt'}"
            )
        test.append((f"val/images/{file}", label_of[name]))
    if not test:
        raise ConfigError(f"--data-dir: expected images in {annotations}, found none")
    return ImageFolder.of(root, training, test, len(label_of))


def imagenet(data_dir: Path) -> ImageFolder:
    """List ``train/<class>/*`` and ``val/<class>/*``, the classes in alphabetical order; ``val`` is the test set.

    Raises:
        ConfigError: naming a folder that is missing or empty, or a class that is only in ``val``.
    """
    label_of = {name: label for label, name in enumerate(_files(data_dir / "train"))}

    def part(where: str) -> list[tuple[str, int]]:
        names = _files(data_dir / where)
        for name in names:
            if name not in label_of:
                raise ConfigError(f"--data-dir: got {data_dir / where / name}, expected the classes of train alone")
        return [
            (f"{where}/{name}/{file}", label_of[name]) for name in names for file in _files(data_dir / where / name)
        ]

    return ImageFolder.of(data_dir, part("train"), part("val"), len(label_of))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"--data-dir: cannot read {path} ({error.strerror})") from error


def _files(folder: Path) -> list[str]:
    """Return what is in a folder, sorted, but for hidden files."""
    try:
        found = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ConfigError(f"--data-dir: cannot read {folder} ({error.strerror})") from error
    if not found:
        raise ConfigError(f"--data-dir: expected something in {folder}, which is empty")
    return found


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Return the largest centred square of an image, resized with antialiasing: uint8 ``[3, size, size]``.

    Raises:
        ConfigError: naming the file that is missing or no image.
    """
    # Imported here: other data sets do not need Pillow. It reads all of ImageNet, of which some files are CMYK or PNG.
    from PIL import Image

    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    except FileNotFoundError as error:
        raise ConfigError(f"--data-dir: the image {path} is missing") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--data-dir: cannot read {path} as an image ({error})") from error
    return np.asarray(resized).transpose(2, 0, 1)


def load_images(folder: ImageFolder, size: int, cache: Path, device: torch.device) -> Tensor:
    """Return all images, uint8 ``[N, 3, size, size]``, on the CPU, from ``cache`` or else from the files.

    The cache is one file, made where there is none, and anew where it is damaged or of other files, which is said. It
    does not notice that a file has other contents: then it is to be deleted.

    Raises:
        ConfigError: if the images do not fit into the memory of the CPU or of ``device``, or naming a bad file.
    """
    check_memory(len(folder.paths), size, dict.fromkeys((torch.device("cpu"), device)))
    listing = "\n".join(f"{path}\t{label}" for path, label in zip(folder.paths, folder.labels, strict=True))
    made_of = hashlib.sha256(listing.encode()).hexdigest()
    shape = (len(folder.paths), 3, size, size)
    if cache.exists():
        try:
            # Reading a member to its end checks its CRC-32.
            with np.load(cache, allow_pickle=False) as members:
                if str(members["made_of"]) != made_of:
                    raise ValueError("it is of other files")
                images = members["images"]
            if images.shape != shape or images.dtype != np.uint8:
                raise ValueError(f"it holds {images.dtype} {images.shape}")
            return torch.from_numpy(images)
        except Exception as error:  # whatever a damaged file raises
            tqdm.write(f"{cache} cannot be used and is made anew: {error}")
    images = np.empty(shape, np.uint8)
    with ThreadPoolExecutor() as pool, tqdm(total=len(images), unit="image", disable=None) as bar:
        # In parts, so that after a bad file no more than the rest of its part is still read.
        for start in range(0, len(images), READ_TOGETHER):
            paths = folder.paths[start : start + READ_TOGETHER]
            for index, image in enumerate(pool.map(lambda path: read_image(folder.root / path, size), paths), start):
                images[index] = image
                bar.update()
    try:
        # More than one run may be making it.
        with replacing(cache, f".{os.getpid()}.tmp") as file:
            np.savez(file, images=images, made_of=np.array(made_of))
    except OSError as error:
        tqdm.write(f"{cache} cannot be written, the images will be read again next time: {error}")
    return torch.from_numpy(images)


def check_memory(count: int, size: int, devices: Iterable[torch.device]) -> None:
    """Check that ``count`` images of 3 x size x size bytes fit into the memory of each device, with room to train.

    Raises:
        ConfigError: saying how much they take, how much there is, and at which size they would fit.
    """
    needed = count * 3 * size**2
    for device in devices:
        available = int(SHARE_OF_MEMORY * free_bytes(device))
        if needed > available:
            fits = int((available / (3 * count)) ** 0.5) // 8 * 8
            raise ConfigError(
                f"--image-size: got {size}, at which the {count:,} images take {needed / 1e9:.3g} GB, expected at most "
                f"{available / 1e9:.3g} GB, {SHARE_OF_MEMORY:.0%} of the free memory of {device}: "
                + (f"--image-size {fits} fits" if fits else "no size fits")
            )


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be had in a device's memory; for the CPU all there are, where Linux does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
