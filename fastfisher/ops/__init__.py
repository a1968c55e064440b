"""The operators, by family: each is its definition in reference.py, served by the fastest backend that there is.

An operator has a schema and CPU function in csrc/host, kernels in csrc/cpu and kernels/, all in files of its family's
name; docs/kernels.md says how to add one. :func:`fastfisher.sample_cross_entropy` and
:func:`fastfisher.sample_binary_cross_entropy` are the public faces of those that users call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import derivatives, reference, served
from fastfisher.ops.served import operator
from fastfisher.slow_path import warn_slow_path

UNAVAILABLE, GPU_UNAVAILABLE = served.UNAVAILABLE, served.GPU_UNAVAILABLE
"""Why the compiled kernels, and Triton's, do not serve; None where they do."""


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _doubles(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _fake_sample(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    loss_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(rows, dtype=loss_dtype), logits.new_empty(rows, dtype=torch.long), _contiguous(logits)


def _fake_sample_binary(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    like = _contiguous(logits)
    loss_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return like.new_empty(like.shape, dtype=loss_dtype), torch.empty_like(like), like


_sample_cross_entropy = operator("rows", reference.sample_cross_entropy, _fake_sample, derivatives.SAMPLE_CROSS_ENTROPY)
_sample_binary_cross_entropy = operator(
    "rows", reference.sample_binary_cross_entropy, _fake_sample_binary, derivatives.SAMPLE_BINARY_CROSS_ENTROPY
)


def _without_autograd(logits: Tensor, name: str) -> bool:
    """Whether the compiled operator may be called below autograd, which costs microseconds in Python."""
    differentiated = logits.requires_grad and torch.is_grad_enabled()
    return not differentiated and served.compiled(name, logits.device)


def sample_cross_entropy(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.sample_cross_entropy`; differentiable twice in ``logits``."""
    if not _without_autograd(logits, "sample_cross_entropy"):
        return _sample_cross_entropy(logits, key, scale, first)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastfisher.sample_cross_entropy.default(logits, key, scale, first)  # type: ignore[no-any-return]


def sample_binary_cross_entropy(
    logits: Tensor, key: Tensor, scale: float, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.sample_binary_cross_entropy`; differentiable twice in ``logits``."""
    if not _without_autograd(logits, "sample_binary_cross_entropy"):
        return _sample_binary_cross_entropy(logits, key, scale, first)
    with torch._C._AutoDispatchBelowAutograd():
        found = torch.ops.fastfisher.sample_binary_cross_entropy.default(logits, key, scale, first)
        return found  # type: ignore[no-any-return]


softmax_hessian_product = operator(
    "rows", reference.softmax_hessian_product, lambda d, *_: _contiguous(d), derivatives.SOFTMAX_HESSIAN_PRODUCT
)
rademacher_cotangent = operator("rows", reference.rademacher_cotangent, lambda logits, *_: _contiguous(logits))


# ---- gates ----------------------------------------------------------------------------------------------------------


def _bits(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 31) // 32, dtype=torch.int32)


def _fake_max_pool(
    x: Tensor, height: int, width: int, stride_height: int, stride_width: int, gated: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = (x.shape[1] - height) // stride_height + 1, (x.shape[2] - width) // stride_width + 1
    values = x.new_empty(x.shape[0], rows * columns)
    return values, torch.empty_like(values, dtype=torch.int32)


gate_relu = operator("gates", reference.gate_relu, lambda x, *_: (torch.empty_like(x), _bits(x)))
gate_relu_ = operator("gates", reference.gate_relu_, lambda x, *_: _bits(x))
gate_apply = operator("gates", reference.gate_apply, lambda x, *_: torch.empty_like(x))
gate_max_pool = operator("gates", reference.gate_max_pool, _fake_max_pool)
gate_take = operator("gates", reference.gate_take, lambda x, indices: x.new_empty(indices.shape))
gate_put = operator("gates", reference.gate_put, lambda y, indices, elements: y.new_empty(y.shape[0], elements))


# ---- lists ----------------------------------------------------------------------------------------------------------


def _as_stored(x: Tensor, like: Tensor) -> Tensor:
    """A view of ``x`` with its dimensions in the order in which those of ``like`` lie in memory (channels last)."""
    return x.permute(sorted(range(like.dim()), key=like.stride, reverse=True))


_axpy_diff = operator("lists", reference.axpy_diff, lambda out, *_: _doubles(out[0]))
_sum_squares = operator("lists", reference.sum_squares, lambda tensors: _doubles(tensors[0]))
_perturb = operator("lists", reference.perturb, lambda *_: None)
probe_dot = operator("lists", reference.probe_dot, lambda tensors, key, *_: _doubles(key))


def axpy_diff(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.axpy_diff`."""
    lists = [list(out), list(a), list(b)]
    if served.compiled("axpy_diff", out[0].device) and not all(x.is_contiguous() for some in lists for x in some):
        for i, (target, *read) in enumerate(zip(*lists, strict=False)):
            if not _as_stored(target, target).is_contiguous():
                warn_slow_path("axpy_diff runs its PyTorch reference: a tensor of out has gaps in memory")
                return reference.axpy_diff(out, a, b, scale)
            if all(x.shape == target.shape for x in read):
                for some in lists:
                    some[i] = _as_stored(some[i], target).contiguous()
        out, a, b = lists
    return _axpy_diff(out, a, b, scale)


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """See :func:`fastfisher.ops.reference.sum_squares`."""
    # The elements may be added in any order: in that of memory, no copy is needed.
    return _sum_squares([x if x.is_contiguous() else _as_stored(x, x) for x in tensors])


def perturb(
    out: list[Tensor], tensors: list[Tensor], key: Tensor, eps: float, distribution: str, first: int = 0
) -> None:
    """See :func:`fastfisher.ops.reference.perturb`."""
    if served.compiled("perturb", out[0].device):
        if not all(x.is_contiguous() for x in out):
            warn_slow_path("perturb runs its PyTorch reference: a tensor of out is not contiguous")
            return reference.perturb(out, tensors, key, eps, distribution, first)
        tensors = [x.contiguous() for x in tensors]
    return _perturb(out, tensors, key, eps, distribution, first)


# ---- norms ----------------------------------------------------------------------------------------------------------

_grad_sqnorm_linear = operator("norms", reference.grad_sqnorm_linear, lambda a, *_: _doubles(a, len(a)))


def grad_sqnorm_linear(a: Tensor, d: Tensor, gram: bool) -> Tensor:
    """See :func:`fastfisher.ops.reference.grad_sqnorm_linear`."""
    if served.compiled("grad_sqnorm_linear", a.device):
        return _grad_sqnorm_linear(a, d, gram)
    few = max(1, 2**22 // max(1, a.shape[2] * d.shape[2]))  # examples at a time: the reference holds their gradients
    parts = zip(torch.split(a, few), torch.split(d, few), strict=True)
    return torch.cat([reference.grad_sqnorm_linear(x, y, gram) for x, y in parts])


grad_sqnorm_conv = operator(
    "norms", reference.grad_sqnorm_conv, lambda a, *_: (_doubles(a, len(a)), _doubles(a, len(a)))
)
channel_products = operator(
    "norms", reference.channel_products, lambda a, *_: (_doubles(a, *a.shape[:2]), _doubles(a, *a.shape[:2]))
)


# ---- batch_norm -----------------------------------------------------------------------------------------------------

batch_norm = operator(
    "batch_norm",
    reference.batch_norm,
    lambda x, *_: (torch.empty_like(x), _doubles(x, x.shape[1]), _doubles(x, x.shape[1])),
)
batch_norm_backward = operator(
    "batch_norm",
    reference.batch_norm_backward,
    lambda grad, bits, x, *_: (torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])),
)


GPU_KERNELS = {name: family for name, family in served.FAMILIES.items() if family in served.TRITON}
"""The file of kernels/ that serves each operator on CUDA. One that is not named here takes its definition there."""
