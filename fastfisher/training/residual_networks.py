"""The paper's networks with shortcuts: ResNets without batch normalisation, Wide ResNets, a Fixup ResNet, a DenseNet.

Each ends in an average over all positions, so that it runs at any image size. Where the paper leaves something open,
the docstring says what was chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


def _init(layer: nn.Module, gain: float, fan: int) -> None:
    """Gaussian weights of variance gain/fan, bias 0."""
    nn.init.normal_(layer.weight, std=math.sqrt(gain / fan))  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _fan_out(conv: nn.Conv2d) -> int:
    return conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]


def _blocks(depth: int, each: int, rest: int) -> int:
    """Return the n for which ``each`` n + ``rest`` is the depth."""
    blocks, remainder = divmod(depth - rest, each)
    if remainder or blocks < 1:
        raise ValueError(f"depth: expected {each}n + {rest} with n >= 1, got {depth}")
    return blocks


class _Classifier(nn.Sequential):
    """The mean over positions, and a linear layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class PlainBlock(nn.Module):
    """x ↦ relu(shortcut(x) + conv(relu(conv(x)))), without normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (_conv(inputs, outputs, 3, stride, bias=True), _conv(outputs, outputs, 3, bias=True))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


def resnet(depth: int, *, in_channels: int, classes: int) -> nn.Sequential:
    """ResNet-``depth`` of He et al. (2016) for small images: depth = 6n + 2, stages of n blocks of 16, 32, 64 channels.

    No batch normalisation. The weights start as in Arpit et al. (2019): variance gain/fan_out, with gain 2 for the
    first convolution of a block, 1/n for the second, 1 for a shortcut, and no ReLU after the stem. They presuppose
    weight normalisation, which the paper does not mention: it is left out. Chosen too: biases, and 1x1 convolutions
    where a shortcut changes the shape. Depth 26: 368,682 parameters for 3 channels and 10 classes, 374,532 for 100;
    depth 8 has 77,418 for 1 channel and 10 classes, depth 14 174,410.
    """
    blocks = _blocks(depth, 6, 2)
    layers: list[nn.Module] = [_conv(in_channels, 16, 3, bias=True)]
    channels = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(blocks):
            layers.append(PlainBlock(channels, width, 2 if stage > 0 and block == 0 else 1))
            channels = width
    network = nn.Sequential(*layers, *_Classifier(channels, classes))
    for layer in network.modules():
        if isinstance(layer, PlainBlock):
            _init(layer.first, 2.0, _fan_out(layer.first))
            _init(layer.second, 1.0 / blocks, _fan_out(layer.second))
            if isinstance(layer.shortcut, nn.Conv2d):
                _init(layer.shortcut, 1.0, _fan_out(layer.shortcut))
    _init(network[0], 1.0, _fan_out(network[0]))  # type: ignore[arg-type]
    return network


class WideBlock(nn.Module):
    """A block of a Wide ResNet: x ↦ shortcut + conv(relu(norm(conv(relu(norm(x)))))), the activations first.

    Where the shape changes the shortcut is a 1x1 convolution of relu(norm(x)), else x. With ``skip_init`` there is no
    normalisation, and the branch is multiplied by a gain that starts at 0 (De & Smith, 2020).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, skip_init: bool) -> None:
        super().__init__()
        self.first_norm = nn.Identity() if skip_init else nn.BatchNorm2d(inputs)
        self.first = _conv(inputs, outputs, 3, stride, bias=skip_init)
        self.second_norm = nn.Identity() if skip_init else nn.BatchNorm2d(outputs)
        self.second = _conv(outputs, outputs, 3, bias=skip_init)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else _conv(inputs, outputs, 1, stride, bias=skip_init)
        self.gain = nn.Parameter(torch.zeros(())) if skip_init else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        active = F.relu(self.first_norm(x))
        branch: Tensor = self.second(F.relu(self.second_norm(self.first(active))))
        if self.gain is not None:
            branch = branch * self.gain
        return branch + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(depth: int, width: int, *, in_channels: int, classes: int, skip_init: bool) -> nn.Sequential:
    """Wide ResNet (Zagoruyko & Komodakis, 2016): 3 stages of n blocks, 16, 32 and 64 times ``width`` channels.

    They count depth = 6n + 4, which 44 is not; here depth = 6n + 2, as He et al. do, so that 44 is n = 7. Convolutions
    start as theirs, by He et al. (2015). Depth 44 and width 3 has 5,928,180 parameters for 3 channels and 100 classes,
    5,947,480 for 200; with ``skip_init``, without batch normalisation and with biases, 5,923,817 and 5,943,117.
    Depth 8 and width 1 has 77,562 for 1 channel and 10 classes, with ``skip_init`` 77,421.
    """
    blocks = _blocks(depth, 6, 2)
    layers: list[nn.Module] = [_conv(in_channels, 16, 3, bias=skip_init)]
    channels = 16
    for stage in range(3):
        outputs = 16 * 2**stage * width
        for block in range(blocks):
            layers.append(WideBlock(channels, outputs, 2 if stage > 0 and block == 0 else 1, skip_init=skip_init))
            channels = outputs
    if not skip_init:
        layers.append(nn.BatchNorm2d(channels))
    network = nn.Sequential(*layers, nn.ReLU(), *_Classifier(channels, classes))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            _init(layer, 2.0, _fan_out(layer))
    return network


