"""Networks and data that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.problems import flat, relative_error, torchvision_operators

__all__ = ["flat", "relative_error", "torchvision_operators"]


class SmallResNet(nn.Module):
    """Three residual blocks with BatchNorm: the smallest network whose examples are coupled in train mode."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = torch.relu_(self.first_norm(self.first(x)) + x)
        return self.head(x.mean((2, 3)))


def smooth_network() -> nn.Module:
    """Softplus and average pooling: no kinks anywhere."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(16), nn.Softplus(),
        nn.Linear(16, 10),
    )  # fmt: skip


class Hostile(nn.Module):
    """Raises in its second forward, after the parameters have been read."""

    def __init__(self, model: nn.Module, error: BaseException) -> None:
        super().__init__()
        self.model, self.error, self.calls = model, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits = self.model(x)
        if self.calls > 1:
            raise self.error
        return logits


class OnceDifferentiable(torch.autograd.Function):
    """x³, whose gradient PyTorch takes for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Shared(nn.Module):
    """One layer applied twice: the logits are quadratic in its weight."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(inputs, 4), nn.Linear(4, 4), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(self.stem(x.flatten(1))).relu()))
