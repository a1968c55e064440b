"""Forwards with a second derivative, against PyTorch's values and differences; gradients without one, refused."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastfisher.engine.twice import (
    differentiable_gradients,
    refuse_once_differentiable,
    second_derivatives,
    twice_differentiable,
)


def test_weight_norm_has_a_right_second_derivative_along_every_dimension():
    for dim in (0, 1, 2, -1):
        v = torch.randn(3, 4, 2, dtype=torch.double, requires_grad=True)
        g = torch.norm_except_dim(v, 2, dim).detach().mul(0.7).requires_grad_()

        def normalised(v, g, dim=dim):
            with twice_differentiable():
                return torch._weight_norm(v, g, dim)

        torch.testing.assert_close(normalised(v, g), torch._weight_norm(v, g, dim))
        torch.autograd.gradcheck(normalised, (v, g))
        torch.autograd.gradgradcheck(normalised, (v, g))


MASK = torch.tensor([[False] * 4, [True] * 4, [True, False, True, False], [False, True, True, True]])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"attn_mask": MASK},  # its first row sees nothing
        {"attn_mask": torch.arange(16.0, dtype=torch.double).view(4, 4)},
        {"is_causal": True, "scale": 0.3},
    ],
)
def test_attention_has_a_second_derivative(arguments):
    q, k, v = (torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        with twice_differentiable():
            return F.scaled_dot_product_attention(q, k, v, **arguments)

    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, **arguments))
    torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


def test_attention_inside_a_layer_of_torch_is_seen():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    x, parameters = torch.randn(5, 4, 8), list(layer.parameters())
    with twice_differentiable():
        y = layer(x)
    torch.testing.assert_close(y, layer(x))
    gradients = differentiable_gradients(y.square().mean(), parameters)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)
    assert all(s.isfinite().all() for s in second)


@pytest.mark.parametrize("padding_idx", [None, 2, -3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_have_a_second_derivative(mode, padding_idx):
    torch.manual_seed(0)
    weight = torch.randn(10, 3, dtype=torch.double, requires_grad=True)
    flat, square = torch.randint(10, (9,)), torch.randint(10, (5, 4))
    calls = [
        {"input": square},
        {"input": flat, "offsets": torch.tensor([0, 3, 3, 7])},
        {"input": flat, "offsets": torch.tensor([0, 3, 3, 7, 9]), "include_last_offset": True},
    ]
    for call in calls:
        scales = torch.rand(call["input"].shape, dtype=torch.double, requires_grad=True)
        moving = (weight, scales) if mode == "sum" else (weight,)

        def bags(weight, scales=None, call=call):
            with twice_differentiable():
                return F.embedding_bag(
                    weight=weight, mode=mode, padding_idx=padding_idx, per_sample_weights=scales, **call
                )

        right = F.embedding_bag(
            weight=weight,
            mode=mode,
            padding_idx=padding_idx,
            per_sample_weights=scales if mode == "sum" else None,
            **call,
        )
        got, cotangent = bags(*moving), torch.randn_like(right)
        torch.testing.assert_close(got, right)
        for a, b in zip(
            torch.autograd.grad(got, moving, cotangent, retain_graph=True),
            torch.autograd.grad(right, moving, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        torch.autograd.gradgradcheck(lambda *m, bags=bags: bags(*m).square(), moving, fast_mode=True)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="not in this torch")
def test_a_cross_entropy_in_chunks_has_a_second_derivative():
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    torch.manual_seed(0)
    x, w = (torch.randn(6, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    options = LinearCrossEntropyOptions(chunking_method="auto", batch_chunk_size=2)

    def loss(x, w):
        with twice_differentiable():
            return F.linear_cross_entropy(x, w, torch.arange(6) % 3, options=options)

    torch.testing.assert_close(loss(x, w), F.cross_entropy(x @ w.T, torch.arange(6) % 3))
    torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)


def test_embedding_bags_that_change_their_weights_are_refused():
    weight = torch.full((3, 2), 9.0, requires_grad=True)
    with pytest.raises(NotImplementedError, match="max_norm"), twice_differentiable():
        F.embedding_bag(torch.tensor([[0, 1]]), weight, max_norm=1.0)
    assert bool((weight == 9).all())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class OnceCube(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))


class Detached(Cube):
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return Cube.backward(ctx, g)


class Inside(Cube):
    """Its backward is a Function that is once differentiable."""

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0]
        with torch.enable_grad():
            return torch.autograd.grad(OnceCube.apply(x), x, g, create_graph=torch.is_grad_enabled())[0] * 1.0


class Straight(Cube):
    """Straight-through: its gradient is what it was given, and so is its derivative."""

    @staticmethod
    def backward(ctx, g):
        return g


def loss_through(function):
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    loss = F.cross_entropy(b(function(a(torch.randn(5, 4).double()))), torch.arange(5) % 3)
    return loss, [*a.parameters(), *b.parameters()]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (OnceCube, "OnceCube is once_differentiable"),
        (Detached, "Detached gives gradients without a graph"),
        (Inside, "is once_differentiable"),
    ],
)
def test_gradients_that_cannot_be_differentiated_are_refused(function, said):
    loss, parameters = loss_through(function.apply)
    with pytest.raises(NotImplementedError, match=f'{said}.*use hvp="x"'):
        differentiable_gradients(loss, parameters, way_out='hvp="x"')


def test_gradients_taken_elsewhere_are_looked_through():
    loss, parameters = loss_through(OnceCube.apply)
    with pytest.raises(NotImplementedError, match="OnceCube"):
        refuse_once_differentiable(torch.autograd.grad(loss, parameters, create_graph=True))
    loss, parameters = loss_through(Cube.apply)
    refuse_once_differentiable(torch.autograd.grad(loss, parameters, create_graph=True))


@pytest.mark.parametrize("function", [Cube, Straight])
def test_custom_functions_with_a_differentiable_backward_serve(function):
    loss, parameters = loss_through(function.apply)
    got = differentiable_gradients(loss, parameters)
    plain = {Cube: lambda z: z**3, Straight: lambda z: z + (z**3 - z).detach()}[function]
    loss, parameters = loss_through(plain)
    right = torch.autograd.grad(loss, parameters)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, check_stride=False)


def test_errors_of_missing_derivatives_name_the_way_out():
    weight = torch.randn(4, 3, requires_grad=True)
    bags = F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), weight).tanh().sum()
    (gradient,) = differentiable_gradients(bags, [weight])
    with pytest.raises(NotImplementedError, match=r'embedding_bag.*use hvp="y"'), second_derivatives('hvp="y"'):
        torch.autograd.grad(gradient.sum(), weight)
    with pytest.raises(RuntimeError, match="something else"), second_derivatives("z"):
        raise RuntimeError("something else")