class FixupBlock(nn.Module):
    """A basic block of Fixup (Zhang et al., 2019): scalar biases before convolutions and activations, and a scale."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(4)])
        self.scale = nn.Parameter(torch.ones(1))
        self.first, self.second = _conv(inputs, outputs, 3, stride, bias=False), _conv(outputs, outputs, 3, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else _conv(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shifted = x + self.biases[0]
        branch = F.relu(self.first(shifted) + self.biases[1])
        branch = self.second(branch + self.biases[2]) * self.scale + self.biases[3]
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(shifted)))


class Shift(nn.Module):
    """x ↦ x + a scalar bias that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """The shifted input."""
        return x + self.bias


def fixup_resnet(depth: int, *, in_channels: int, classes: int, base: int = 64) -> nn.Sequential:
    """ResNet for ImageNet with Fixup in place of batch normalisation (Zhang et al., 2019): depth = 8n + 2.

    A stem of ``base`` channels and 4 stages of n basic blocks of ``base``, 2, 4 and 8 ``base`` channels; ResNet-18 has
    ``base`` 64. First convolutions of the 4n blocks start with a variance divided by 4n, second ones and the classifier
    at 0. Depth 18 has 11,679,954 parameters for 3 channels and 1,000 classes, depth 10 with ``base`` 16 307,760 for 1
    channel and 10 classes.
    """
    blocks = _blocks(depth, 8, 2)
    channels = base
    stem = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
    _init(stem, 2.0, _fan_out(stem))
    layers: list[nn.Module] = [stem, Shift(), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage in range(4):
        width = base * 2**stage
        for block in range(blocks):
            made = FixupBlock(channels, width, 2 if stage > 0 and block == 0 else 1)
            _init(made.first, 2.0 / (4 * blocks), _fan_out(made.first))
            nn.init.zeros_(made.second.weight)
            if made.shortcut is not None:
                _init(made.shortcut, 2.0, _fan_out(made.shortcut))
            layers.append(made)
            channels = width
    pool, flatten, linear = _Classifier(channels, classes)
    nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
    nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, pool, flatten, Shift(), linear)


class DenseLayer(nn.Module):
    """x ↦ [x, conv(relu(norm(x)))]: ``growth`` more channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), _conv(inputs, growth, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input with its output behind."""
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet(depth: int, growth: int, *, in_channels: int, classes: int) -> nn.Sequential:
    """DenseNet (Huang et al., 2017) for small images, the basic one: 3 blocks of (depth − 4)/3 layers.

    A stem of 16 channels, as the paper has it (the authors' code has 24), batch normalisation, no bottleneck, no
    compression, no dropout. Depth 40 and growth 12 has 1,019,722 parameters for 3 channels and 10 classes, 1,060,132
    for 100; depth 7 and growth 12 has 12,538 for 1 channel and 10 classes.
    """
    layers_per_block = _blocks(depth, 3, 4)
    channels = 16
    layers: list[nn.Module] = [_conv(in_channels, channels, 3, bias=False)]
    for block in range(3):
        for _ in range(layers_per_block):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            layers += [_conv(channels, channels, 1, bias=False), nn.AvgPool2d(2)]
    network = nn.Sequential(*layers, *_Classifier(channels, classes))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            _init(layer, 2.0, layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1])
    return network
