"""The networks of the step benchmarks."""

from __future__ import annotations

from torch import Tensor, nn

from fastfisher.training.networks import build_network


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        residual = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return (residual + self.shortcut(x)).relu()


def small_resnet() -> nn.Module:
    """A stem and three residual blocks of 16, 32 and 64 channels, with BatchNorm."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def gelu_cnn() -> nn.Module:
    """SimpleCNN with GELU for ReLU: not piecewise linear, so that Tr(H) is not Tr(F)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 64, 3), nn.GELU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2304, 128), nn.GELU(), nn.Linear(128, 10),
    )  # fmt: skip


def critic(activation: type[nn.Module]) -> nn.Module:
    """Three convolutions and one output, as the critics of GANs on 3x32x32 images (Radford et al., 2016)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), activation(), nn.Conv2d(64, 128, 4, 2, 1), activation(),
        nn.Conv2d(128, 256, 4, 2, 1), activation(), nn.Flatten(), nn.Linear(4096, 1),
    )  # fmt: skip


def network(name: str) -> nn.Module:
    """SimpleCNN, VGG-11 or the small ResNet, for 3x32x32 images and 10 classes."""
    if name == "ResNet + BN":
        return small_resnet()
    names = {"SimpleCNN": "simple_cnn", "VGG-11": "vgg11"}
    return build_network(names[name], in_channels=3, image_size=32, classes=10)
