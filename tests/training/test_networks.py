from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastfisher import FisherPenalty, per_example_grad_norms
from fastfisher.training.config import NETWORKS, NORMALISED_NETWORKS, ConfigError
from fastfisher.training.loop import PENALTIES
from fastfisher.training.networks import build_network
from fastfisher.training.residual_networks import FixupBlock, WideBlock, densenet, fixup_resnet, resnet


@pytest.mark.parametrize(
    ("name", "in_channels", "image_size", "classes", "expected"),
    [
        ("simple_cnn", 3, 32, 10, 361_898),
        ("vgg11", 3, 32, 10, 9_225_610),
        ("vgg11", 3, 32, 100, 9_271_780),
        ("small_cnn", 1, 16, 10, 38_282),
        # Published: "1.0M" (Huang et al., table 2, DenseNet L=40, k=12).
        ("densenet40_12", 3, 32, 10, 1_019_722),
        ("densenet40_12", 3, 32, 100, 1_060_132),
        # Derived: the count of the Wide ResNet code for 6n + 2 = 44, with 100 and with 200 classes.
        ("wresnet44_3_bn", 3, 32, 100, 5_928_180),
        ("wresnet44_3_bn", 3, 32, 200, 5_947_480),
        # Batch normalisation's 2 x 7,392 out; biases, and a gain for each of the 21 blocks in.
        ("wresnet44_3", 3, 32, 100, 5_923_817),
        ("wresnet44_3", 3, 32, 200, 5_943_117),
        # He et al.'s 0.27 M (depth 20) to 0.85 M (depth 56), with biases and 1x1 shortcuts in place of their zeros.
        ("resnet26", 3, 32, 10, 368_682),
        ("resnet26", 3, 32, 100, 374_532),
        ("resnet56", 3, 32, 10, 853_642),
        # ResNet-18's 11,689,512 without its 9,600 of batch normalisation, with 5 scalars a block and 2 more.
        ("fixup_resnet18", 3, 224, 1000, 11_689_512 - 9_600 + 8 * 5 + 2),
        # Counted by hand, layer by layer.
        ("small_simple_cnn", 1, 16, 10, 25_274),
        ("small_vgg11", 1, 16, 10, 578_122),
        ("densenet7_12", 1, 16, 10, 12_538),
        ("wresnet8_1_bn", 1, 16, 10, 77_562),
        ("wresnet8_1", 1, 16, 10, 77_421),
        ("resnet8", 1, 16, 10, 77_418),
        ("resnet14", 1, 16, 10, 174_410),
        ("small_fixup_resnet10", 1, 16, 10, 307_738 + 4 * 5 + 2),
    ],
)
def test_parameter_counts(name: str, in_channels: int, image_size: int, classes: int, expected: int) -> None:
    network = build_network(name, in_channels=in_channels, image_size=image_size, classes=classes)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("image_size", [8, 11, 16, 40, 64])
def test_logits_for_other_image_sizes(name: str, image_size: int) -> None:
    network = build_network(name, in_channels=1, image_size=image_size, classes=7)
    assert network(torch.randn(2, 1, image_size, image_size)).shape == (2, 7)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_penalties_and_measurements_are_verified(name: str) -> None:
    """As the training runs, which leave it to this test."""
    torch.manual_seed(0)
    network = build_network(name, in_channels=3, image_size=16, classes=10)
    x, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    for options in PENALTIES.values():
        FisherPenalty(network, 0.1, **options).backward(x, labels)
    per_example_grad_norms(network.eval(), x, labels=labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_images_below_8_pixels_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--image-size: got 7, expected at least 8 for {name}"):
        build_network(name, in_channels=1, image_size=7, classes=7)


def test_vgg11_keeps_the_scale_of_its_gradients() -> None:
    torch.manual_seed(0)
    network = build_network("vgg11", in_channels=3, image_size=32, classes=10)
    loss = F.cross_entropy(network(torch.randn(10, 3, 32, 32)), torch.arange(10))
    first, *_, last = torch.autograd.grad(loss, [p for p in network.parameters() if p.dim() > 1])
    # With PyTorch's default initialisation the ratio is 0.04 and the first norm 7e-4.
    assert first.norm() > 0.2 * last.norm()
    assert first.norm() > 0.05
    assert all((m.bias == 0).all() for m in network if isinstance(m, nn.Conv2d) and m.bias is not None)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet26", "resnet56", "wresnet44_3", "densenet40_12", "fixup_resnet18"),
        *("resnet8", "resnet14", "wresnet8_1", "densenet7_12", "small_fixup_resnet10"),
    ],
)
def test_a_deep_network_starts_with_a_signal_of_order_one(name: str) -> None:
    """Without normalisation the shortcuts would double it 27 times over, were the branches not small."""
    torch.manual_seed(0)
    network = build_network(name, in_channels=3, image_size=32, classes=10)
    x = torch.randn(16, 3, 32, 32)
    before_classifier = nn.Sequential(*list(network)[:-1])(x)
    assert 0.05 < before_classifier.std() < 20


def test_the_branches_of_skip_init_start_at_zero() -> None:
    network = build_network("wresnet44_3", in_channels=3, image_size=16, classes=10)
    blocks = [m for m in network if isinstance(m, WideBlock)]
    assert len(blocks) == 21
    same = [block for block in blocks if block.shortcut is None]
    x = torch.randn(2, same[0].first.in_channels, 8, 8)
    assert torch.equal(same[0](x), x)


@pytest.mark.parametrize(("name", "blocks"), [("fixup_resnet18", 8), ("small_fixup_resnet10", 4)])
def test_fixup_divides_the_variance_of_a_branch_by_the_number_of_blocks(name: str, blocks: int) -> None:
    torch.manual_seed(0)
    made = [m for m in build_network(name, in_channels=1, image_size=16, classes=10) if isinstance(m, FixupBlock)]
    assert len(made) == blocks
    for block in made:
        weight = block.first.weight
        variance = 2 / (weight.shape[0] * 9 * blocks)
        # Four standard errors of a variance, p = 6e-5.
        assert weight.square().mean().item() == pytest.approx(variance, rel=4 * (2 / weight.numel()) ** 0.5)
        assert not block.second.weight.any()


@pytest.mark.parametrize(("depth", "build"), [(27, resnet), (45, densenet), (20, fixup_resnet), (2, fixup_resnet)])
def test_an_impossible_depth_is_named(depth: int, build: Any) -> None:
    arguments = (12,) if build is densenet else ()
    with pytest.raises(ValueError, match=f"depth: expected .* got {depth}"):
        build(depth, *arguments, in_channels=3, classes=10)


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="--network: got 'lenet', expected one of small_cnn"):
        build_network("lenet", in_channels=1, image_size=16, classes=10)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_known_which_networks_have_batch_normalisation(name: str) -> None:
    network = build_network(name, in_channels=3, image_size=16, classes=10)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == (name in NORMALISED_NETWORKS)
