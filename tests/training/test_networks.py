import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastfisher.training.config import NETWORKS, ConfigError
from fastfisher.training.networks import build_network


@pytest.mark.parametrize(
    ("name", "in_channels", "image_size", "classes", "expected"),
    [
        ("simple_cnn", 3, 32, 10, 361_898),
        ("vgg11", 3, 32, 10, 9_225_610),
        ("vgg11", 3, 32, 100, 9_271_780),
        ("small_cnn", 1, 16, 10, 38_282),
    ],
)
def test_parameter_counts(name: str, in_channels: int, image_size: int, classes: int, expected: int) -> None:
    network = build_network(name, in_channels=in_channels, image_size=image_size, classes=classes)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("image_size", [8, 11, 16, 40, 64])
def test_logits_for_other_image_sizes(name: str, image_size: int) -> None:
    if name == "simple_cnn" and image_size < 10:
        with pytest.raises(ConfigError, match="--image-size: got 8, expected at least 10 for simple_cnn"):
            build_network(name, in_channels=1, image_size=image_size, classes=7)
        return
    network = build_network(name, in_channels=1, image_size=image_size, classes=7)
    assert network(torch.randn(2, 1, image_size, image_size)).shape == (2, 7)


def test_simple_cnn_works_at_its_stated_minimum() -> None:
    network = build_network("simple_cnn", in_channels=3, image_size=10, classes=10)
    assert network(torch.randn(1, 3, 10, 10)).shape == (1, 10)


def test_vgg11_keeps_the_scale_of_its_gradients() -> None:
    torch.manual_seed(0)
    network = build_network("vgg11", in_channels=3, image_size=32, classes=10)
    loss = F.cross_entropy(network(torch.randn(10, 3, 32, 32)), torch.arange(10))
    first, *_, last = torch.autograd.grad(loss, [p for p in network.parameters() if p.dim() > 1])
    # With PyTorch's default initialisation the ratio is 0.04 and the first norm 7e-4.
    assert first.norm() > 0.2 * last.norm()
    assert first.norm() > 0.05
    assert all((m.bias == 0).all() for m in network if isinstance(m, nn.Conv2d) and m.bias is not None)


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="--network: got 'lenet', expected one of small_cnn"):
        build_network("lenet", in_channels=1, image_size=16, classes=10)
