"""The second derivative along z against autograd's zᵀHz: every rule, whole networks, and what has no rule."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.networks import network
from fastfisher.engine.taylor import NoRule, Tape
from fastfisher.engine.taylor.registry import RULES
from fastfisher.engine.twice import twice_differentiable
from tests.support.networks import SmallResNet

TOLERANCE = 1e-10
DOUBLE = torch.float64


def by_autograd(function: Callable[[], Tensor], parameters: list[Tensor], z: list[Tensor]) -> float:
    """zᵀHz by differentiating gᵀz."""
    with twice_differentiable():
        loss = function()
    g = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    slope = sum((a * b).sum() for a, b in zip(g, z, strict=True))
    h = torch.autograd.grad(slope, parameters, materialize_grads=True)
    return sum(float((a * b).sum()) for a, b in zip(h, z, strict=True))


def tape_of(function: Callable[[], Tensor], parameters: dict[str, Tensor], reduced: bool = False) -> Tape:
    tape = Tape(parameters)
    with tape:
        loss = function()
    tape.finish(loss, reduced=reduced)
    return tape


def check(
    function: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    oracle: Callable[[], Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Compares two directions on one tape with autograd, on a loss that really curves."""
    generator = torch.Generator().manual_seed(7)
    tape = tape_of(function, parameters)
    for _ in range(2):
        z = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters.values()]
        expected = by_autograd(oracle or function, list(parameters.values()), z)
        assert abs(expected) > 1e-6
        assert abs(float(tape.curvature(z)) - expected) <= tolerance * abs(expected)


# ---- every rule: h, of shape (3, 4, 6, 6), and w, of shape (4, 4), both move -----------------------------------------

C = torch.linspace(-1, 1, 3 * 4 * 36, dtype=DOUBLE).view(3, 4, 6, 6)  # does not move
MASK = C.sin() > 0.1
POSITIVE = lambda h: h.square() + 0.5  # noqa: E731
LABELS = torch.tensor([1, 0, 3])
ROWS = torch.tensor([2, 0])
LABELS_OF_ROWS = torch.tensor([[0, 1, 2, 3, -100, 0], [1, 1, -100, 2, 2, 3], [0, 0, 0, 1, 3, 2]])

CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # views, and what is linear in one input
    "view": lambda h, w: h.view(3, -1),
    "reshape": lambda h, w: h.reshape(-1, 6),
    "flatten": lambda h, w: torch.flatten(h, 1),
    "unflatten": lambda h, w: h.flatten(1).unflatten(1, (4, 36)),
    "permute": lambda h, w: h.permute(0, 2, 3, 1) @ w,
    "transpose": lambda h, w: h.transpose(1, 3).contiguous(),
    "T": lambda h, w: w.T @ h.flatten(2),
    "mT": lambda h, w: h.mT,
    "squeeze": lambda h, w: h.unsqueeze(1).squeeze(1),
    "expand": lambda h, w: w.expand(3, 4, 4),
    "narrow": lambda h, w: h.narrow(2, 1, 3),
    "getitem": lambda h, w: h[:, 1:, ::2] * h[..., :1, :][:, 1:],
    "index_select": lambda h, w: h.index_select(1, torch.tensor([0, 2])),
    "gather": lambda h, w: h.gather(3, torch.zeros(3, 4, 6, 2, dtype=torch.long)),
    "chunk": lambda h, w: h.chunk(2, 1)[0] * h.chunk(2, 1)[1],
    "split": lambda h, w: torch.cat([part.tanh() for part in torch.split(h, 2, 2)], 2),
    "unbind": lambda h, w: h.unbind(1)[1] * h.unbind(1)[2],
    "sum": lambda h, w: h.sum((2, 3)),
    "mean": lambda h, w: h.mean(1, keepdim=True) * h,
    "cumsum": lambda h, w: h.cumsum(2),
    "roll": lambda h, w: h.roll(1, 2) * h,
    "flip": lambda h, w: h.flip(2) * h,
    "tril": lambda h, w: h.tril(),
    "neg": lambda h, w: -h,
    "repeat": lambda h, w: h.repeat(1, 2, 1, 1),
    "to": lambda h, w: h.float().double() if False else h.to(DOUBLE).clone(),
    "avg_pool2d": lambda h, w: F.avg_pool2d(h, 2),
    "adaptive_avg_pool2d": lambda h, w: F.adaptive_avg_pool2d(h, 2),
    "interpolate": lambda h, w: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "pixel_shuffle": lambda h, w: F.pixel_shuffle(h, 2),
    "unfold": lambda h, w: F.unfold(h, 3),
    "pad": lambda h, w: F.pad(h, (1, 1), value=2.0),
    "pad circular": lambda h, w: F.pad(h, (1, 1, 1, 1), mode="circular"),
    "masked_fill": lambda h, w: h.masked_fill(MASK, 3.0),
    "cat": lambda h, w: torch.cat([h, C, h.tanh()], 1),
    "stack": lambda h, w: torch.stack([h, h * h, C]),
    "where": lambda h, w: torch.where(MASK, h, h * h),
    "where constant": lambda h, w: torch.where(MASK, h, 1.0),
    "detach": lambda h, w: h * h.detach(),
    "no_grad": lambda h, w: h * frozen(h),
    "type": lambda h, w: h.type(h.type()) * h.type_as(w),
    "view_as": lambda h, w: h.flatten(1).view_as(h) * h.flatten(1).reshape_as(h) + w[:1, :1].expand_as(h[0]),
    "iterated": lambda h, w: sum(part.tanh() for part in h),
    "masked_fill by a tensor": lambda h, w: h.masked_fill(MASK, w.sum()),
    "masked_scatter": lambda h, w: h.masked_scatter(MASK, (h * h).flip(2)),
    "where method": lambda h, w: h.where(MASK, h * h) + C.where(MASK, h),
    "index_fill": lambda h, w: h.index_fill(2, torch.tensor([1, 3]), 2.0),
    "index_put": lambda h, w: h.index_put((ROWS, ROWS), h.tanh()[0, :2]),
    "index_put accumulate": lambda h, w: h.index_put((ROWS, ROWS * 0), h.tanh()[0, :2], accumulate=True),
    "index_copy": lambda h, w: h.index_copy(1, ROWS, h.tanh()[:, :2]),
    "index_add": lambda h, w: h.index_add(1, ROWS, h.tanh()[:, :2], alpha=0.3),
    "scatter": lambda h, w: (
        C.scatter(3, ROWS.expand(3, 4, 6, 2), h[..., :2]) * h.scatter(3, ROWS.expand(3, 4, 6, 2), 1.5)
    ),
    "scatter_add": lambda h, w: h.scatter_add(3, ROWS.expand(3, 4, 6, 2), h.tanh()[..., :2]),
    "select_scatter": lambda h, w: h.select_scatter(h[:, 1].tanh(), 1, 0).slice_scatter(h[:, :1] ** 2, 1, 3),
    # sums and products
    "rsub alpha": lambda h, w: torch.rsub(h, h * h, alpha=0.3) + torch.rsub(h * h, 1.0, alpha=2),
    "sub alpha": lambda h, w: torch.sub(h, h * h, alpha=0.3),
    "lerp": lambda h, w: torch.lerp(h, h * h, 0.3) + h.lerp(C, w.sum()),
    "add": lambda h, w: torch.add(h, w.sum(), alpha=2.0),
    "add constant": lambda h, w: 1 + h + C,
    "sub": lambda h, w: h - w[0, 0],
    "rsub": lambda h, w: 2 - h * h,
    "mul": lambda h, w: h * w[:, 0].view(4, 1, 1),
    "mul constant": lambda h, w: 2 * h * C,
    "square": lambda h, w: h * h,
    "div": lambda h, w: h / (2 + w[0, 0] * w[0, 0]),
    "div constant": lambda h, w: h / 3,
    "rdiv": lambda h, w: 2 / POSITIVE(h),
    "addcmul": lambda h, w: torch.addcmul(C, h, h.flip(2), value=0.5),
    "linear": lambda h, w: F.linear(h.transpose(1, 3), w, w[0]),
    "linear, input fixed": lambda h, w: F.linear(C.transpose(1, 3), w, w[0]) * h[:, :, :1, :4].mean(),
    "linear, weight fixed": lambda h, w: F.linear(h, C[0, 0], w[0].repeat(2)[:6]),
    "conv1d": lambda h, w: F.conv1d(h.flatten(2), w.unsqueeze(2).expand(4, 4, 3), w[0], 2, 1),
    "conv2d": lambda h, w: F.conv2d(h, w[:, :, None, None].expand(4, 4, 3, 3), w[1], padding="same"),
    "conv2d grouped": lambda h, w: F.conv2d(h, w[:, :2, None, None].expand(4, 2, 3, 3), None, 1, 2, 2, 2),
    "conv3d": lambda h, w: F.conv3d(h[:, :, None], w[:, :, None, None, None].expand(4, 4, 1, 3, 3)),
    "conv_transpose2d": lambda h, w: F.conv_transpose2d(h, w[:, :, None, None].expand(4, 4, 3, 3), w[0], 2),
    "conv_transpose1d": lambda h, w: F.conv_transpose1d(h.flatten(2), w[:, :, None].expand(4, 4, 3)),
    "matmul": lambda h, w: h.transpose(1, 3) @ w,
    "matmul, left fixed": lambda h, w: C.transpose(1, 3) @ (w @ w),
    "bmm": lambda h, w: torch.bmm(h.flatten(2), h.flatten(2).transpose(1, 2)),
    "addmm": lambda h, w: torch.addmm(w[0], h[:, :, 0, 0], w, beta=0.5, alpha=2.0),
    "einsum": lambda h, w: torch.einsum("ncij,cd->ndij", h, w),
    "einsum, one moves": lambda h, w: torch.einsum("ncij,ncij->ncj", h, C),
    "embedding_bag": lambda h, w: F.embedding_bag(torch.tensor([[1, 0], [3, 1]]), w, mode="max") * h.mean(),
    "embedding": lambda h, w: F.embedding(torch.tensor([[1, 0], [3, 1]]), w, padding_idx=0),
    # piecewise linear
    "relu": lambda h, w: h.relu(),
    "relu in place": lambda h, w: F.relu(h * 1.0, inplace=True),
    "leaky_relu": lambda h, w: F.leaky_relu(h, 0.1),
    "relu6": lambda h, w: F.relu6(4 * h),
    "hardtanh": lambda h, w: F.hardtanh(h, -0.2, 0.3),
    "hardsigmoid": lambda h, w: F.hardsigmoid(4 * h),
    "threshold": lambda h, w: F.threshold(h, 0.1, 2.0),
    "clamp": lambda h, w: h.clamp(-0.1, max=0.4),
    "clamp_min": lambda h, w: h.clamp_min(0.1),
    "clamp_max": lambda h, w: h.clamp_max(0.1),
    "abs": lambda h, w: h.abs() + h * torch.abs(h),
    "prelu": lambda h, w: F.prelu(h, w[0]),
    "maximum": lambda h, w: torch.maximum(h, h.flip(2)) + torch.minimum(h, C),
    "max": lambda h, w: h.max(1).values + h.min(2, keepdim=True)[0].sum(1),
    "amax": lambda h, w: h.amax((1, 2)) * h.relu().amin(1, keepdim=True).sum((1, 2)) + h.max() * h.amin(),
    "fmax": lambda h, w: torch.fmax(h, h.flip(2)) * torch.fmin(h, C),
    "sort": lambda h, w: h.sort(2, descending=True)[0] * h + torch.msort(h),
    "topk": lambda h, w: h.topk(2, 1).values.tanh() + torch.kthvalue(h, 3, dim=1, keepdim=True)[0],
    "cummax": lambda h, w: h.cummax(1)[0] * torch.cummin(h, dim=2).values,
    "median": lambda h, w: h.median(1)[0] * h.nanmedian(dim=1).values + h.mode(2)[0].sum() + h.median(),
    "aminmax": lambda h, w: h * h.aminmax(dim=1, keepdim=True).max * h.aminmax().min,
    "scatter_reduce": lambda h, w: (
        h.scatter_reduce(3, ROWS.expand(3, 4, 6, 2), h.tanh().flip(1)[..., :2], "amax")
        * C.scatter_reduce(3, ROWS.expand(3, 4, 6, 2), h.tanh()[..., :2], "amin", include_self=False)
    ),
    "max_pool1d": lambda h, w: F.max_pool1d(h.flatten(2), 3, 2),
    "max_pool2d": lambda h, w: F.max_pool2d(h, 3, stride=2, padding=1),
    "max_pool2d with indices": lambda h, w: F.max_pool2d(h, 2, return_indices=True)[0],
    "max_pool3d": lambda h, w: F.max_pool3d(h, 2),
    "adaptive_max_pool2d": lambda h, w: F.adaptive_max_pool2d(h, 2),
    "adaptive_max_pool1d": lambda h, w: F.adaptive_max_pool1d(h.flatten(2), 5),
    "adaptive_max_pool3d": lambda h, w: F.adaptive_max_pool3d(h, 3),
    "dropout": lambda h, w: seeded(lambda: F.dropout(h, 0.4)),
    "dropout2d": lambda h, w: seeded(lambda: F.dropout2d(h, 0.4)),
    "dropout off": lambda h, w: F.dropout(h, 0.4, training=False),
    "straight through": lambda h, w: h * (h + (torch.round(4 * h) - h).detach()) * torch.sign(h) * (8 * h).floor(),
    # smooth
    "glu": lambda h, w: F.glu(h, 1),
    "tanh": lambda h, w: h.tanh(),
    "sigmoid": lambda h, w: torch.sigmoid(h),
    "logsigmoid": lambda h, w: F.logsigmoid(h),
    "exp": lambda h, w: h.exp(),
    "expm1": lambda h, w: h.expm1(),
    "log": lambda h, w: POSITIVE(h).log(),
    "log1p": lambda h, w: POSITIVE(h).log1p(),
    "sqrt": lambda h, w: POSITIVE(h).sqrt(),
    "rsqrt": lambda h, w: POSITIVE(h).rsqrt(),
    "reciprocal": lambda h, w: POSITIVE(h).reciprocal(),
    "pow": lambda h, w: POSITIVE(h) ** 1.7 + h.pow(3) + h**2,
    "sin": lambda h, w: h.sin() + h.cos(),
    "erf": lambda h, w: h.erf(),
    "softplus": lambda h, w: F.softplus(h, 2.0, 0.5),
    "gelu": lambda h, w: F.gelu(h),
    "gelu tanh": lambda h, w: F.gelu(h, approximate="tanh"),
    "silu": lambda h, w: F.silu(h),
    "silu in place": lambda h, w: F.silu(h * 1.0, inplace=True),
    "elu": lambda h, w: F.elu(h, 1.3),
    "hardswish": lambda h, w: F.hardswish(4 * h),
    # softmax and normalisation
    "softmax": lambda h, w: torch.softmax(h, 1),
    "softmax of another dtype, float32": lambda h, w: h.float().softmax(1, DOUBLE) + F.softmax(h.float(), 1, 3, DOUBLE),
    "log_softmax": lambda h, w: F.log_softmax(h, dim=-1),
    "logsumexp": lambda h, w: h.logsumexp(1),
    "logsumexp keepdim": lambda h, w: torch.logsumexp(h, 2, keepdim=True),
    "cross_entropy inside": lambda h, w: F.cross_entropy(h[:, :, 0, 0], LABELS, reduction="none"),
    "cross_entropy, weighted": lambda h, w: F.cross_entropy(h[:, :, 0, 0], LABELS, C[0, 0, 0, :4] + 2) * h,
    "cross_entropy, smoothed": lambda h, w: F.cross_entropy(h[:, :, 0, 0], LABELS, label_smoothing=0.1) * h,
    "cross_entropy, weighted, smoothed, with rows left out": lambda h, w: (
        h * F.cross_entropy(h[:, :, 0], LABELS_OF_ROWS, C[0, 0, 0, :4] + 2, label_smoothing=0.3)
    ),
    "cross_entropy of probabilities": lambda h, w: (
        h
        * F.cross_entropy(
            h[:, :, 0, 0], C[:, :, 0, 0].softmax(1), C[0, 0, 0, :4] + 2, label_smoothing=0.3, reduction="sum"
        )
    ),
    "mse_loss": lambda h, w: F.mse_loss(h, C) * h,
    "mse_loss that broadcasts": lambda h, w: (
        F.mse_loss(h[:, :, 0, 0], C[:, :, 0, 0], reduction="none")[..., None, None] * h
    ),
    "binary_cross_entropy_with_logits": lambda h, w: F.binary_cross_entropy_with_logits(h, C.sigmoid()) * h,
    "binary_cross_entropy_with_logits, weighted": lambda h, w: F.binary_cross_entropy_with_logits(
        h, C.sigmoid(), C + 2, reduction="none", pos_weight=C.abs()
    ),
    "poisson_nll_loss": lambda h, w: F.poisson_nll_loss(h, C.abs() * 9, full=True) * h,
    "poisson_nll_loss of rates": lambda h, w: F.poisson_nll_loss(POSITIVE(h), C.abs(), log_input=False) * h,
    "huber_loss": lambda h, w: F.huber_loss(h, C, delta=0.3) * h,
    "smooth_l1_loss": lambda h, w: F.smooth_l1_loss(h, C, beta=0.3, reduction="sum") * h,
    "smooth_l1_loss with beta 0": lambda h, w: F.smooth_l1_loss(h, C, beta=0.0) * h,
    "batch_norm eval": lambda h, w: F.batch_norm(h, w[0].detach(), w[1].detach().exp(), w[2], w[3]),
    "batch_norm train": lambda h, w: F.batch_norm(h, None, None, w[2], w[3], training=True),
    "batch_norm of the data": lambda h, w: F.batch_norm(C, None, None, w[2], w[3], training=True) * h.mean(),
    "layer_norm": lambda h, w: F.layer_norm(h.transpose(1, 3), (4,), w[0], w[1]),
    "layer_norm plain": lambda h, w: F.layer_norm(h, (6, 6)),
    "rms_norm": lambda h, w: F.rms_norm(h.transpose(1, 3), (4,), w[0], 1e-3),
    "group_norm": lambda h, w: F.group_norm(h, 2, w[0], w[1]),
    "instance_norm": lambda h, w: F.instance_norm(h, weight=w[0], bias=w[1]),
    "attention": lambda h, w: F.scaled_dot_product_attention(h, h.flip(2), h @ h),
    "attention causal": lambda h, w: F.scaled_dot_product_attention(h, 2 * h, h.tanh(), is_causal=True),
    "attention masked": lambda h, w: F.scaled_dot_product_attention(
        h, h, h, attn_mask=torch.eye(6) + torch.ones(6, 6).tril(2) > 0
    ),
    "attention biased": lambda h, w: F.scaled_dot_product_attention(h, h, h, attn_mask=C[0, 0], scale=0.3),
    "attention, blind rows": lambda h, w: (
        F.scaled_dot_product_attention(h, h, h, attn_mask=torch.arange(36).view(6, 6) > 11)
        + F.scaled_dot_product_attention(
            h, h, h, attn_mask=C[0, 0].masked_fill(torch.arange(6)[:, None] < 2, -math.inf)
        )
    ),
    "weight_norm": lambda h, w: h.transpose(1, 3) @ torch._weight_norm(w, w[:, :1].exp(), 0),
    "norm": lambda h, w: h / h.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(h) * F.normalize(h),
    **(
        {"linear_cross_entropy": lambda h, w: F.linear_cross_entropy(h[:, :, 0, 0], w, LABELS) * h}
        if hasattr(F, "linear_cross_entropy")  # not in older ones
        else {}
    ),
    # in place on an intermediate value
    "iadd": lambda h, w: in_place(h * 1.0, lambda x: x.__iadd__(h.tanh())),
    "imul": lambda h, w: in_place(h * 1.0, lambda x: x.mul_(h)),
    "relu_ unused result": lambda h, w: in_place(h * 1.0, lambda x: x.relu_()),
    "copy in place": lambda h, w: in_place(h * 1.0, lambda x: x.copy_(h[:, :1].tanh())),
    "fill in place": lambda h, w: in_place(h * 1.0, lambda x: x.fill_(w.sum().tanh())) * h,
    "zero in place": lambda h, w: h + in_place(h * 1.0, lambda x: x.zero_()),
    "slice assigned": lambda h, w: in_place(h * 1.0, lambda x: x.__setitem__((slice(None), 1), h[:, 0].tanh())),
    "slice of a constant assigned": lambda h, w: (
        h + in_place(C.clone(), lambda x: x.__setitem__((0, MASK[0]), w.sum()))
    ),
    "constant assigned to a slice": lambda h, w: in_place(h * 1.0, lambda x: x.__setitem__(MASK, 0.5)),
    "added in place to another dtype, float32": lambda h, w: (
        in_place(C.float().to(DOUBLE), lambda x: x.add_(h.float())) * h
    ),
    "shape changed in place": lambda h, w: in_place(h * 1.0, lambda x: x.unsqueeze_(0).squeeze_(0)) * h,
    "detached in place": lambda h, w: in_place(h * 1.0, lambda x: x.detach_()) * h,
    "three in place": lambda h, w: in_place(h * 1.0, lambda x: (x.mul_(2), x.add_(C), x.tanh_())),
    # the arguments by name
    "view by name": lambda h, w: h.transpose(dim0=2, dim1=3).sum(dim=1) + h.mean(axis=1, keepdims=True),
    "linear functions by name": lambda h, w: torch.cat(tensors=[h, C], dim=1) + torch.flatten(input=h).sum(),
    "sums by name": lambda h, w: torch.add(input=h, other=h * h, alpha=0.3) - torch.sub(h, other=w.sum(), alpha=3),
    "products by name": lambda h, w: torch.matmul(h.mT, other=h) + torch.mul(input=h, other=h.flip(2)),
    "bmm by name": lambda h, w: torch.baddbmm(
        h[:, 0] * 1, batch1=torch.bmm(h[:, 0], mat2=h[:, 1]), batch2=h[:, 2], alpha=0.3, beta=2
    ),
    "layers by name": lambda h, w: F.linear(input=h.transpose(1, 3), weight=w, bias=w[0]).tanh(),
    "selu": lambda h, w: F.selu(h) * F.selu(h * 1, inplace=True),
    "shrinks": lambda h, w: F.hardshrink(h, 0.2) * F.softshrink(h, 0.1),
    "copysign": lambda h, w: torch.copysign(h * h, C),
    "frac": lambda h, w: (3 * h).frac() * h,
    "steps": lambda h, w: h * (h.sgn() + h.fix() + (3 * h).trunc()),
    "distances": lambda h, w: h * torch.dist(h, h.flip(2), p=1),
    "kinks by name": lambda h, w: (
        torch.clamp(input=h, min=0) * h.clamp(max=0.2) + torch.maximum(input=h, other=-h) + h.amax(axis=2, keepdim=True)
    ),
    "maxima by name": lambda h, w: (
        h.max(axis=1)[0] * torch.min(input=h, dim=1)[0] + torch.max(h, other=C).sum(dim=1).tanh()
    ),
    "choices by name": lambda h, w: torch.where(MASK, input=h, other=h * h) + h.masked_fill(value=2.0, mask=MASK),
    "smooth functions by name": lambda h, w: torch.pow(POSITIVE(h), exponent=3) + torch.tanh(input=h) + F.gelu(input=h),
    "pools by name": lambda h, w: F.max_pool2d(input=h, kernel_size=2) + F.avg_pool2d(kernel_size=2, input=h),
    "softmax by name": lambda h, w: torch.softmax(input=h, dim=1) + torch.logsumexp(input=h, dim=2, keepdim=True),
}


