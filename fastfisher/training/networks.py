"""The networks of the paper by name, and a small one for digits: convolutional, ReLU, no dropout."""

from __future__ import annotations

from torch import nn

from fastfisher.training.config import NETWORKS, ConfigError
from fastfisher.training.residual_networks import densenet, fixup_resnet18, resnet, wide_resnet


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

    Raises:
        ConfigError: for an unknown name, or images too small for the network.
    """
    plain = {"small_cnn": _small_cnn, "simple_cnn": _simple_cnn, "vgg11": _vgg11}
    if name in plain:
        return plain[name](in_channels, image_size, classes)
    if name not in NETWORKS:
        raise ConfigError(f"--network: got {name!r}, expected one of {', '.join(NETWORKS)}")
    if image_size < 8:
        raise ConfigError(f"--image-size: got {image_size}, expected at least 8 for {name}")
    shape = {"in_channels": in_channels, "classes": classes}
    if name == "fixup_resnet18":
        return fixup_resnet18(**shape)
    if name == "densenet40_12":
        return densenet(40, 12, **shape)
    if name == "resnet52":
        return wide_resnet(50, 3, skip_init=True, **shape)
    if name.startswith("wresnet44_3"):
        return wide_resnet(44, 3, skip_init=name == "wresnet44_3", **shape)
    return resnet(int(name.removeprefix("resnet")), **shape)


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


def _simple_cnn(in_channels: int, image_size: int, classes: int) -> nn.Sequential:
    """SimpleCNN of the paper (I.2): Keras' ``cifar10_cnn`` example without dropout, last hidden layer 128.

    361,898 parameters for 3x32x32 and 10 classes.
    """
    # Each stage keeps the size, loses 2 pixels to the unpadded convolution, and halves.
    after_first = (image_size - 2) // 2
    after_second = (after_first - 2) // 2
    if after_second < 1:
        raise ConfigError(f"--image-size: got {image_size}, expected at least 10 for simple_cnn")
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * after_second**2, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def _vgg11(in_channels: int, image_size: int, classes: int) -> nn.Sequential:
    """VGG-11, configuration A of Simonyan & Zisserman (2015), adapted to small images.

    One fully connected layer, no dropout; 9,225,610 parameters for 3x32x32 and 10 classes, 9,271,780 for 100.
    """
    layers: list[nn.Module] = []
    channels, size = in_channels, image_size
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in stage:
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
