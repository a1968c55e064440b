"""The data sets as tensors resident on the device, label noise, and batches that resume exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.training.config import ConfigError
from fastfisher.training.fashion import fashion
from fastfisher.training.image_folders import ImageFolder, imagenet, load_images, tiny_imagenet
from fastfisher.training.torchvision_sets import cifar

# The splits belong to the data set, not to the run: every run is judged on the same held-out examples.
SPLIT_SEED = 0
HELD_OUT = 5000
CROP_PADDING = 4


@dataclass(frozen=True)
class StoredImages:
    """Images kept as uint8 ``[N, C, H, W]``; what is taken by an index or a slice is float32 and normalised."""

    stored: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.stored)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return the images at some indices."""
        return (self.stored[index].float() - self.mean) / self.std

    @property
    def shape(self) -> torch.Size:
        """The shape that all of them have together."""
        return self.stored.shape


Images = Tensor | StoredImages


@dataclass(frozen=True)
class Data:
    """A data set, normalised by the mean and standard deviation of its training images.

    Inputs, once taken, are float32 ``[N, channels, image_size, image_size]``, labels int64 ``[N]``. ``labels`` are
    what is trained on, ``true_labels`` what they were before the noise, ``noisy`` (bool ``[N]``) marks the replaced
    ones. Validation and test labels are never replaced. There may be no validation examples.
    """

    inputs: Images
    labels: Tensor
    true_labels: Tensor
    noisy: Tensor
    validation_inputs: Images
    validation_labels: Tensor
    test_inputs: Images
    test_labels: Tensor
    classes: int


def load_data(
    name: str,
    *,
    data_dir: str,
    image_size: int,
    label_noise: float,
    noise_seed: int,
    device: str,
    examples: int | None = None,
    evaluate: Sequence[int] = (),
    download: bool = False,
) -> Data:
    """Return a data set by its name, resized, normalised, on ``device``.

    - ``digits`` is scikit-learn's (1,797 images of 8x8): 1,097 for training, 200 for validation and 500 for testing,
      stratified.
    - ``fashion`` is Fashion-MNIST: see :func:`fastfisher.training.fashion.fashion`.
    - ``cifar10``, ``cifar100``: the extracted archives in ``data_dir``. Of these and of ``fashion`` 5,000 random
      training images are held out for validation.
    - ``tinyimagenet``: the extracted archive, ``tiny-imagenet-200`` in ``data_dir``. As in the paper there is no
      validation set; the archive's validation images, for its test images have no labels, are for testing.
    - ``imagenet``: ``train/<class>/*`` and ``val/<class>/*`` in ``data_dir``, of which the latter is for testing.

    ``fashion``, ``cifar10`` and ``cifar100`` are fetched into ``data_dir`` if ``download`` and they are not there. The
    last two are read once, with the largest centred square of each image resized, and kept in ``data_dir``, as
    ``<name>-<image_size>.npz``.

    With ``examples`` so many are used for training; with ``evaluate``, one or two numbers, so many for validation and,
    where there are two, for testing; see :func:`spread`. What is not used decides neither the normalisation nor which
    labels are replaced.

    Raises:
        ConfigError: if ``examples`` or ``evaluate`` is more than there are, a file is missing or damaged, the images do
            not fit into the memory, or torchvision, for CIFAR or ``download``, cannot be imported.
    """
    parts: tuple[Tensor | slice, ...]
    if name in IMAGE_FOLDERS:
        folder = IMAGE_FOLDERS[name](Path(data_dir))
        _check_counts(examples, evaluate, folder.training, 0, len(folder.labels) - folder.training)
        images = load_images(folder, image_size, Path(data_dir) / f"{name}-{image_size}.npz", torch.device(device))
        labels = torch.tensor(folder.labels)
        # Slices, of which no copy is made.
        parts = slice(folder.training), slice(0), slice(folder.training, None)
    else:
        images, labels, *indices = _small_images(name, data_dir, download)
        _check_counts(examples, evaluate, *map(len, indices))
        parts = (*indices,)
    normalise = _stored if name in IMAGE_FOLDERS else _resized
    chosen = tuple(zip(parts, (examples, *evaluate, None, None)[:3], strict=True))
    inputs = normalise([spread(images[part], count) for part, count in chosen], image_size, device)
    true_labels, validation_labels, test_labels = (spread(labels[part], count) for part, count in chosen)
    classes = int(labels.max()) + 1
    noisy_labels, noisy = replace_labels(true_labels, label_noise, classes, noise_seed)
    return Data(
        inputs=inputs[0],
        labels=noisy_labels.to(device),
        true_labels=true_labels.to(device),
        noisy=noisy.to(device),
        validation_inputs=inputs[1],
        validation_labels=validation_labels.to(device),
        test_inputs=inputs[2],
        test_labels=test_labels.to(device),
        classes=classes,
    )


IMAGE_FOLDERS: dict[str, Callable[[Path], ImageFolder]] = {"tinyimagenet": tiny_imagenet, "imagenet": imagenet}


