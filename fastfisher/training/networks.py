"""The networks of the paper by name, and small ones for digits: convolutional, ReLU, no dropout."""

from __future__ import annotations

import re

from torch import nn

from fastfisher.training.config import NETWORKS, ConfigError
from fastfisher.training.residual_networks import densenet, fixup_resnet, resnet, wide_resnet


def build_network(name: str, *, in_channels: int, image_size: int, classes: int) -> nn.Sequential:
    """Return a network that maps ``[N, in_channels, image_size, image_size]`` to logits ``[N, classes]``.

    Weights are drawn from PyTorch's global generator. What each network is, and how many parameters it has, is said
    where it is built: here, and in :mod:`fastfisher.training.residual_networks`.

    - ``small_cnn``: for digits.
    - ``simple_cnn``, ``vgg11``, ``densenet40_12``: sections 3 and 4.
    - ``wresnet44_3``: Wide ResNet without batch normalisation, with SkipInit (CIFAR-100); ``wresnet44_3_bn``: with it
      (TinyImageNet).
    - ``resnet26``, ``resnet32``, ``resnet50``, ``resnet56``: without batch normalisation (figures 2, 6, 7, 13, 14, 21).
    - ``resnet52``: table 3 says ResNet-52 where figure 11 says ResNet-50 and section I.3 the Wide ResNet of I.2. Both
      numbers are 8 blocks a stage, counted as 6n + 4 and 6n + 2: a Wide ResNet of depth 50 and width 3 with SkipInit.
    - ``fixup_resnet18``: figure 2, ImageNet.

    The others are of the same kinds, reduced for digits: of the depth and the width, or growth, in their names, and
    ``small_simple_cnn``, ``small_vgg11`` and ``small_fixup_resnet10`` with a half, a quarter and a quarter of the
    channels.

    Raises:
        ConfigError: for an unknown name, or images below 8x8.
    """
    if name not in NETWORKS:
        raise ConfigError(f"--network: got {name!r}, expected one of {', '.join(NETWORKS)}")
    if image_size < 8:
        raise ConfigError(f"--image-size: got {image_size}, expected at least 8 for {name}")
    if name == "small_cnn":
        return _small_cnn(in_channels, image_size, classes)
    kind, small = name.removeprefix("small_"), name.startswith("small_")
    if kind == "simple_cnn":
        return _simple_cnn(in_channels, image_size, classes, base=16 if small else 32)
    if kind == "vgg11":
        return _vgg11(in_channels, image_size, classes, base=16 if small else 64)
    numbers = [int(number) for number in re.findall("[0-9]+", kind)]
    shape = {"in_channels": in_channels, "classes": classes}
    if kind.startswith("fixup_resnet"):
        return fixup_resnet(*numbers, base=16 if small else 64, **shape)
    if kind == "resnet52":
        return wide_resnet(50, 3, skip_init=True, **shape)
    if kind.startswith("densenet"):
        return densenet(*numbers, **shape)
    if kind.startswith("wresnet"):
        return wide_resnet(*numbers, skip_init=not kind.endswith("_bn"), **shape)
    return resnet(*numbers, **shape)


def _small_cnn(in_channels: int, image_size: int, classes: int) -> nn.Sequential:
    """Two convolutions and two fully connected layers: 38,282 parameters for 1x16x16 and 10 classes."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (image_size // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def _simple_cnn(in_channels: int, image_size: int, classes: int, *, base: int) -> nn.Sequential:
    """SimpleCNN of the paper (I.2): Keras' ``cifar10_cnn`` example without dropout, last hidden layer 128 = 4 ``base``.

    361,898 parameters for 3x32x32 and 10 classes with ``base`` 32; 25,274 for 1x16x16 with 16.
    """
    layers: list[nn.Module] = []
    channels, size = in_channels, image_size
    for width in (base, 2 * base):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
        channels, size = width, size - 2  # the second convolution has no padding
        # Below 10 pixels the second stage has one left, and nothing to pool.
        if size >= 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    head = [nn.Linear(channels * size**2, 4 * base), nn.ReLU(), nn.Linear(4 * base, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def _vgg11(in_channels: int, image_size: int, classes: int, *, base: int) -> nn.Sequential:
    """VGG-11, configuration A of Simonyan & Zisserman (2015), adapted to small images; theirs has ``base`` 64.

    One fully connected layer, no dropout; 9,225,610 parameters for 3x32x32 and 10 classes, 9,271,780 for 100; with
    ``base`` 16 578,122 for 1x16x16 and 10 classes.
    """
    layers: list[nn.Module] = []
    channels, size = in_channels, image_size
    for stage in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for factor in stage:
            width = factor * base
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        # Below 32 pixels the last stages have one pixel left, and nothing to pool.
        if size >= 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, classes))
    # PyTorch's default shrinks the signal by about sqrt(6) per ReLU layer: after eight of them the logits
    # hardly depend on the image and training stalls. He's keeps, with fan_out, the scale of the gradients.
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network
