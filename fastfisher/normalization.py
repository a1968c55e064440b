"""Batch normalisation in train mode by our own kernels: PyTorch's takes four times as long in the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops


class _BatchNorm(torch.autograd.Function):
    """y = weight (x − mean) / sqrt(variance + eps) + bias; also the mean and the biased variance, in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        planes = x.view(len(x), x.shape[1], -1)
        y, mean, variance = ops.batch_norm(planes, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        # Not a view: autograd forbids in-place changes of views that come out of a Function.
        return x.new_empty(0).set_(y.untyped_storage(), 0, x.shape, x.stride()), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: by PyTorch's own formula
            inverse = (variance + ctx.eps).rsqrt().to(x.dtype)
            wanted = ctx.needs_input_grad[:3]
            derivatives = torch.ops.aten.native_batch_norm_backward
            gradients = derivatives(grad, x, weight, None, None, mean.to(x.dtype), inverse, True, ctx.eps, wanted)
            return *gradients, None
        planes = x.view(len(x), x.shape[1], -1)
        gradients = ops.batch_norm_backward(grad.contiguous().view_as(planes), planes, weight, mean, variance, ctx.eps)
        grad_x, grad_weight, grad_bias = gradients
        wanted_weight, wanted_bias = ctx.needs_input_grad[1:3]
        return grad_x.view_as(x), grad_weight if wanted_weight else None, grad_bias if wanted_bias else None, None


def by_batch(function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """The batch normalisation that ``function(*args, **kwargs)`` calls for, running statistics updated.

    None where that is another function, eval mode, a single value per channel, autocast, tensors of several dtypes, or
    not row-major on the CPU.
    """
    if function is not F.batch_norm or torch.is_autocast_enabled("cpu"):
        return None
    x, running_mean, running_var, weight, bias, training, momentum, eps = _arguments(*args, **kwargs)
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


def _arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float]:
    return input, running_mean, running_var, weight, bias, training, momentum, eps
