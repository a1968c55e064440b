"""Losses at labels drawn from the logits themselves, as users call them, and the key they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.checks import check_generator, is_count
from fastfisher.host import looking_waits
from fastfisher.ops import reference
from fastfisher.ops.derivatives import bernoulli_hessian_product
from fastfisher.outputs import class_last
from fastfisher.slow_path import warn_slow_path

Reduction = Literal["mean", "sum", "none"]


def new_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A fresh key (seed, offset) as int64[2] on ``device``, drawn from ``generator`` or from torch's default one."""
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.empty(2, dtype=torch.int64, device=source).random_(generator=generator).to(device)


def sample_cross_entropy(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    reduction: Reduction = "mean",
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
    _check(logits, "a tensor of shape (..., C)", generator, key, reduction, first)
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., C), got a scalar")
    logits = class_last(logits, class_dim, least=0)
    key = new_key(generator, logits.device) if key is None else key
    flat = logits.dim() == 2
    rows = logits if flat else logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    loss, labels = _sampled(_CATEGORICAL, rows, key, first, reduction)
    if flat:
        return loss, labels
    return loss.view(logits.shape[:-1]) if reduction == "none" else loss, labels.view(logits.shape[:-1])


def sample_binary_cross_entropy(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    reduction: Reduction = "mean",
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws y ~ Bernoulli(sigmoid(z)) for each logit z and returns −log p(y) = softplus(z) − y z and y, in one pass.

    The gradient of the loss in a logit is sigmoid(z) − y, whose second moment is the Fisher information p (1 − p) of
    the logit. Twice differentiable. It stands for ``torch.bernoulli(torch.sigmoid(z))``,
    ``F.binary_cross_entropy_with_logits`` and its backward, which take five times as long or more for millions of
    logits.

    Args:
        logits: of any shape; float32, float64, bfloat16 or float16. ±inf is a probability of 1 or 0.
        generator: where the key comes from; torch's default generator otherwise, so ``torch.manual_seed`` governs it.
        key: int64[2] (seed, offset) instead. The same key and logits give the same labels.
        reduction: "mean" over all elements, "sum", or "none".
        first: the number of the first element, in row-major order: parts of a batch, drawn with one key, get the labels
            of the whole.

    Returns:
        The loss (float64 for float64 logits, else float32; shape () or that of the logits) and the labels, 0 or 1, in
        shape and dtype of the logits as ``F.binary_cross_entropy_with_logits`` takes them. No elements: a mean of NaN,
        as there.

    Raises:
        ValueError: an unknown reduction, a ``first`` that is no element's number, a key or generator that is none, both
            of them, or a NaN among the logits, which is named.
    """
    _check(logits, "a tensor", generator, key, reduction, first)
    key = new_key(generator, logits.device) if key is None else key
    return _sampled(_BERNOULLI, logits, key, first, reduction)


def _check(logits: Any, expected: str, generator: Any, key: Any, reduction: Any, first: Any) -> None:
    """Raises ValueError where one of the arguments is none."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: expected {expected}, got {type(logits).__name__}")
    check_generator(generator)
    if not (key is None or isinstance(key, Tensor)):
        raise ValueError(f"key: expected an int64 tensor of 2 elements or None, got {type(key).__name__}")
    if not (isinstance(reduction, str) and reduction in ("mean", "sum", "none")):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not is_count(first, 0):
        raise ValueError(f"first: expected a number >= 0, got {first!r}")
    if key is not None and generator is not None:
        raise ValueError("key and generator: expected one of them, got both")


class _Drawn(NamedTuple):
    """A likelihood whose loss at a drawn label has an operator."""

    operator: Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor, Tensor]]
    hessian_product: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """The derivative of the operator's gradient, from the gradient, the labels, a vector and the scale. A Hessian of
    −log p is symmetric."""
    definition: Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor, Tensor]]
    """The operator in plain PyTorch, for ``torch.func``, which takes no derivative that is registered."""
    row_dims: int
    """How many of the last dimensions one label is drawn of."""


_CATEGORICAL = _Drawn(ops.sample_cross_entropy, ops.softmax_hessian_product, reference.sample_cross_entropy, 1)
_BERNOULLI = _Drawn(
    ops.sample_binary_cross_entropy,
    lambda gradient, labels, vector, scale: bernoulli_hessian_product(gradient, vector, scale),
    reference.sample_binary_cross_entropy,
    0,
)


def _sampled(drawn: _Drawn, logits: Tensor, key: Tensor, first: int, reduction: Reduction) -> tuple[Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()  # whose tracing stops at the question after torch.func
    if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
        warn_slow_path(
            "within torch.func labels and their loss are drawn by PyTorch's own functions, in several passes"
        )
        nll, labels, _ = drawn.definition(logits, key, 1.0, first)
        loss = _reduced(nll, reduction)
    elif logits.requires_grad and torch.is_grad_enabled() and not compiling:
        loss, labels, _ = _Sampled.apply(logits, key, first, reduction, drawn)  # type: ignore[no-untyped-call]
    else:
        nll, labels, _ = drawn.operator(logits, key, 1.0, first)
        loss = _reduced(nll, reduction)
    return loss, labels


def _reduced(nll: Tensor, reduction: Reduction) -> Tensor:
    return nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else nll


class _Sampled(torch.autograd.Function):
    """The drawn loss with its derivative, in half of the time that the operator's own takes, which is registered in
    Python. ``torch.compile`` takes that one.

    Its third output is the gradient in the logits, so that a second derivative finds its way through it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, key: Tensor, first: int, reduction: Reduction, drawn: _Drawn
    ) -> tuple[Tensor, Tensor, Tensor]:
        # With the mean taken in the operator, a backward from the loss itself has nothing left to do. A low precision
        # would lose there what a gradient scaler is to keep.
        precise = logits.dtype in (torch.float32, torch.float64) and not looking_waits(logits)
        rows = len(logits) if drawn.row_dims else logits.numel()
        ctx.scale = 1.0 / rows if reduction == "mean" and precise and rows else 1.0
        nll, labels, gradient = drawn.operator(logits, key, ctx.scale, first)
        ctx.reduction, ctx.drawn = reduction, drawn
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
                return gradient, None, None, None, None
            if ctx.reduction == "mean" and ctx.scale == 1.0:
                grad_loss = grad_loss / labels.numel()
            # In the precision of the loss: what a gradient scaler multiplies by may have no value in float16.
            grad = (gradient * grad_loss[(..., *(None,) * ctx.drawn.row_dims)]).to(gradient.dtype)
        if grad_gradient is not None:
            product = ctx.drawn.hessian_product(gradient, labels, grad_gradient, ctx.scale)
            grad = product if grad is None else grad + product
        return grad, None, None, None, None
