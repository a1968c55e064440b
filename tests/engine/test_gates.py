"""Every gated function replays: the same values and gradients at θ, and linear in its input from there on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import AccuracyWarning, Gates, SlowPathWarning, record_gates
from tests.support.networks import relative_error

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x * 1, inplace=True),
    "F.relu inplace by position": lambda x: F.relu(x * 1, True),
    "torch.relu": torch.relu,
    "Tensor.relu_ as a statement": lambda x: (lambda y: (y.relu_(), y)[1])(x * 1),
    "nn.ReLU inplace": lambda x: nn.ReLU(inplace=True)(x * 2),
    "relu channels last": lambda x: F.relu(x.to(memory_format=torch.channels_last)),
    "relu of a transpose": lambda x: F.relu(x.transpose(1, 3)),
    "relu6": lambda x: F.relu6(x * 4),
    "nn.ReLU6": lambda x: nn.ReLU6()(x * 4),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "nn.LeakyReLU inplace": lambda x: nn.LeakyReLU(0.1, inplace=True)(x * 1),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3])),
    "nn.PReLU": nn.PReLU(),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "clamp between crossing bounds": lambda x: x.clamp(x.detach().flip(1) * 0 + 0.3, x.detach().flip(1) * 0 + 0.1) + x,
    "nn.Hardtanh": lambda x: nn.Hardtanh(-0.5, 0.7)(x),
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp by name": lambda x: torch.clamp(x, max=0.4),
    "clamp with tensors": lambda x: torch.clamp(x, min=torch.zeros(8), max=torch.ones(8)),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max_": lambda x: (x * 1).clamp_max_(0.1),
    "abs": torch.abs,
    "abs()": abs,
    "max": torch.max,
    "max of a dimension": lambda x: x.max(1).values,
    "min of a dimension kept": lambda x: torch.min(x, dim=2, keepdim=True)[0],
    "max of two": lambda x: torch.max(x, x.flip(0)),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum with ties": lambda x: torch.minimum(x, x),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: torch.amin(x, dim=-1, keepdim=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "nn.MaxPool2d": nn.MaxPool2d(3, ceil_mode=True),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 3),
    "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(3),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "amax by NumPy's names": lambda x: torch.amax(input=x, axis=2),
    "maximum by name": lambda x: torch.maximum(input=x, other=x.flip(0)),
    "max(axis=)": lambda x: x.max(axis=2)[0],
    "fmin": lambda x: torch.fmin(x, x.flip(0)),
    "maximum with -inf": lambda x: torch.maximum(x, torch.full_like(x, -torch.inf)),
    "sort": lambda x: x.sort(1, descending=True)[0],
    "sort stable": lambda x: torch.sort(x, dim=2, stable=True).values,
    "msort": torch.msort,
    "argsort": lambda x: x.gather(1, x.argsort(1)),
    "argmax": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "topk": lambda x: x.topk(2, 1).values,
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True)[0],
    "median": torch.median,
    "median of a dimension": lambda x: x.median(1).values,
    "nanmedian": lambda x: x.nanmedian(dim=2, keepdim=True)[0],
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: torch.cummin(x, dim=2).values,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "a mask": lambda x: x * (x > 0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "index_put": lambda x: (lambda y: (y.__setitem__(y < 0, 0), y)[1])(x.clone()),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.flatten()[(x.flatten() > 0).nonzero()[:, 0]],
    "an if": lambda x: x if x.sum() > 0 else -2 * x,
    "item": lambda x: x * float(x.abs().max().item()),
    "a mask changed in place": lambda x: (lambda m: x * m.logical_xor_(m.flip(0)))(x > 0),
    "sign": lambda x: x * (1 + torch.sign(x)) / 2,
    "floor": lambda x: x - x.floor(),
    "round_": lambda x: x * 2 - (x * 3).round_(),
    "frac": lambda x: (3 * x).frac(),
    "remainder": lambda x: (3 * x) % 1.0,
    "fmod": lambda x: torch.fmod(3 * x, 0.7),
    "floor_divide": lambda x: x + (3 * x.detach()) // 1,
    "div rounding": lambda x: x + torch.div(3 * x, 0.3, rounding_mode="trunc"),
    "heaviside": lambda x: x * torch.heaviside(x.detach(), x.new_zeros(())),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype)),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "hardshrink": F.hardshrink,
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "rrelu in eval": lambda x: F.rrelu(x, 0.1, 0.3, training=False),
    "norm of 1": lambda x: x.norm(p=1, dim=1),
    "norm of infinity": lambda x: torch.linalg.vector_norm(x, torch.inf, dim=(1, 2), keepdim=True),
    "dist of 1": lambda x: torch.dist(x, x.flip(0) * 2, p=1),
    "l1_loss": lambda x: F.l1_loss(x, torch.zeros_like(x), reduction="none"),
    "copysign": lambda x: torch.copysign(x, -x),
    "scatter_reduce": lambda x: x[0, 0].scatter_reduce(1, torch.zeros(8, 8, dtype=torch.long), x[0, 1], "amax"),
    "detach": lambda x: x * x.detach(),
    "no_grad": lambda x: x * _without_grad(x),
    "a straight-through estimator": lambda x: x + (x.round() - x).detach(),
}


@torch.no_grad()
def _without_grad(x: Tensor) -> Tensor:
    return x.abs().add_(x.relu()).mean()


CURVED: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x, 0.5),
    "elu inplace": lambda x: F.elu(x * 1, 0.3, inplace=True),
    "selu": torch.selu,
    "hardswish": lambda x: F.hardswish(4 * x),
    "hardswish inplace": lambda x: F.hardswish(4 * x, True),
    "norm of 1 in a ratio": lambda x: F.normalize(x, p=1, dim=1),
    "softsign": F.softsign,
    "log of a guard": lambda x: x.clamp(min=0.3).log(),
}
"""Functions that are smooth, but not linear, on each side of their kinks."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_replay_is_the_recorded_linear_map(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    function = FUNCTIONS[name]
    x, direction = (torch.randn(4, 3, 8, 8, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    if isinstance(function, nn.Module):
        function.to(dtype)
    if name == "hardsigmoid" and dtype == torch.float64:
        pytest.skip("PyTorch's own slope is 1/6 in float32")
    if name == "prelu":
        function = lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3], dtype=dtype))  # noqa: E731
    gates, tolerance = _check_at_the_recorded_point(function, x)
    along = []
    for t in (0, 1, 2):
        with gates.replay():
            along.append(function(x + t * direction))
    torch.testing.assert_close(along[0] + along[2], 2 * along[1], rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("name", CURVED)
def test_what_is_replayed_is_smooth(name: str) -> None:
    torch.manual_seed(0)
    function = CURVED[name]
    x, direction = (torch.randn(64, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    gates, _ = _check_at_the_recorded_point(function, x.requires_grad_())
    slopes = []
    for t in (0.0, 1e-6):
        with gates.replay():
            out = function(x + t * direction)
        slopes.append(torch.autograd.grad(out.nansum(), x)[0])
    # Of 12,288 elements some cross a kink within the step, where a slope that is not replayed jumps by 0.1 or more.
    assert float((slopes[1] - slopes[0]).abs().nan_to_num().max()) < 1e-2


def _check_at_the_recorded_point(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Gates, float]:
    """Values and gradients of recording and replay are those of the function."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        with record_gates() as gates:
            recorded = function(x)
    plain = function(x)
    tolerance = 8 * torch.finfo(x.dtype).eps
    assert gates.entries
    torch.testing.assert_close(recorded, plain, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, x, cotangent)
    (found,) = torch.autograd.grad(recorded, x, cotangent)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for _ in range(2):  # as often as one likes
        with gates.replay():
            replayed = function(x)
        torch.testing.assert_close(replayed, plain, rtol=tolerance, atol=tolerance)
        (found,) = torch.autograd.grad(replayed, x, cotangent)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return gates, tolerance


def test_a_user_s_own_forward_with_dropout_replays() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.5, training=True).relu()
            return torch.maximum(x.flatten(1) @ torch.ones(64, 6), torch.rand(6))

    torch.manual_seed(1)
    model, x = Own(), torch.randn(3, 64)
    with record_gates(model) as gates:
        first = model(x)
    state = torch.get_rng_state()
    with gates.replay():
        assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), first)


@pytest.mark.parametrize("frozen", [True, False])
def test_random_state_comes_back_after_an_exception(frozen: bool) -> None:
    with record_gates(frozen=frozen) as gates:
        torch.rand(3)
    torch.rand(5)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), gates.replay():
        torch.rand(3)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), state)


def test_another_path_is_an_error() -> None:
    x = torch.randn(4)
    with record_gates() as gates:
        x.relu()
        x.abs()
    with pytest.raises(ValueError, match="calls abs where the recorded one did not"), gates.replay():
        x.abs()
    with pytest.raises(ValueError, match="did not call abs"), gates.replay():
        x.relu()
    with pytest.raises(ValueError, match="calls relu where"), gates.replay():
        x.relu(), x.abs(), x.relu()
    with pytest.raises((RuntimeError, ValueError)), gates.replay():
        torch.randn(64).relu()


def test_what_cannot_be_recorded_is_said() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    with (
        pytest.warns(SlowPathWarning, match="module '0' without torch.compile"),
        record_gates(nn.Sequential(compiled)),
    ):
        pass
    with pytest.raises(ValueError, match="TorchScript"), record_gates(torch.jit.script(nn.Linear(2, 2))):
        pass
    with pytest.warns(AccuracyWarning, match="torch.quantile is not among"), record_gates():
        torch.quantile(torch.randn(3, requires_grad=True), 0.3)


def test_relu_gates_take_a_bit_each() -> None:
    x = torch.randn(64, 1024)
    with record_gates() as gates:
        x.relu()
    bits = gates.entries[0].saved.bits
    assert bits.numel() * bits.element_size() * 8 == x.numel()


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clone()
        y.mul_(x).mul_(x)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class _Masked(torch.autograd.Function):
    """A ReLU by a mask, which is discrete and has to be replayed; without a context in its forward."""

    @staticmethod
    def forward(x):
        mask = x > 0
        return x * mask, mask

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return g * ctx.saved_tensors[0]


@pytest.mark.parametrize("function", ["cube", "mask"])
def test_what_a_custom_function_computes_moves_and_its_masks_are_replayed(function):
    call = _Cube.apply if function == "cube" else lambda z: _Masked.apply(z)[0]
    torch.manual_seed(0)
    first, second, x = nn.Linear(5, 16).double(), nn.Linear(16, 4).double(), torch.randn(8, 5).double()
    run = lambda z: second(call(first(z)))  # noqa: E731
    with record_gates() as gates:
        run(x)
    slope = torch.randn_like(x)
    moved = x + 0.3 * slope
    with gates.replay():
        found = run(moved)
    if function == "cube":
        expected = second(first(moved) ** 3)
    else:
        expected = second(first(moved) * (first(x) > 0))
        assert not torch.equal(first(moved) > 0, first(x) > 0), "no gate changes: the test shows nothing"
    torch.testing.assert_close(found, expected)


class Inner(nn.Module):
    def __init__(self, act: type[nn.Module], use: Any) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 6))
        self.head, self.use = nn.Linear(6, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.energy, x))


TRANSFORMED: dict[str, Any] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: sum(torch.func.jvp(f, (x,), (torch.ones_like(x),))),
    "grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x),
    "jacrev": lambda f, x: torch.func.vmap(torch.func.jacrev(f))(x).mean(1),
    "autograd.grad": lambda f, x: torch.autograd.grad(
        f(y := x.detach().requires_grad_()).square().sum(), y, create_graph=True
    )[0],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_within_the_forward(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 6, dtype=torch.float64, generator=generator), torch.arange(9) % 4

    def part(act: type[nn.Module], **options: Any) -> Tensor:
        torch.manual_seed(0)
        model = Inner(act, TRANSFORMED[name]).double()
        value = fastfisher.penalty(model, x, labels=y, **options)
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        return torch.cat([g.reshape(-1) for g in found if g is not None])

    options: dict[str, Any] = {"method": "finite_difference", "difference": "central"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastfisher.AccuracyWarning)
        assert relative_error(part(nn.Tanh, **options), part(nn.Tanh)) < 1e-6
        if name == "autograd.grad":
            assert relative_error(part(nn.ReLU, **options), part(nn.ReLU)) < 1e-6
        else:
            with pytest.raises(NotImplementedError, match=r"relu within torch.func.vmap.*double_backprop"):
                part(nn.ReLU, **options)


def fake_quantized(how: str) -> nn.Module:
    quantization = torch.ao.quantization
    fused = how == "fused"
    make = quantization.FusedMovingAvgObsFakeQuantize if fused else quantization.FakeQuantize
    by_tensor, by_channel = quantization.MovingAverageMinMaxObserver, quantization.MovingAveragePerChannelMinMaxObserver

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(20, 16), nn.Linear(16, 4)
            self.act = make(observer=by_tensor, quant_min=0, quant_max=255, dtype=torch.quint8)
            self.weight = make(
                observer=by_channel,
                quant_min=-128,
                quant_max=127,
                dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(torch.relu(F.linear(x, self.weight(self.body.weight), self.body.bias)))
            return self.head(out)

    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("how", ["observed", "fused"])
def test_fake_quantisation_is_the_line_that_autograd_takes_it_for(how: str) -> None:
    x, y = torch.randn(24, 20, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4

    def step(**options: Any) -> nn.Module:
        model = fake_quantized(how)
        fastfisher.FisherPenalty(model, 1.0, every=1, labels="true", **options).backward(x, y)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("error", fastfisher.AccuracyWarning)
        found, exact = step(), step(method="double_backprop")
    # These functions have a float32 form alone.
    plain = fake_quantized(how)
    F.cross_entropy(plain(x), y).backward()
    parts = [
        torch.cat([(p.grad - q.grad).reshape(-1) for p, q in zip(m.parameters(), plain.parameters(), strict=True)])
        for m in (found, exact)
    ]
    assert relative_error(*parts) < 1e-2
    assert all(map(torch.equal, found.buffers(), exact.buffers()))


@pytest.mark.parametrize("name", ["round", "sign", "floor", "round_"])
def test_steps_under_detach_are_replayed(name: str) -> None:
    def stepped(z: Tensor) -> Tensor:
        held = (getattr(torch.Tensor, name)(3 * z.clone())).detach()
        return z * held + torch.where(z.sign() > 0, z, 0.5 * z)

    x, y = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4

    def part(**options: Any) -> Tensor:
        torch.manual_seed(0)
        model = Inner(nn.Tanh, lambda f, x: stepped(f(x))).double()
        found = torch.autograd.grad(fastfisher.penalty(model, x, labels=y, **options), list(model.parameters()))
        return torch.cat([g.reshape(-1) for g in found])

    assert relative_error(part(method="finite_difference", difference="central"), part()) < 1e-6
