"""Batch normalisation in train mode by our own kernels: PyTorch's takes four times as long in the forward.

A ReLU that follows gets its own node on (x, weight, bias) instead of one on the normalised values, so that one kernel
does both backwards and the gated gradient is never written to memory. Whatever else uses the normalised values has its
gradient through the normalisation as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.autocast import autocast_dtype
from fastfisher.engine.calls import complete
from fastfisher.engine.fused.relu_pool import Passage, alias, gate


class _BatchNorm(torch.autograd.Function):
    """y = weight (x − mean) / sqrt(variance + eps) + bias; also the mean and the biased variance, in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        y, mean, variance = ops.batch_norm(_planes(x), weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, variance)
        return alias(y, x.shape), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        return *_backward(grad, None, ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[:3]), None


class _ReluAfter(torch.autograd.Function):
    """relu(y), as a function of what y was normalised from."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, passage: Passage, inplace: bool, eps: float, x: Tensor, weight: Tensor | None,
        bias: Tensor | None, mean: Tensor, variance: Tensor,
    ) -> Tensor:  # fmt: skip
        out = passage.through(y, inplace)
        ctx.save_for_backward(passage.bits, x, weight, bias, mean, variance)
        ctx.passage, ctx.eps = passage, eps
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        bits, *saved = ctx.saved_tensors
        if grad is not None and ctx.passage.has_gated(grad):
            bits = None
        gradients = _backward(grad, bits, tuple(saved), ctx.eps, ctx.needs_input_grad[4:7])
        return None, None, None, None, *gradients, None, None


def _backward(
    grad: Tensor | None,
    bits: Tensor | None,
    saved: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor],
    eps: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in x, weight and bias, as far as wanted."""
    if grad is None:
        return None, None, None
    x, weight, _, mean, variance = saved
    if torch.is_grad_enabled():  # the gradient will be differentiated: PyTorch's formula has a derivative
        inverse = (variance + eps).rsqrt().to(x.dtype)
        grad = grad if bits is None else gate(grad, Passage(bits), False)
        derivatives = torch.ops.aten.native_batch_norm_backward
        grad = grad.contiguous()  # torch 2.13 is wrong for a batch of one in channels-last memory
        return derivatives(grad, x, weight, None, None, mean.to(x.dtype), inverse, True, eps, wanted)  # type: ignore[no-any-return]
    found = ops.batch_norm_backward(_planes(grad.contiguous()), bits, _planes(x), weight, mean, variance, eps)
    grad_x, grad_weight, grad_bias = found
    return grad_x.view_as(x), grad_weight if wanted[1] else None, grad_bias if wanted[2] else None


def _planes(x: Tensor) -> Tensor:
    return x.view(len(x), x.shape[1], -1)


def relu_after(y: Tensor) -> Callable[[Tensor, Passage, bool], Tensor] | None:
    """How to take the ReLU of ``y``, where ``y`` is what :func:`by_batch` gave; else None."""
    if type(y.grad_fn) is not _BatchNorm._backward_cls:
        return None
    node: Any = y.grad_fn

    def relu(y: Tensor, passage: Passage, inplace: bool) -> Tensor:
        x, weight, bias, mean, variance = node.saved_tensors
        return _ReluAfter.apply(y, passage, inplace, node.eps, x, weight, bias, mean, variance)  # type: ignore[no-any-return, no-untyped-call]

    return relu


def by_batch(function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """The batch normalisation that ``function(*args, **kwargs)`` calls for, running statistics updated.

    None where that is another function, eval mode, a single value per channel, autocast, tensors of several dtypes, or
    not row-major on the CPU.
    """
    if function is not F.batch_norm or autocast_dtype("cpu") is not None:
        return None
    x, running_mean, running_var, weight, bias, training, momentum, eps = complete(function, args, kwargs)
    if not (training and x.device.type == "cpu" and x.is_contiguous() and x.dim() >= 2 and x.is_floating_point()):
        return None
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    others = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if count < 2 or eps <= 0.0 or any(t.dtype != x.dtype or not t.is_contiguous() for t in others):
        return None
    y, mean, variance = _BatchNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for running, statistic in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
            if running is not None:
                running.mul_(1 - momentum).add_(statistic.to(running.dtype), alpha=momentum)
    return y  # type: ignore[no-any-return]