def _small_images(name: str, data_dir: str, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return images, labels and the indices of those for training, validation and testing."""
    if name == "digits":
        return _digits()
    return _held_out(*(fashion(data_dir, download) if name == "fashion" else cifar(name, data_dir, download)))


def _resized(parts: Sequence[Tensor], size: int, device: str) -> list[Images]:
    """Return the parts of a small data set as float32, resized, normalised by the first.

    Images of k times the size become the means of their squares of k x k pixels.
    """
    found = [part.to(device, torch.float32) for part in parts]
    before = found[0].shape[-1]
    if before % size == 0:
        found = [F.avg_pool2d(each, before // size) for each in found]
    else:
        found = [F.interpolate(each, size=(size, size), mode="bilinear", align_corners=False) for each in found]
    std, mean = torch.std_mean(found[0], dim=(0, 2, 3), keepdim=True)
    return [(each - mean) / std for each in found]


def _stored(parts: Sequence[Tensor], size: int, device: str) -> list[Images]:
    """Return the parts of a large data set, which have their size, as bytes: a batch alone becomes numbers."""
    mean, std = (each.to(device) for each in mean_and_std(parts[0]))
    return [StoredImages(part.to(device), mean, std) for part in parts]


def _check_counts(examples: int | None, evaluate: Sequence[int], *there: int) -> None:
    """Check how many are to be used of those that are ``there`` for training, validation and testing."""
    options, parts = ("examples", "evaluate", "evaluate"), ("training", "validation", "test")
    for option, part, count, available in zip(options, parts, (examples, *evaluate), there, strict=False):
        # Where there is no validation set, its number says nothing.
        if count is not None and count > available > 0:
            raise ConfigError(f"--{option}: got {count}, expected at most the {available} {part} examples")


def spread(values: Tensor, examples: int | None) -> Tensor:
    """Return ``examples`` of N values, those at ⌊i N / ``examples``⌋; all N, not copied, if None or no fewer than N.

    Files come class after class: their first ones would be of few classes.
    """
    if examples is None or examples >= len(values):
        return values
    return values[torch.arange(examples) * len(values) // examples]


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 images, float32 ``[1, C, 1, 1]``.

    The sums are of integers, and up to 2^53 exact in float64; a few images at a time are converted.
    """
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in torch.split(images, 256):
        for channel, pixels in enumerate(part.unbind(1)):
            values = pixels.double().flatten()
            total[:, channel] += torch.stack([values.sum(), values.dot(values)])
    count = images.numel() // images.shape[1]
    mean, mean_square = total / count
    std = ((mean_square - mean.square()) * count / (count - 1)).sqrt()
    return mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1)


