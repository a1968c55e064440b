"""Per-example norms, Tr(F) and inner products against vmap(grad), the explicit Fisher, and their own error bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import per_example_grad_norms, trace_fisher

DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def per_example_gradients(model: nn.Module, inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """By name, [N, *shape]: one backward for each example, in eval mode, of the summed cross-entropy."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(len(targets)):
        one = tuple(x[i : i + 1] for x in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]
        logits = model(*one) if isinstance(inputs, tuple) else model(one)
        loss = F.cross_entropy(logits.flatten(0, -2), targets[i : i + 1].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    for module, mode in training.items():
        module.training = mode
    return {name: torch.stack(each).detach() for name, each in found.items()}


def check(
    model: nn.Module, inputs: Any, targets: Tensor, dtype: torch.dtype = torch.float64, fallbacks: tuple[str, ...] = ()
) -> None:
    """Norms, their split by parameter and Tr(F_B) against :func:`per_example_gradients` in float64."""

    def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    def inputs_as(dtype: torch.dtype) -> Any:
        return tuple(cast(x, dtype) for x in inputs) if isinstance(inputs, tuple) else cast(inputs, dtype)

    model.to(dtype)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    data = inputs_as(dtype)
    norms = per_example_grad_norms(model, data, targets, labels="true")
    estimate = trace_fisher(model, (data, targets), labels="true", batch_size=len(targets), minibatch=True)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.double()
    gradients = per_example_gradients(model, inputs_as(torch.float64), targets)
    expected = {name: g.reshape(len(g), -1).square().sum(1) for name, g in gradients.items()}
    total = torch.stack(list(expected.values())).sum(0)
    rtol = TOLERANCE[dtype]
    torch.testing.assert_close(norms, total, rtol=rtol, atol=0)
    for name, squared in expected.items():
        scale = float(total.mean())
        found = torch.tensor(estimate.per_parameter[name], dtype=torch.float64)
        torch.testing.assert_close(found, squared.mean(), rtol=10 * rtol, atol=rtol * scale, msg=name)
    assert estimate.value == pytest.approx(float(total.mean()), rel=rtol)
    mean = sum(float(g.mean(0).square().sum()) for g in gradients.values())
    assert estimate.minibatch == pytest.approx(mean, rel=10 * rtol)
    assert set(estimate.fallbacks) == set(fallbacks), estimate.fallbacks


class Head(nn.Module):
    """A layer, a nonlinearity, and a head that reads all positions: [N, …] to logits [N, 4]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(x)).flatten(1))


def data_for(shape: tuple[int, ...], examples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(examples, *shape, generator=generator, dtype=torch.float64),
        torch.randint(4, (examples,), generator=generator),
    )


def conv(dims: int, *args: Any, transposed: bool = False, **kwargs: Any) -> nn.Module:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(*args, **kwargs)


LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 9, bias=False)], (7,)),
    "linear, few positions": (lambda: [nn.Linear(7, 9)], (3, 7)),
    "linear, many positions": (lambda: [nn.Linear(7, 3)], (4, 9, 7)),
    "linear, as many positions as examples": (lambda: [nn.Linear(7, 3)], (5, 7)),
    "conv1d": (lambda: [conv(1, 4, 6, 3, stride=2, padding=1), nn.ReLU(), conv(1, 6, 3, 2)], (4, 11)),
    "conv2d": (lambda: [conv(2, 3, 5, 3, padding=1), nn.ReLU(), conv(2, 5, 8, (2, 3), stride=(2, 1))], (3, 7, 6)),
    "conv2d, dilation and groups": (lambda: [conv(2, 4, 6, 3, dilation=2, groups=2, bias=False)], (4, 8, 7)),
    "conv2d, depthwise": (lambda: [conv(2, 4, 8, 3, padding=1, groups=4), conv(2, 8, 5, 1)], (4, 5, 5)),
    "conv2d, same": (lambda: [conv(2, 3, 5, 4, padding="same"), conv(2, 5, 3, 3, padding="valid")], (3, 7, 6)),
    "conv2d, circular": (lambda: [conv(2, 3, 5, 3, padding=2, padding_mode="circular")], (3, 7, 6)),
    "conv2d, reflect": (lambda: [conv(2, 3, 5, 3, padding=1, padding_mode="reflect")], (3, 7, 6)),
    "conv2d, one pixel": (lambda: [conv(2, 3, 5, 3), conv(2, 5, 6, 1)], (3, 3, 3)),
    "conv3d": (lambda: [conv(3, 2, 4, 3, padding=1, stride=(1, 2, 2)), conv(3, 4, 3, 2, groups=1)], (2, 4, 5, 5)),
    "transposed 1d": (lambda: [conv(1, 4, 6, 3, stride=2, padding=1, output_padding=1, transposed=True)], (4, 5)),
    "transposed 2d": (lambda: [conv(2, 4, 6, 3, stride=2, groups=2, dilation=2, transposed=True)], (4, 4, 5)),
    "transposed 3d": (lambda: [conv(3, 2, 3, 2, stride=2, bias=False, transposed=True)], (2, 3, 3, 3)),
    "batch norm": (lambda: [conv(2, 3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), conv(2, 5, 4, 3)], (3, 7, 6)),
    "batch norm on vectors": (lambda: [nn.Linear(7, 6), nn.BatchNorm1d(6)], (7,)),
    "batch norm first": (lambda: [nn.BatchNorm1d(4)], (4, 9)),
    "layer norm": (lambda: [nn.Linear(7, 6), nn.LayerNorm(6)], (3, 7)),
    "layer norm over images": (lambda: [nn.LayerNorm([3, 7, 6]), nn.LayerNorm([7, 6], bias=False)], (3, 7, 6)),
    "group norm": (lambda: [conv(2, 3, 6, 3), nn.GroupNorm(3, 6)], (3, 7, 6)),
    "instance norm": (lambda: [conv(2, 3, 6, 3), nn.InstanceNorm2d(6, affine=True)], (3, 7, 6)),
    "instance norm, tracked": (
        lambda: [nn.InstanceNorm1d(4, affine=True, track_running_stats=True), conv(1, 4, 3, 2)],
        (4, 9),
    ),
    "rms norm": (lambda: [nn.Linear(7, 6), nn.RMSNorm(6)], (3, 7)),
    "prelu and dropout": (lambda: [nn.Linear(7, 6), nn.Dropout(0.5), nn.Hardswish()], (7,)),
    "encoder layer": (
        lambda: [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1), nn.Linear(8, 3)],
        (5, 8),
    ),
    "encoder layer, norm first": (
        lambda: [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")],
        (6, 8),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_one_backward_per_example(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layers, shape = LAYERS[name]
    model = Head(*layers())
    x, y = data_for(shape)
    model(x.float())
    for module in model.modules():  # affine parameters and statistics that are not the initial ones
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
    check(model, x, y, dtype)


@pytest.mark.parametrize("examples", [1, 2, 3, 4, 8])
def test_any_number_of_examples(examples: int) -> None:
    torch.manual_seed(1)
    x, y = data_for((4, 8), examples)
    model = Head(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LayerNorm(8))
    model(x.float())
    check(model, x, y)


# ---- networks that use their parameters in other ways ----------------------------------------------------------------


class SkipInit(nn.Module):
    """Residual blocks with a scalar gain, and Fixup's scalar biases and scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.gain, self.scale = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor([1.2]))
        self.before, self.after = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(-0.2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.gain * (self.second(x + self.before) * self.scale + self.after)
        return self.head(x.mean((2, 3)))


class ConvNeXt(nn.Module):
    """A ConvNeXt block as in timm: depthwise convolution, channels-last LayerNorm and MLP, layer scale, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head((x + y.mul(self.gamma.reshape(1, -1, 1, 1))).mean((2, 3)))


class GPT(nn.Module):
    """Causal transformer with tied embeddings and learned positions; one set of logits per position."""

    def __init__(self, vocabulary: int = 11, width: int = 8, length: int = 7, looked_up: bool = True) -> None:
        super().__init__()
        self.tokens, self.length, self.looked_up = nn.Embedding(vocabulary, width), length, looked_up
        self.positions = nn.Embedding(length + 2, width)
        self.place = nn.Parameter(torch.randn(length, 1, width))  # for (positions, examples, features)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, batch_first=looked_up, norm_first=True, dropout=0.0)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(self.length, dtype=self.place.dtype)
        if self.looked_up:
            x = self.tokens(tokens) + self.positions(torch.arange(self.length))
            return self.head(self.norm(self.block(x, src_mask=mask, is_causal=True)))
        x = self.tokens(tokens.T) + self.place
        return self.head(self.norm(self.block(x, src_mask=mask))).transpose(0, 1)


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, and windows folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, kdim=3, vdim=3)
        self.windows = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flatten(2).transpose(1, 2)
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.cross(x, memory, memory)[0]
        folded = torch.tanh(self.windows(x.reshape(len(x) * 5, 1, 8)))
        return self.head(folded.view(len(x), 5, 8)[:, 0])


class Shared(nn.Module):
    """One linear layer called twice, and its weight once more on its own; one convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.tanh(self.conv(x))).flatten(1)
        x = self.linear(torch.tanh(self.linear(x)))
        return self.head(torch.tanh(x @ self.linear.weight.t()))


class Derived(nn.Module):
    """Weights that are functions of parameters: weight norm, a mask, standardised weights, slices, a low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 6))
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("mask", (torch.rand(6, 6) > 0.5).float())
        self.masked = nn.Parameter(torch.randn(6, 6))
        self.halves = nn.Parameter(torch.randn(12, 6))
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        x = torch.tanh(F.conv2d(x, weight, self.conv.bias, padding=1)).flatten(1)
        x = torch.tanh(F.linear(self.normed(x), self.masked * self.mask))
        x = F.linear(x, self.halves[:6]) * torch.sigmoid(F.linear(x, self.halves[6:]))
        return torch.addmm(torch.zeros(4, dtype=x.dtype), x, self.a @ self.b)


class Unknown(nn.Module):
    """Parameters in an einsum, an LSTM, a custom autograd.Function and a bilinear form: nothing here follows them."""

    class Double(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, w: Tensor) -> Tensor:
            return x * w * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return grad * w * 2, (grad * x * 2).sum(tuple(range(grad.dim() - 1)))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.form = nn.Bilinear(6, 6, 5)
        self.lstm = nn.LSTM(5, 3, batch_first=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("ni,ij->nj", torch.tanh(self.first(x)), self.w)
        x = self.Double.apply(x, self.scale)
        return self.head(self.lstm(self.form(x, x)[:, None])[0][:, 0])


def resnet18() -> nn.Module:
    """ResNet-18's layers in a few channels, with strided shortcuts and BatchNorm."""
    from bench.networks import Block

    stem = [nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [(4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1)]
    blocks = [Block(*width) for width in widths]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


UNKNOWN = (
    "w",
    "scale",
    "form.weight",
    "form.bias",
    *(f"lstm.{n}_l0" for n in ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]),
)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "SkipInit and Fixup": (SkipInit, (3, 6, 6), ()),
    "ConvNeXt": (ConvNeXt, (3, 8, 8), ()),
    "vision transformer": (VisionTransformer, (3, 4, 4), ()),
    "shared layers": (Shared, (3, 2, 2), ()),
    "derived weights": (Derived, (3, 2, 2), ()),
    "unknown functions": (Unknown, (6,), UNKNOWN),
    "ResNet-18": (resnet18, (3, 32, 32), ()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_one_backward_per_example(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    network, shape, fallbacks = NETWORKS[name]
    check(network(), *data_for(shape), dtype, fallbacks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("looked_up", [True, False])
@pytest.mark.parametrize("examples", [2, 3, 7])
def test_a_gpt_with_tied_embeddings(examples: int, looked_up: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    tokens, targets = torch.randint(11, (examples, 7)), torch.randint(11, (examples, 7))
    tokens[:, 3] = tokens[:, 1]  # repeated tokens add up before they are squared
    model = GPT(looked_up=looked_up)
    for unused in (model.place if looked_up else model.positions.weight,):
        unused.requires_grad_(False)
    check(model, tokens, targets, dtype)


def test_shared_weights_are_not_the_sum_of_norms() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False).double()
    x, y = data_for((4,))
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    separate = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 4, bias=False).double())
    separate[2].load_state_dict(layer.state_dict())
    norms = [per_example_grad_norms(m, x, y, labels="true") for m in (twice, separate)]
    assert (norms[0] / norms[1] - 1).abs().min() > 1e-3
