"""Per-example norms, Tr(F) and inner products against vmap(grad), the explicit Fisher, and their own error bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import grad_inner_products, memory, per_example_grad_norms, trace_fisher
from fastfisher.engine.capture import Capture
from tests.support.networks import Hostile

DTYPES = [torch.float64, torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")  # some networks here take them
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
    """Parameters in distances and a custom autograd.Function, which nothing here follows, and in others."""

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
        x = torch.cdist(torch.tanh(self.first(x)), self.w)
        x = self.Double.apply(x, self.scale)
        return self.head(self.lstm(self.form(x, x)[:, None])[0][:, 0])


def resnet18() -> nn.Module:
    """ResNet-18's layers in a few channels, with strided shortcuts and BatchNorm."""
    from bench.networks import Block

    stem = [nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [(4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1)]
    blocks = [Block(*width) for width in widths]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


class Unusual(nn.Module):
    """A bias that depends on the example, a derived weight changed in place, a constant larger than the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.third, self.shift = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first * 2
        weight += self.second
        x = torch.tanh(F.linear(x, weight))
        x = torch.stack([F.linear(row[None], self.third, row)[0] for row in x])
        x = torch.where(torch.ones(3, 1, 6, dtype=torch.bool), self.shift * x, x).mean(0)
        buffer = torch.zeros(6, dtype=x.dtype)
        buffer[:3] = self.shift[:3]
        return self.head(x + buffer)


UNKNOWN = ("w", "scale")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "SkipInit and Fixup": (SkipInit, (3, 6, 6), ()),
    "ConvNeXt": (ConvNeXt, (3, 8, 8), ()),
    "vision transformer": (VisionTransformer, (3, 4, 4), ()),
    "shared layers": (Shared, (3, 2, 2), ()),
    "derived weights": (Derived, (3, 2, 2), ()),
    "unknown functions": (Unknown, (6,), UNKNOWN),
    "unusual": (Unusual, (6,), ("third",)),
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


# ---- the trace -------------------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()


def images(examples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(examples, 1, 4, 4, generator=generator, dtype=torch.float64)


def fisher_traces(model: nn.Module, x: Tensor) -> Tensor:
    """tr(J_iᵀ (diag(p) − ppᵀ) J_i) for each example, from the explicit Jacobian and Fisher."""
    model.eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    traces = []
    for one in x:
        jacobian = torch.func.jacrev(lambda p, one=one: torch.func.functional_call(model, p, (one[None],))[0])(
            parameters
        )
        j = torch.cat([g.flatten(1) for g in jacobian.values()], 1)
        p = model(one[None])[0].softmax(0).detach()
        fisher = j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
        traces.append(fisher.trace())
    return torch.stack(traces)


def test_exact_is_the_trace_of_the_explicit_fisher() -> None:
    model, x = small_network(), images(20)
    truth = fisher_traces(model, x)
    found = per_example_grad_norms(model, x, labels="exact")
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=0)
    estimate = trace_fisher(model, x, labels="exact", batch_size=7)
    assert estimate.value == pytest.approx(float(truth.mean()), rel=1e-10)
    assert estimate.standard_error == 0.0 and estimate.draws == 0 and estimate.samples == 20
    assert sum(estimate.per_parameter.values()) == pytest.approx(estimate.value, rel=1e-12)
    assert set(estimate.per_parameter) == {name for name, _ in model.named_parameters()}


def test_the_closed_form_of_a_linear_layer() -> None:
    # ∂ℓ/∂W = (p − e_ŷ) xᵀ: E_ŷ‖·‖² = (1 − ‖p‖²)(‖x‖² + 1) with the bias.
    torch.manual_seed(1)
    model, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    p = model(x).softmax(1)
    exact = (1 - p.square().sum(1)) * (x.square().sum(1) + 1)
    torch.testing.assert_close(per_example_grad_norms(model, x, labels="exact"), exact.detach(), rtol=1e-12, atol=0)


def test_exact_over_several_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 2, 4, dtype=torch.float64)
    each = per_example_grad_norms(model, x.reshape(8, 4), labels="exact")  # no layer mixes the two positions
    found = per_example_grad_norms(model, x, labels="exact")
    torch.testing.assert_close(found, each.view(4, 2).sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("labels", ["sampled", "rademacher"])
def test_drawn_labels_have_the_exact_expectation(labels: Any) -> None:
    model, x = small_network(), images(6)
    truth = per_example_grad_norms(model, x, labels="exact")
    found = per_example_grad_norms(model, x, labels=labels, draws=800, generator=torch.Generator().manual_seed(1))
    assert found.shape == (800, 6)
    z = (found.mean(0) - truth) / (found.std(0) / 800**0.5)
    assert float(z.abs().max()) < 4.0  # six of them: two-sided significance 4e-4
    one, two = found[:, :3].mean(1), found[:, 3:].mean(1)
    assert float(torch.corrcoef(torch.stack([one, two]))[0, 1].abs()) < 4 / 800**0.5  # independent between examples


@pytest.mark.parametrize(
    ("labels", "draws", "samples"),
    [("rademacher", 1, None), ("sampled", 3, None), ("rademacher", 4, 40), ("exact", 1, 20)],
)
def test_the_standard_error_is_calibrated(labels: Any, draws: int, samples: int | None) -> None:
    """Over 200 repeats the interval of 1.96 standard errors covers the truth 90 to 99 % of the time.

    With one draw it is that of the distribution of the examples, so that they are drawn anew for each repeat.
    """
    model, repeats = small_network(), 200
    population = images(20_000, seed=5)
    generator = torch.Generator().manual_seed(2)
    fresh = draws == 1 and labels != "exact"
    data = population[:60]
    truth = float(per_example_grad_norms(model, population if fresh else data, labels="exact").mean())
    covered = 0
    for repeat in range(repeats):
        x = population[60 * repeat : 60 * (repeat + 1)] if fresh else data
        estimate = trace_fisher(model, x, labels=labels, draws=draws, samples=samples, generator=generator)
        covered += abs(estimate.value - truth) <= 1.96 * estimate.standard_error
    assert 0.90 * repeats <= covered <= 0.99 * repeats, covered


def test_tolerance_draws_until_the_error_bar_is_small_enough() -> None:
    model, x = small_network(), images(10)
    truth = float(per_example_grad_norms(model, x, labels="exact").mean())
    generator = torch.Generator().manual_seed(0)
    estimate = trace_fisher(model, x, tolerance=0.02, labels="sampled", generator=generator)
    assert estimate.standard_error <= 0.02 * estimate.value and estimate.draws > 2
    assert abs(estimate.value - truth) < 4 * estimate.standard_error
    with pytest.raises(ValueError, match="iterated again"):
        trace_fisher(model, iter([x]), tolerance=1e-9, labels="sampled")


def test_data_may_be_tensors_pairs_loaders_and_streams() -> None:
    model, x, y = small_network(), images(20), torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
    expected = per_example_grad_norms(model, x, y, labels="true").mean()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    for data in ((x, y), loader, [(x[:5], y[:5]), [x[5:], y[5:]]], iter([(x, y)]), ((x,), y), ({"input": x}, y)):
        estimate = trace_fisher(model, data, labels="true", batch_size=7)
        assert estimate.value == pytest.approx(float(expected), rel=1e-12) and estimate.samples == 20
        assert estimate.standard_error == 0.0
    few = trace_fisher(model, loader, labels="true", samples=8)
    first = per_example_grad_norms(model, x[:8], y[:8], labels="true")
    assert few.value == pytest.approx(float(first.mean()), rel=1e-12) and few.samples == 8
    assert few.standard_error == pytest.approx(float(first.std()) / 8**0.5, rel=1e-12)
    unlabelled = [trace_fisher(model, d, generator=torch.Generator().manual_seed(1)).value for d in (x, [x], loader)]
    assert unlabelled[0] == unlabelled[1] == pytest.approx(unlabelled[2], rel=1e-9)


@pytest.mark.parametrize("labels", ["sampled", "rademacher"])
def test_the_labels_do_not_depend_on_the_batches(labels: Any) -> None:
    model, x = small_network(), images(20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=6)

    def trace(data: Any, batch_size: int | None = None) -> tuple[float, float, int]:
        generator = torch.Generator().manual_seed(3)
        found = trace_fisher(
            model, data, labels=labels, draws=2, tolerance=0.03, batch_size=batch_size, generator=generator
        )
        return found.value, found.standard_error, found.draws

    expected = trace(x)
    assert expected[2] > 2  # several passes
    for found in (trace(x, 7), trace(x, 1), trace(loader), trace([[x[:11]], [x[11:]]])):
        assert found == pytest.approx(expected, rel=1e-9)


def test_batches_grow_while_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_network(), images(memory.BATCH * 6)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    def trace(**options: Any) -> float:
        sizes.clear()
        return trace_fisher(model, x, verify=False, generator=torch.Generator().manual_seed(0), **options).value

    expected = trace()
    assert sizes == [memory.BATCH] * 6  # a CPU
    monkeypatch.setattr("fastfisher.measure.fisher.held", lambda device: 10 * sum(sizes))
    monkeypatch.setattr(
        "fastfisher.measure.fisher.may_double", lambda activations, device: activations < 20 * memory.BATCH
    )
    assert trace() == pytest.approx(expected, rel=1e-9)
    assert sizes == [memory.BATCH, 2 * memory.BATCH, 2 * memory.BATCH, memory.BATCH]
    assert trace(batch_size=memory.BATCH) == expected and sizes == [memory.BATCH] * 6  # as it was asked for


def test_a_batch_is_doubled_where_there_is_room_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    assert memory.held(gpu) == 1 << 30 and memory.free(gpu) == 8 << 30  # of the driver, and kept by PyTorch
    assert memory.may_double(1 << 30, gpu) and not memory.may_double((1 << 30) + 1, gpu)
    assert not memory.may_double(0, torch.device("cpu"))


def test_the_minibatch_trace_has_the_trace_over_b_as_its_mean() -> None:
    model, x = small_network(), images(8)
    truth = float(per_example_grad_norms(model, x, labels="exact").mean()) / 8
    found = [
        trace_fisher(model, x, labels="sampled", minibatch=True, generator=torch.Generator().manual_seed(s)).minibatch
        for s in range(400)
    ]
    values = torch.tensor([f for f in found if f is not None])
    assert float((values.mean() - truth).abs()) < 4 * float(values.std()) / 400**0.5
    assert trace_fisher(model, x, labels="exact", minibatch=True).minibatch == pytest.approx(truth, rel=1e-10)


def test_a_loss_of_ones_own_and_chosen_parameters() -> None:
    model, x = small_network().eval(), images(6)
    y = torch.randn(6, 3, dtype=torch.float64)
    mse = lambda logits, targets: (logits - targets).square().sum(1)  # noqa: E731
    chosen = [model[0].weight, model[4].bias]
    norms = per_example_grad_norms(model, x, y, labels="true", loss=mse, params=chosen, squared=False)
    for i in range(6):
        g = torch.autograd.grad(mse(model(x[i : i + 1]), y[i : i + 1]).sum(), chosen)
        assert float(norms[i]) == pytest.approx(float(torch.cat([t.flatten() for t in g]).norm()), rel=1e-10)
    given = per_example_grad_norms(model, x, labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    soft = per_example_grad_norms(model, x, F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).double(), labels="true")
    torch.testing.assert_close(given, soft)


@pytest.mark.parametrize("build", [small_network, Shared, lambda: GPT(looked_up=True), Unknown])
def test_inner_products(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(6)
    model = build().double()
    if isinstance(model, GPT):
        model.place.requires_grad_(False)
        a, b = (torch.randint(11, (4, 7)) for _ in range(2))
        y, z = (torch.randint(11, (4, 7)) for _ in range(2))
    else:
        shape = {Shared: (3, 2, 2), Unknown: (6,)}.get(type(model), (1, 4, 4))
        (a, y), (b, z) = ((torch.randn(4, *shape, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(2))
    gradients = [
        torch.cat([g.flatten(1) for g in per_example_gradients(model, i, t).values()], 1) for i, t in ((a, y), (b, z))
    ]
    found = grad_inner_products(model, (a, y), (b, z))
    assert found.per_example is not None
    torch.testing.assert_close(found.per_example, (gradients[0] * gradients[1]).sum(1), rtol=1e-9, atol=1e-12)
    means = [g.mean(0) for g in gradients]
    assert found.mean == pytest.approx(float(means[0] @ means[1]), rel=1e-9)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(*means, dim=0)), rel=1e-9)
    uneven = grad_inner_products(model, (a[:3], y[:3]), (b, z))
    assert uneven.per_example is None
    assert uneven.mean == pytest.approx(float(gradients[0][:3].mean(0) @ means[1]), rel=1e-9)


def test_torchvisions_resnet18_agrees_with_one_backward_per_example(torchvision: Any) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).double()
    x, y = torch.randn(3, 3, 40, 40, dtype=torch.float64), torch.tensor([0, 3, 1])
    expected = per_example_gradients(model.eval(), x, y)
    found = per_example_grad_norms(model.train(), x, y, labels="true")
    assert model.training
    wanted = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    # Each parameter for itself, batch normalisation's own ones included.
    for name, parameter in list(model.named_parameters())[::7]:
        alone = per_example_grad_norms(model, x, y, labels="true", params=[parameter])
        torch.testing.assert_close(alone, expected[name].flatten(1).square().sum(1), rtol=1e-9, atol=0)


def test_the_same_bits_on_repeat_and_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    model, x = resnet18(), torch.randn(16, 3, 32, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            # The layers themselves are PyTorch's; at this size it splits them by example.
            found.append(trace_fisher(model, x, generator=torch.Generator().manual_seed(1)))
    finally:
        torch.set_num_threads(threads)
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("error", [RuntimeError("forward"), KeyboardInterrupt()])
def test_everything_is_as_it_was_after_an_exception(error: BaseException) -> None:
    model = small_network().train()
    model[5].eval()
    hostile = Hostile(model, error)
    x = images(6)
    state = {n: t.clone() for n, t in hostile.state_dict().items()}
    pointers = [p.data_ptr() for p in hostile.parameters()]
    random = torch.get_rng_state()
    trace_fisher(model, x, generator=torch.Generator())
    per_example_grad_norms(hostile, x, generator=torch.Generator(), verify=False)
    with pytest.raises(type(error)):
        trace_fisher(hostile, x, generator=torch.Generator())
    assert all(torch.equal(t, state[n]) for n, t in hostile.state_dict().items())
    assert [p.data_ptr() for p in hostile.parameters()] == pointers
    assert [m.training for m in model] == [True] * 5 + [False, True] and hostile.training
    assert all(p.requires_grad and p.grad is None and not p._backward_hooks for p in hostile.parameters())
    assert torch.equal(torch.get_rng_state(), random) and not x.requires_grad
    assert not hasattr(x, "_fastfisher_depends")


def test_what_couples_the_examples_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(ValueError, match=r"batch norm of 5 channels.*couples the examples"):
        per_example_grad_norms(model, torch.randn(3, 4))


class InPlace(nn.Module):
    """Overwrites the input of a layer after the layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        x.mul_(2)
        return x + y


def test_an_overwritten_input_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # autograd's own
        per_example_grad_norms(InPlace(), torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="modified in place"):
        per_example_grad_norms(InPlace(), torch.randn(3, 4), verify=False)


def test_bad_arguments_are_named() -> None:
    model, x = small_network(), images(4)
    y = torch.zeros(4, dtype=torch.long)
    for arguments, message in [
        (
            {"labels": "drawn"},
            'labels: expected "sampled", "true", "uniform", "rademacher", "exact" or a tensor, got \'drawn\'',
        ),
        ({"labels": "true"}, "targets: expected the true labels"),
        ({"draws": 0}, "draws: expected an integer >= 1, got 0"),
        ({"loss": F.mse_loss}, "loss: expected None"),
        ({"params": [torch.zeros(3)]}, "params: item 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            per_example_grad_norms(model, x, **arguments)
    for arguments, message in [
        ({"labels": y}, 'labels: expected "sampled", .* or "exact", got a tensor'),
        ({"labels": "true"}, "targets: expected"),
        ({"samples": 0}, "samples: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"tolerance": -1.0}, "tolerance: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            trace_fisher(model, x, **arguments)
    with pytest.raises(ValueError, match="data: expected at least one example"):
        trace_fisher(model, [])
    with pytest.raises(ValueError, match="data: expected one target per input, got 3 for 4"):
        trace_fisher(model, (x, y[:3]))
    with pytest.raises(TypeError, match="data: expected tensors or an iterable"):
        trace_fisher(model, 3)
    with pytest.raises(ValueError, match="loss: expected one value per example"):
        per_example_grad_norms(model, x, y, labels="true", loss=F.cross_entropy)
    with pytest.raises(ValueError, match="model: expected logits"):
        per_example_grad_norms(nn.Sequential(nn.Flatten(0), nn.Linear(64, 3).double()), x)
    with pytest.raises(TypeError, match="model: expected it to return logits"):
        per_example_grad_norms(nn.MultiheadAttention(4, 2).double(), (x[0], x[0], x[0]))
    with pytest.raises(ValueError, match='labels: expected "true", "sampled"'):
        grad_inner_products(model, (x, y), (x, y), labels="exact")


def test_nothing_of_the_size_of_examples_times_parameters_exists() -> None:
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)),
        torch.randn(512, 1, 16, 16),
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        per_example_grad_norms(model, x)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 512 * 512 * 2  # two float32 arrays of examples x features at once, 128 times less than N·p


def test_the_capture_says_what_it_could_not_follow() -> None:
    model = Unknown()
    capture = Capture(model, torch.randn(3, 6), [name for name, _ in model.named_parameters()])
    assert set(capture.fallbacks) == set(UNKNOWN)
    assert "cdist" in capture.fallbacks["w"]
    assert "autograd.Function" in capture.fallbacks["scale"]
    assert set(capture.apart) == {name for name, _ in model.named_parameters()} - set(UNKNOWN)
    with pytest.warns(fastfisher.SlowPathWarning, match=r"gradients of w take a backward for each example: .*cdist"):
        estimate = trace_fisher(model, torch.randn(3, 6))
    assert estimate.fallbacks == capture.fallbacks