def replace_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Replace ``round(fraction * N)`` labels, chosen at random, by uniform ones (section 4.1 of the paper).

    A new label is uniform over all classes and so may be the true one, with probability 1/classes.

    Returns:
        The labels after replacement, int64 ``[N]``, and which were replaced, bool ``[N]``.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    noisy = torch.zeros(len(labels), dtype=torch.bool)
    noisy[chosen] = True
    replaced = labels.clone()
    replaced[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return replaced, noisy


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target
    rest, test = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(rest, test_size=200, stratify=labels[rest], random_state=SPLIT_SEED)
    images = torch.from_numpy(digits.images).unsqueeze(1)
    parts = torch.tensor(train), torch.tensor(validation), torch.tensor(test)
    return images, torch.from_numpy(labels).long(), *parts


def _held_out(images: Tensor, labels: Tensor, training: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hold out 5,000 random ones of the ``training`` examples, which come first, for validation."""
    if training <= HELD_OUT:
        raise ConfigError(f"--data-dir: got {training} training examples, expected more than the {HELD_OUT} held out")
    order = torch.randperm(training, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return images, labels, order[HELD_OUT:], order[:HELD_OUT], torch.arange(training, len(labels))


@dataclass
class Augmentation:
    """How each image of a set is augmented, drawn beforehand: on the images' device, so that a batch waits for nothing.

    Attributes:
        flipped: which are mirrored, bool ``[N]``; None where images stay as they are.
        shifts: the corners of the crops, int64 ``[2, N, 1]``; None where there are none.
        padding: how many zeros each side has before the crop.
    """

    flipped: Tensor | None = None
    shifts: Tensor | None = None
    padding: int = CROP_PADDING

    @classmethod
    def draw(
        cls, kind: str, count: int, generator: torch.Generator, device: torch.device, size: int = 32
    ) -> Augmentation:
        """Draw for ``count`` images of ``size`` pixels a side, from a generator on the CPU.

        ``flip`` mirrors half of them; ``crop`` crops at random after padding by 4 zeros on each side (He et al., 2016),
        by an eighth of smaller images than theirs; ``crop_flip`` does both; ``none`` leaves them as they are.
        """
        padding = min(CROP_PADDING, size // 8)
        flipped = shifts = None
        if kind.startswith("crop"):
            shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator).to(device)
        if kind.endswith("flip"):
            flipped = (torch.rand(count, generator=generator) < 0.5).to(device)
        return cls(flipped, shifts, padding)

    def apply(self, inputs: Tensor, part: slice) -> Tensor:
        """Return the images ``[n, C, H, W]``, which are those of ``part``, augmented."""
        if self.shifts is not None:
            count, _, height, width = inputs.shape
            padded = F.pad(inputs, (self.padding,) * 4)
            down, right = self.shifts[:, part]
            rows = down + torch.arange(height, device=inputs.device)
            columns = right + torch.arange(width, device=inputs.device)
            examples = torch.arange(count, device=inputs.device)[:, None, None]
            # Advanced indices around a slice put the channel last.
            inputs = padded[examples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.flipped is None:
            return inputs
        return torch.where(self.flipped[part, None, None, None], inputs.flip(-1), inputs)


class Mixup:
    """Batches mixed with themselves in another order (Zhang et al., 2018), drawn for an epoch at once.

    Inputs become λ x_i + (1 − λ) x_π(i), labels the probabilities λ [y_i] + (1 − λ) [y_π(i)], the cross-entropy against
    which is λ ℓ(y_i) + (1 − λ) ℓ(y_π(i)). Each batch has a permutation π and one λ ~ Beta(``beta``, ``beta``), from a
    generator of their own: the batches are those of a run without.

    Attributes:
        weights: the λ, float32 ``[batches]``.
        partners: the π, int64 ``[batches, batch_size]``.
    """

    def __init__(self, beta: float, *, classes: int, seed: int) -> None:
        """Take the parameter of the Beta distribution and the number of classes; :meth:`draw` before the rest."""
        self.beta = beta
        self.classes = classes
        self.generator = np.random.default_rng(seed)

    def draw(self, batches: int, batch_size: int, device: torch.device) -> None:
        """Draw for so many batches."""
        self.beginning: dict[str, Any] = dict(self.generator.bit_generator.state)
        weights = self.generator.beta(self.beta, self.beta, batches).astype(np.float32)
        partners = self.generator.permuted(np.tile(np.arange(batch_size), (batches, 1)), axis=1)
        self.weights, self.partners = torch.from_numpy(weights).to(device), torch.from_numpy(partners).to(device)

    def apply(self, inputs: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return the batch at ``position``, inputs ``[n, ...]`` and labels ``[n]``, mixed; labels ``[n, classes]``."""
        weight, partners = self.weights[position], self.partners[position]
        # F.one_hot may wait for the device, to look for labels out of range.
        one_hot = (labels[:, None] == torch.arange(self.classes, device=labels.device)).to(weight.dtype)
        mixed, probabilities = (weight * x + (1 - weight) * x[partners] for x in (inputs, one_hot))
        return mixed, probabilities


class Batches:
    """Shuffled batches of a resident data set, whose place in the epoch can be saved and restored.

    Shuffling and augmentation are drawn from one generator of its own, at the beginning of an epoch.
    Incomplete batches are dropped: E‖g‖² is Tr(F)/B, so a short batch would be penalised more than the others.
    """

    def __init__(
        self, inputs: Images, labels: Tensor, *, batch_size: int, augment: str, seed: int, mixup: Mixup | None = None
    ) -> None:
        """Take inputs ``[N, ...]`` and labels ``[N]``; ``len()`` is the number of batches of an epoch.

        With ``mixup`` the labels of a batch are probabilities.

        Raises:
            ConfigError: if the data set is smaller than one batch.
        """
        if batch_size > len(labels):
            raise ConfigError(f"--batch-size: got {batch_size}, expected at most the {len(labels)} training examples")
        self.inputs = inputs
        self.labels = labels
        self.batch_size = batch_size
        self.augment = augment
        self.mixup = mixup
        self.generator = torch.Generator().manual_seed(seed)
        self._begin()

    def _begin(self) -> None:
        """Shuffle and draw the augmentations of a new epoch."""
        self.beginning = self.generator.get_state()
        count, device = len(self.labels), self.labels.device
        self.order = torch.randperm(count, generator=self.generator).to(device)
        self.augmentation = Augmentation.draw(self.augment, count, self.generator, device, self.inputs.shape[-1])
        if self.mixup is not None:
            self.mixup.draw(len(self), self.batch_size, device)
        self.position = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.labels) // self.batch_size

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch; after the last of an epoch, the first of a newly shuffled one."""
        if self.position == len(self):
            self._begin()
        part = slice(self.position * self.batch_size, (self.position + 1) * self.batch_size)
        chosen = self.order[part]
        inputs, labels = self.augmentation.apply(self.inputs[chosen], part), self.labels[chosen]
        if self.mixup is not None:
            inputs, labels = self.mixup.apply(inputs, labels, self.position)
        self.position += 1
        return inputs, labels

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generators at the beginning of the epoch, and the place in it."""
        mixup = {} if self.mixup is None else {"mixup": self.mixup.beginning}
        return {"beginning": self.beginning, "position": self.position, **mixup}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned: the batches that follow are the same."""
        self.generator.set_state(state["beginning"])
        if self.mixup is not None:
            self.mixup.generator.bit_generator.state = state["mixup"]
        self._begin()
        self.position = state["position"]
