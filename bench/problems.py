"""What benchmarks and tests share: data, networks trained a little, and how far a gradient is from another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.training.networks import build_network


def digits() -> tuple[Tensor, Tensor]:
    """Images of scikit-learn's digits as 3x32x32, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None], size=32, mode="bilinear")
    images = (images - images.mean()) / images.std()
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def noise() -> tuple[Tensor, Tensor]:
    """512 images of 3x32x32 and labels without any relation."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(512, 3, 32, 32, generator=generator), torch.randint(10, (512,), generator=generator)


def trained(name: str, images: Tensor, targets: Tensor, steps: int) -> nn.Module:
    """A network of this name after so many steps of SGD."""
    torch.manual_seed(1)
    model = build_network(name, in_channels=3, image_size=32, classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
    return model


def flat(tensors: list[Tensor | None]) -> Tensor:
    """All gradients as one float64 vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    """The gradient of ``value`` in all parameters, as one vector."""
    return flat(list(torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


@contextmanager
def torchvision_operators() -> Iterator[None]:
    """Within, torchvision imports beside a CPU build of torch, where it misses two operators that nothing here uses."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        yield
    finally:
        library._destroy()