def frozen(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.tanh() * 2


def seeded(function: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(5)
    return function()


def in_place(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(x)
    return x * x.sum()


_met: set[Any] = set()


class _Meeting(Tape):
    """Notes which rules are used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        _met.add(RULES[func][0]) if func in RULES and torch.is_grad_enabled() else None
        return out


def loss_of(
    case: Callable[[Tensor, Tensor], Tensor], parameters: dict[str, Tensor] | None = None
) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """A cross-entropy behind ``case``, and parameters before, in and after it."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    x = draw(3, 4, 6, 6)
    parameters = parameters or {"before": draw(4, 6, 6), "in": draw(4, 4), "after": draw(3, 97)}
    for p in parameters.values():
        p.requires_grad_()

    def loss() -> Tensor:
        h = 0.5 * x * parameters["before"]
        out = case(h, parameters["in"]).reshape(-1)
        features = F.pad(out, (0, -out.numel() % 97)).view(-1, 97).tanh()
        return F.cross_entropy(features @ parameters["after"].T + h.mean(), torch.arange(len(features)) % 3)

    return loss, parameters


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str) -> None:
    loss, parameters = loss_of(CASES[case])
    # autograd has no second derivative of hardsigmoid
    other = loss_of(lambda h, w: F.relu6(4 * h + 3) / 6, parameters)[0] if case == "hardsigmoid" else None
    check(loss, parameters, other, 1e-6 if "float32" in case else TOLERANCE)


def test_every_rule_has_a_case() -> None:
    for case in CASES.values():
        loss, parameters = loss_of(case)
        with _Meeting(parameters):
            loss()
    with _Meeting(dict((model := MultiHead()).named_parameters())):
        model(torch.randn(2, 5, 8))
    missing = {rule for rule, _ in RULES.values()} - _met
    aliases = {"clip", "absolute", "__pow__"} | {"norm", "l1_loss"}  # the latter are called by functions in Python
    assert not {_name(rule) for rule in missing} - {_name(rule) for rule in _met} - aliases


def _name(rule: Any) -> Any:
    """The function that a rule serves, by name, where it is one of many of a kind."""
    name = getattr(rule.args[0], "name", rule.args[0]) if isinstance(rule, functools.partial) else rule
    return name.removesuffix("_with_indices") if isinstance(name, str) else name


# ---- whole networks --------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A GPT-like network: tied embedding, causal attention, GELU, LayerNorm before each part."""

    def __init__(self, words: int = 11, width: int = 8, tokens: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return self.head(self.norms[2](x))


class MultiHead(nn.Module):
    """PyTorch's own encoder layer, in train mode without dropout, where it takes no fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x, src_key_padding_mask=torch.arange(5) > torch.tensor([[4], [2]])))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "SimpleCNN": (lambda: network("SimpleCNN"), IMAGES, torch.tensor([3, 8])),
    "VGG-11": (lambda: network("VGG-11"), IMAGES, torch.tensor([3, 8])),
    "ResNet": (lambda: network("ResNet + BN").eval(), IMAGES, torch.tensor([3, 8])),
    "SmallResNet, train mode": (SmallResNet, IMAGES, torch.tensor([3, 8])),
    "soft targets": (SmallResNet, IMAGES, torch.eye(10, dtype=DOUBLE)[:2] * 0.5 + 0.05),
    "transformer": (Transformer, torch.arange(10).view(2, 5), torch.tensor([[3, 1, 2, 0, -100], [1, 7, 9, 4, 4]])),
    "encoder layer": (MultiHead, IMAGES[:, 0, :5, :8].contiguous(), torch.tensor([[0, 1, 2, 3, 0]] * 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    build, inputs, targets = NETWORKS[name]
    torch.manual_seed(0)
    model = build().to(DOUBLE)

    def loss() -> Tensor:
        logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets if targets.is_floating_point() else targets.flatten())

    check(loss, dict(model.named_parameters()))


def test_float32_errs_like_autograd() -> None:
    torch.manual_seed(0)
    model = network("SimpleCNN")
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    z = [torch.randn_like(p) for p in model.parameters()]

    def both(dtype: torch.dtype) -> tuple[float, float]:
        model.to(dtype)
        loss = lambda: F.cross_entropy(model(images.to(dtype)), labels)  # noqa: E731
        directions = [x.to(dtype) for x in z]
        tape = tape_of(loss, dict(model.named_parameters()))
        return float(tape.curvature(directions)), by_autograd(loss, list(model.parameters()), directions)

    found, usual = both(torch.float32)
    exact, _ = both(DOUBLE)
    # Kinks may fall to the other side in float32, for both alike.
    assert abs(found - exact) <= 2 * abs(usual - exact) + 1e-5 * abs(exact)


def units(parameters: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """The directions along one element of one parameter each."""
    sizes = [p.numel() for p in parameters.values()]
    for i in range(sum(sizes)):
        parts = F.one_hot(torch.tensor(i), sum(sizes)).double().split(sizes)
        yield [part.view(p.shape) for part, p in zip(parts, parameters.values(), strict=True)]


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= TOLERANCE * max(abs(expected), 1e-3)


@pytest.mark.parametrize("name", ["relu", "shared"])
def test_reduced_form_has_the_diagonal_of_the_hessian(name: str) -> None:
    torch.manual_seed(1)
    first, second, x = nn.Linear(3, 3).double(), nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=DOUBLE)
    inner = first if name == "shared" else nn.Linear(3, 3).double()
    model = nn.ModuleList([first, inner, second])
    parameters = dict(model.named_parameters())

    def loss() -> Tensor:
        return F.cross_entropy(second(F.relu(inner(F.relu(first(x))))), torch.tensor([0, 1, 2, 3, 0]))

    full, reduced = (tape_of(loss, parameters, reduced) for reduced in (False, True))
    for z in units(parameters):
        expected = by_autograd(loss, list(parameters.values()), z)
        assert close(float(full.curvature(z)), expected) and close(float(reduced.curvature(z)), expected)
    z = [torch.randn_like(p) for p in parameters.values()]
    assert float(full.curvature(z)) != pytest.approx(float(reduced.curvature(z)))  # something was left out


# ---- what is known of the reduced form without a direction -----------------------------------------------------------


class Twice(nn.Module):
    """A layer that is used twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh()).tanh()


class Of(nn.Module):
    """A function of the input and of parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.held = function, nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.held)


def chain(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(copy.deepcopy(module) for module in modules))


def conv(*sizes: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*sizes, **options)


PLAIN = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
IMAGE = IMAGES[:, :, 3:8, 2:7].contiguous()
WORDS = torch.tensor([[1, 0], [3, 1]])
NORM = nn.BatchNorm2d(4)
NORM.running_mean, NORM.running_var = torch.randn(4), torch.rand(4) + 0.5  # type: ignore[assignment]

ONE_LAYER: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    # a layer and a smooth function: the network, its input, and which parameters rest (a pattern of names)
    "linear": (chain(nn.Linear(4, 5), nn.Tanh()), PLAIN, "-"),
    "linear without bias": (chain(nn.Linear(4, 5, bias=False), nn.GELU()), PLAIN, "-"),
    "linear, frozen bias": (chain(nn.Linear(4, 5), nn.GELU()), PLAIN, "bias"),
    "linear, frozen weight": (chain(nn.Linear(4, 5), nn.SiLU()), PLAIN, "weight"),
    "linear in place": (chain(nn.Linear(4, 5), nn.ELU(inplace=True)), PLAIN, "-"),
    "convolution": (chain(conv(3, 4, 3, stride=2, padding=1), nn.Tanh()), IMAGE, "-"),
    "convolution without bias": (chain(conv(3, 4, (2, 3), padding=(0, 1), bias=False), nn.GELU()), IMAGE, "-"),
    "convolution, dilated, circular": (
        chain(conv(3, 2, 3, dilation=2, padding=2, padding_mode="circular"), nn.Softplus()), IMAGE, "-"
    ),
    "grouped convolution": (chain(conv(3, 6, 3, stride=2, padding="valid", groups=3), nn.Tanh()), IMAGE, "-"),
    "grouped, frozen bias": (chain(conv(3, 6, 3, padding="same", groups=3), nn.Sigmoid()), IMAGE, "bias"),
    "transposed convolution": (chain(nn.ConvTranspose2d(3, 2, 3, 2, 1, 1), nn.Tanh()), IMAGE, "-"),
    "reshaped": (chain(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Tanh()), PLAIN, "-"),
    "permuted, doubled, scaled": (
        lambda: Of(lambda x, w: (0.5 * F.linear(x, w).T.repeat(2, 1).chunk(3)[1] / 0.7).tanh(), (6, 4)), PLAIN, "-"
    ),
    "bias added": (lambda: Of(lambda x, w, b: (x @ w - 2 * b).tanh(), (4, 5), (5,)), PLAIN, "-"),
    "weight on the left": (lambda: Of(lambda x, w: (w @ x.T).exp(), (2, 4)), 0.3 * PLAIN, "-"),
    "gain": (lambda: Of(lambda x, g, b: torch.addcmul(b, g, x).tanh(), (4,), (4,)), PLAIN, "-"),
    "broadcast": (lambda: Of(lambda x, g: (g * x[:, None]).tanh(), (2, 1)), PLAIN, "-"),
    "batch norm": (chain(conv(3, 4, 3, bias=False), NORM, nn.GELU()), IMAGE, "-"),
    "frozen batch norm": (chain(conv(3, 4, 3), NORM, nn.GELU()), IMAGE, "1."),
    "plain batch norm, dropout": (
        chain(conv(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout(), nn.Tanh()), IMAGE, "-"
    ),
    "max-pool": (chain(conv(3, 4, 2), nn.MaxPool2d(2), nn.Tanh()), IMAGE, "-"),
    "embedding": (chain(nn.Embedding(5, 3, padding_idx=0), nn.Tanh()), WORDS, "-"),
    "a parameter alone": (lambda: Of(lambda x, s: x * s.exp(), (4,)), PLAIN, "-"),
    "piecewise linear afterwards": (chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU()), PLAIN, "-"),
    "two layers side by side": (lambda: Of(lambda x, v, w: (x @ v).tanh() * (x @ w), (4, 5), (4, 5)), PLAIN, "-"),
    "sum of two layers": (lambda: Of(lambda x, v, w: (x @ v + x.relu() @ w).tanh(), (4, 5), (4, 5)), PLAIN, "-"),
}  # fmt: skip
DEEPER: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "two hidden layers": (chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU()), PLAIN, "-"),
    "no biases": (chain(nn.Linear(4, 5, False), nn.Tanh(), nn.Linear(5, 5, False), nn.GELU()), PLAIN, "-"),
    "second layer frozen": (chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU()), PLAIN, "2."),
    "second weight frozen": (chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU()), PLAIN, "2.weight"),
    "convolutions": (
        chain(conv(3, 4, 3), nn.GELU(), conv(4, 4, 3, padding=1, groups=2), nn.Flatten(), nn.Tanh()), IMAGE, "-"
    ),
    "batch norms": (chain(conv(3, 4, 3), NORM, nn.GELU(), conv(4, 4, 3), NORM, nn.GELU()), IMAGE, "-"),
    "a layer used twice": (Twice, PLAIN, "-"),
    "a weight used twice in a sum": (lambda: Of(lambda x, w: (x @ w + x.relu() @ w).tanh(), (4, 5)), PLAIN, "-"),
    "the weight is the bias": (lambda: Of(lambda x, w: (x * w + w).tanh(), (4,)), PLAIN, "-"),
    "the weight is the input": (lambda: Of(lambda x, w: (x.mean() * w @ w).tanh(), (4, 4)), PLAIN, "-"),
    "square of the weight": (lambda: Of(lambda x, w: (x @ (w * w)).tanh(), (4, 5)), PLAIN, "-"),
    "row of the weight as bias": (lambda: Of(lambda x, w: F.linear(x, w, w[:, 0]).tanh(), (5, 4)), PLAIN, "-"),
    "averaged": (chain(conv(3, 4, 3), nn.AvgPool2d(2), nn.Tanh()), IMAGE, "-"),
    "einsum over the input": (lambda: Of(lambda x, w: torch.einsum("nc,o->no", x, w).tanh(), (3,)), PLAIN, "-"),
    "einsum of two": (lambda: Of(lambda x, g, w: torch.einsum("nc,o->no", g * x, w).tanh(), (4,), (3,)), PLAIN, "-"),
    "residual": (
        lambda: Of(lambda x, v, w, b: ((y := (x @ v).tanh() @ w) + (y.tanh() @ v + b)).tanh(), (4, 4), (4, 4), (4,)),
        PLAIN, "-",
    ),
    "residual of one layer": (
        lambda: Of(lambda x, v, w: ((y := x @ v) + y.relu() @ w).tanh(), (4, 4), (4, 4)), PLAIN, "-"
    ),
    "gated": (lambda: Of(lambda x, u, v, w: F.silu((y := (x @ u).tanh()) @ v) * (y @ w), *[(4, 4)] * 3), PLAIN, "-"),
}  # fmt: skip


def known_case(name: str) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """A loss that is linear in what the network gives, and the parameters that move."""
    make, x, resting = (ONE_LAYER | DEEPER)[name]
    torch.manual_seed(4)
    model = make().to(DOUBLE).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(resting not in name)
    weights = torch.randn(model(x).shape, dtype=DOUBLE)
    head = torch.randn(weights.shape[-1], dtype=DOUBLE, requires_grad=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"head": head}
    return lambda: (model(x) * head * weights).sum(), parameters


@pytest.mark.parametrize("name", [*ONE_LAYER, *DEEPER])
def test_the_mean_of_the_reduced_form_is_the_trace(name: str) -> None:
    """Of c + zᵀQz, the mean over all z of independent elements of mean 0 and variance 1 is c + Tr(Q)."""
    loss, parameters = known_case(name)
    tape = tape_of(loss, parameters, reduced=True)
    known = float(tape.curvature([torch.zeros_like(p) for p in parameters.values()]))
    trace = mean = 0.0
    for z in units(parameters):
        trace += by_autograd(loss, list(parameters.values()), z)
        mean += float(tape.curvature(z)) - known
    assert abs(trace) > 1e-3 and close(known + mean, trace)
    if name in ONE_LAYER:
        assert not tape.nodes and close(known, trace)  # nothing is left to directions


@pytest.mark.parametrize("name", ["two hidden layers", "no biases", "convolutions", "batch norms"])
def test_less_is_left_to_the_directions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, parameters = known_case(name)
    found = tape_of(loss, parameters, reduced=True)
    monkeypatch.setattr("fastfisher.engine.taylor.tape.take_out_own", lambda nodes, *_: (nodes, []))
    before = tape_of(loss, parameters, reduced=True)
    generator = torch.Generator().manual_seed(0)
    z = [[torch.randn(p.shape, generator=generator, dtype=DOUBLE) for p in parameters.values()] for _ in range(200)]
    spread, spread_before = (torch.stack([tape.curvature(x) for x in z]).std() for tape in (found, before))
    assert spread < 0.8 * spread_before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_low_precision_the_squares_are_taken_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 4).to(dtype), 100 * torch.randn(3, 64).to(dtype)  # the sum of squares leaves float16
    loss = lambda: (1e-3 * layer(x)).tanh().sum()  # noqa: E731
    known = float(tape_of(loss, dict(layer.named_parameters()), reduced=True).curvature([]))
    y = (1e-3 * layer(x).double()).tanh()
    squares = x.double().square().sum(1, keepdim=True) + 1
    expected = (-2e-6 * y * (1 - y * y) * squares).sum().item()
    assert known == pytest.approx(expected, rel=40 * torch.finfo(dtype).eps)


# ---- what has no rule ------------------------------------------------------------------------------------------------


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.numpy()[...] *= 2
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda h, w: torch.linalg.det(w) * h, "det has no rule"),
        (lambda h, w: F.mish(h), "mish has no rule"),
        (lambda h, w: h.norm(p=1), "Euclidean norm only"),
        (lambda h, w: _Hidden.apply(h).tanh(), "cannot be seen"),
        (lambda h, w: view_of_changed(h * 1.0), "view of a tensor that was changed in place"),
        (lambda h, w: detached_view(h * 1.0), "view of a tensor that was changed in place"),
        (lambda h, w: base_of_changed(h * 1.0), "view of a tensor that was changed in place"),
        (lambda h, w: in_place(h * 1.0, lambda x: x.data.mul_(2)), "writes into a tensor that was used before"),
        (lambda h, w: in_place(h * 1.0, lambda x: x.detach().mul_(2)), "writes into a tensor that was used before"),
        (lambda h, w: in_place(h * 1.0, lambda x: torch.no_grad()(x.mul_)(2)), "writes into a tensor that was used"),
        (lambda h, w: in_place(h * 1.0, lambda x: x.uniform_()), "writes into a tensor that was used before"),
        (lambda h, w: in_place(h * 1.0, lambda x: setattr(x, "data", C)), "setting an attribute"),
        (lambda h, w: in_place(h * 1.0, _Doubled.apply), "cannot be seen|setting an attribute"),
        (lambda h, w: in_place(h * 1.0, lambda x: x.register_hook(lambda g: 2 * g)), "setting an attribute"),
        (lambda h, w: in_place(h * 1.0, lambda x: torch.no_grad()(x.register_hook)(torch.neg)), "a hook on the"),
        (lambda h, w: constant_changed(h, C.clone()), "writes into a tensor that was used before"),
        (lambda h, w: written_by_out(h, torch.empty_like(C)), "has no rule"),
        (lambda h, w: h * w.mul_(2).sum(), "writes into a parameter"),
        (lambda h, w: h * w[0].mul_(2).sum(), "writes into a parameter"),
        (lambda h, w: C.scatter(3, ROWS.expand(3, 4, 6, 2), h, reduce="multiply"), "scatter has no rule for these"),
        (lambda h, w: h.clamp(min=w[0, 0]), "bounds that move"),
        (lambda h, w: F.embedding(torch.tensor([1, 0]), w, max_norm=1.0), "max_norm"),
    ],
)
def test_what_has_no_rule_is_named(case: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    loss, parameters = loss_of(case)
    with pytest.raises(NoRule, match=message):
        tape_of(loss, parameters)


def view_of_changed(x: Tensor) -> Tensor:
    view = x.view(-1)
    x.relu_()
    return view.tanh()


def detached_view(x: Tensor) -> Tensor:
    view = x.detach()[0]
    x.relu_()
    return view * x.sum()


def base_of_changed(x: Tensor) -> Tensor:
    x[0].mul_(2)
    return x.tanh()


def constant_changed(h: Tensor, c: Tensor) -> Tensor:
    y = h * c
    c[0] = 5.0
    return y * c


def written_by_out(h: Tensor, y: Tensor) -> Tensor:
    torch.mul(h.detach(), 2, out=y)  # this is a constant
    return h * y + torch.mul(h, 2, out=y)


def test_a_loss_that_was_not_recorded_is_an_error() -> None:
    parameter = torch.ones(2, requires_grad=True)
    with Tape({"p": parameter}) as tape:
        pass
    with pytest.raises(NoRule, match="loss does not come from recorded operations"):
        tape.finish(parameter.square().sum())


def test_a_sweep_needs_no_memory_beyond_its_own() -> None:
    parameter = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    tape = tape_of(lambda: (parameter.tanh().exp() * math.pi).sum(), {"p": parameter})
    z = torch.randn(4, dtype=DOUBLE)
    before = z.clone()
    assert float(tape.curvature([z])) == float(tape.curvature([z]))
    assert torch.equal(z, before)


def test_a_tape_is_freed_with_its_last_reference() -> None:
    """Not later, when the garbage collector happens to run: it holds the activations."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    gc.collect()
    gc.disable()
    try:
        tape = Tape(dict(model.named_parameters()))
        with tape:
            loss = F.cross_entropy(model(x), y)
        tape.finish(loss)
        nodes = [weakref.ref(node) for node in tape.nodes]
        assert nodes
        del tape, loss
        assert not any(node() is not None for node in nodes)
    finally:
        gc.enable()
