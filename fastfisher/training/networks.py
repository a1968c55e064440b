"""The networks: convolutional, ReLU, no batch normalisation and no dropout."""

from __future__ import annotations

from torch import nn

from fastfisher.training.config import NETWORKS, ConfigError


def build_network(name: str, *, in_channels: int, image_size: int, classes: int) -> nn.Sequential:
    """Return a network that maps ``[N, in_channels, image_size, image_size]`` to logits ``[N, classes]``.

    ``small_cnn``, ``simple_cnn`` or ``vgg11``; weights are drawn from PyTorch's global generator.

    Raises:
        ConfigError: for an unknown name, or images too small for the network.
    """
    if name == "small_cnn":
        return _small_cnn(in_channels, image_size, classes)
    if name == "simple_cnn":
        return _simple_cnn(in_channels, image_size, classes)
    if name == "vgg11":
        return _vgg11(in_channels, image_size, classes)
    raise ConfigError(f"--network: got {name!r}, expected one of {', '.join(NETWORKS)}")


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
