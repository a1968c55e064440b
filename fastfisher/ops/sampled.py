"""The cross-entropy at labels drawn from the logits themselves, as users call it, and the key it is drawn with."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.checks import check_generator, is_count
from fastfisher.host import looking_waits
from fastfisher.outputs import class_last


def new_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A fresh key (seed, offset) as int64[2] on ``device``, drawn from ``generator`` or from torch's default one."""
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.empty(2, dtype=torch.int64, device=source).random_(generator=generator).to(device)


def sample_cross_entropy(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    first: int = 0,
    class_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws ŷ ~ p(y) = softmax(logits) and returns the cross-entropy −log p(ŷ) and ŷ, in one fused pass.

    The gradient of the loss in the logits is softmax(logits) − onehot(ŷ): exactly the per-example output gradient
    whose second moment is the Fisher matrix (eq. 2 of Jastrzebski et al., 2021). Twice differentiable.

    Args:
        logits: (..., C) with C from 1 to 262,144; float32, float64, bfloat16 or float16. −inf masks a class: it is
            never drawn.
        generator: where the key comes from; torch's default generator otherwise, so ``torch.manual_seed`` governs it.
        key: int64[2] (seed, offset) instead. The same key and logits give the same labels.
        reduction: "mean" over all rows, "sum", or "none".
        first: the number of the first row: parts of a batch, drawn with one key, get the labels of the whole.
        class_dim: which dimension of the logits holds the classes; the last by default, but of four or more it has to
            be said.

    Returns:
        The loss (float64 for float64 logits, else float32; shape () or logits.shape[:-1]) and the labels (int64,
        logits.shape[:-1], or that without ``class_dim``). No rows: a mean of NaN, as in ``F.cross_entropy``.

    Raises:
        ValueError: no class dimension, an unknown reduction, a ``first`` that is no row number, a key or generator that
            is none, both of them, a ``class_dim`` that is none, or a row without a softmax (NaN, +inf, or all −inf),
            which is named.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: expected a tensor of shape (..., C), got {type(logits).__name__}")
    check_generator(generator)
    if not (key is None or isinstance(key, Tensor)):
        raise ValueError(f"key: expected an int64 tensor of 2 elements or None, got {type(key).__name__}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., C), got a scalar")
    logits = class_last(logits, class_dim, least=0)
    if not (isinstance(reduction, str) and reduction in ("mean", "sum", "none")):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not is_count(first, 0):
        raise ValueError(f"first: expected a row number >= 0, got {first!r}")
    if key is None:
        key = new_key(generator, logits.device)
    elif generator is not None:
        raise ValueError("key and generator: expected one of them, got both")
    flat = logits.dim() == 2
    rows = logits if flat else logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    if logits.requires_grad and torch.is_grad_enabled() and not transformed:
        loss, labels, _ = _Sampled.apply(rows, key, first, reduction)  # type: ignore[no-untyped-call]
    else:
        nll, labels, _ = ops.sample_cross_entropy(rows, key, 1.0, first)
        loss = _reduced(nll, reduction)
    if flat:
        return loss, labels
    return loss.view(logits.shape[:-1]) if reduction == "none" else loss, labels.view(logits.shape[:-1])


def _reduced(nll: Tensor, reduction: str) -> Tensor:
    return nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else nll


class _Sampled(torch.autograd.Function):
    """The drawn loss with its derivative, in half of the time that the operator's own takes, which is registered in
    Python. ``torch.compile`` and ``torch.func`` take that one.

    Its third output is the gradient in the logits, so that a second derivative finds its way through it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, key: Tensor, first: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
        # With the mean taken in the operator, a backward from the loss itself has nothing left to do. A low precision
        # would lose there what a gradient scaler is to keep.
        precise = rows.dtype in (torch.float32, torch.float64) and not looking_waits(rows)
        ctx.scale = 1.0 / len(rows) if reduction == "mean" and precise and len(rows) else 1.0
        nll, labels, gradient = ops.sample_cross_entropy(rows, key, ctx.scale, first)
        ctx.reduction = reduction
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(labels)
        ctx.save_for_backward(labels, gradient)
        return _reduced(nll, reduction), labels, gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, grad_gradient: Tensor | None) -> Any:
        labels, gradient = ctx.saved_tensors
        grad = None
        if grad_loss is not None:
            # A graph that is kept reads the gradient again: nobody else may get it, and write into it as into a .grad.
            kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
            if ctx.scale != 1.0 and not kept and grad_gradient is None and float(grad_loss) == 1.0:
                return gradient, None, None, None
            if ctx.reduction == "mean" and ctx.scale == 1.0:
                grad_loss = grad_loss / len(labels)
            # In the precision of the loss: what a gradient scaler multiplies by may have no value in float16.
            grad = (gradient * grad_loss.reshape(-1, 1)).to(gradient.dtype)
        if grad_gradient is not None:  # the Jacobian of softmax is symmetric
            product = ops.softmax_hessian_product(gradient, labels, grad_gradient, ctx.scale)
            grad = product if grad is None else grad + product
        return grad, None, None, None
