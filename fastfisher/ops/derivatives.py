"""The derivatives of the compiled operators. The definitions in reference.py are differentiated by autograd itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Derivative(NamedTuple):
    """What ``torch.library.register_autograd`` takes."""

    setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., Any]


# ---- sample_cross_entropy: d nll = dlogits / scale, d dlogits = the softmax's Jacobian, which is symmetric ----------


def _save_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.scale = inputs[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], output[2])


def _sample_backward(ctx: Any, grad_nll: Tensor | None, _: None, grad_dlogits: Tensor | None) -> Any:
    labels, dlogits = ctx.saved_tensors
    grad = None
    if grad_nll is not None:
        grad = dlogits * (grad_nll / ctx.scale)[:, None].to(dlogits.dtype)
    if grad_dlogits is not None:
        product = torch.ops.fastfisher.softmax_hessian_product(dlogits, labels, grad_dlogits, ctx.scale)
        grad = product if grad is None else grad + product
    return grad, None, None, None


SAMPLE_CROSS_ENTROPY = Derivative(_save_sample, _sample_backward)


# ---- softmax_hessian_product: p⊙v − p (p·v), linear in v and quadratic in p ------------------------------------------


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dlogits, labels, vector, ctx.scale = inputs
    ctx.save_for_backward(dlogits, labels, vector)


def _product_backward(ctx: Any, grad: Tensor) -> Any:
    dlogits, labels, vector = ctx.saved_tensors
    p = dlogits / ctx.scale + torch.nn.functional.one_hot(labels, dlogits.shape[1])
    mean_vector, mean_grad = (p * vector).sum(1, keepdim=True), (p * grad).sum(1, keepdim=True)
    grad_dlogits = grad * vector - mean_vector * grad - mean_grad * vector
    grad_vector = torch.ops.fastfisher.softmax_hessian_product(dlogits, labels, grad, ctx.scale)
    return grad_dlogits, None, grad_vector, None


SOFTMAX_HESSIAN_PRODUCT = Derivative(_save_product, _product_backward)


# ---- sample_binary_cross_entropy: d nll = dlogits / scale, d dlogits = p (1 − p)·scale -------------------------------


def bernoulli_hessian_product(dlogits: Tensor, vector: Tensor, scale: float) -> Tensor:
    """p (1 − p) v·scale: the derivative of sigmoid applied to v. Of either label |dlogits/scale| is 1 − p(label)."""
    precise = torch.promote_types(dlogits.dtype, torch.float32)
    other = (dlogits.to(precise) / scale).abs()  # the probability of the label that was not drawn
    return (other * (1 - other) * scale * vector.to(precise)).to(dlogits.dtype)


def _save_binary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.scale = inputs[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[2])


def _binary_backward(ctx: Any, grad_nll: Tensor | None, _: None, grad_dlogits: Tensor | None) -> Any:
    (dlogits,) = ctx.saved_tensors
    grad = None
    if grad_nll is not None:
        grad = dlogits * (grad_nll / ctx.scale).to(dlogits.dtype)
    if grad_dlogits is not None:
        product = bernoulli_hessian_product(dlogits, grad_dlogits, ctx.scale)
        grad = product if grad is None else grad + product
    return grad, None, None, None


SAMPLE_BINARY_CROSS_ENTROPY = Derivative(_save_binary, _binary_backward)
