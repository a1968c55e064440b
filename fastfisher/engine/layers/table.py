"""Which formula serves which function of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine.calls import positional, tensors_in
from fastfisher.engine.layers.base import Layer, depends
from fastfisher.engine.layers.conv import Conv
from fastfisher.engine.layers.embedding import Embedding, EmbeddingBag
from fastfisher.engine.layers.expand import Einsum, Expand
from fastfisher.engine.layers.linear import Linear
from fastfisher.engine.layers.norm import BatchNorm, ChannelNorm, TrailingNorm

Tracked = Callable[[Tensor], bool]
Binder = Callable[..., Layer | None]


def bind(func: Any, args: Any, kwargs: Any, tracked: Tracked) -> Layer | None:
    """The formula for a call of ``func``, or None. ``tracked`` tells the parameters from what depends on examples."""
    if func in _BROADCASTING:
        return _expand(tracked, args, kwargs)
    if func is _EINSUM:
        return _einsum(tracked, *args, **kwargs)
    layer = None
    if func in _BINDERS and not any(t.is_complex() for t in tensors_in((args, kwargs))):
        placed, named = positional(func, args, kwargs)
        try:
            layer = _BINDERS[func](tracked, *placed, **named)
        except TypeError:  # arguments that the formula does not know of
            return None
    return _expand(tracked, args, kwargs, 2) if layer is None and func in _MATRICES else layer


def _slots(tracked: Tracked, **tensors: Tensor | None) -> dict[str, Tensor]:
    return {slot: t for slot, t in tensors.items() if t is not None and tracked(t)}


def _linear(tracked: Tracked, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Layer | None:
    if tracked(input) or weight.dim() != 2 or input.dim() < 2:
        return None
    return Linear(input, weight, bias, _slots(tracked, weight=weight, bias=bias))


def _matmul(tracked: Tracked, input: Tensor, other: Tensor) -> Layer | None:
    if tracked(input) or other.dim() != 2 or input.dim() < 2:
        return None
    return Linear(input, other.mT, None, {"weight": other}, transposed=True)


def _addmm(tracked: Tracked, bias: Tensor, input: Tensor, other: Tensor, **scales: Any) -> Layer | None:
    if scales or tracked(input) or bias.dim() != 1 or not tracked(other):
        return None
    return Linear(input, other.mT, bias, _slots(tracked, weight=other, bias=bias), transposed=True)


def _conv(
    tracked: Tracked, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    slots = _slots(tracked, weight=weight, bias=bias)
    return Conv(input, weight, bias, slots, stride, padding, dilation, groups)


def _conv_transpose(
    tracked: Tracked, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    slots = _slots(tracked, weight=weight, bias=bias)
    return Conv(input, weight, bias, slots, stride, padding, dilation, groups, True, output_padding)


def _batch_norm(
    tracked: Tracked, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    variance: Tensor | None, training: bool, momentum: float, eps: float, *_: Any,
) -> Layer | None:  # fmt: skip
    if training:
        raise ValueError(
            f"model: a batch norm of {input.shape[1]} channels normalises by the batch even in eval mode "
            "(track_running_stats=False), which couples the examples: per-example gradients do not exist"
        )
    if tracked(input) or mean is None or variance is None:
        return None

    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.batch_norm(x, w, b, mean, variance, False, 0.0, eps, False)

    return BatchNorm(input, function, _slots(tracked, weight=weight, bias=bias), weight, bias, mean, variance, eps)


def _group_norm(
    tracked: Tracked, input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None

    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.group_norm(x, groups, w, b, eps, False)

    return ChannelNorm(input, 1, function, _slots(tracked, weight=weight, bias=bias), weight, bias)


def _instance_norm(
    tracked: Tracked, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    variance: Tensor | None, use_input_stats: bool, momentum: float, eps: float, *_: Any,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None

    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.instance_norm(x, w, b, mean, variance, use_input_stats, 0.0, eps, False)

    return ChannelNorm(input, 1, function, _slots(tracked, weight=weight, bias=bias), weight, bias)


def _layer_norm(
    tracked: Tracked, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None

    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.layer_norm(x, shape, w, b, eps, False)

    return TrailingNorm(input, tuple(shape), function, _slots(tracked, weight=weight, bias=bias), weight, bias)


def _rms_norm(
    tracked: Tracked, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Layer | None:
    if tracked(input):
        return None

    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.rms_norm(x, shape, w, eps)

    return TrailingNorm(input, tuple(shape), function, _slots(tracked, weight=weight), weight, None)


def _embedding(
    tracked: Tracked, weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Layer | None:  # fmt: skip
    if scale_grad_by_freq:
        return None  # a gradient that is none
    return Embedding(weight, indices, {"weight": weight}, padding_idx)


def _embedding_bag(
    tracked: Tracked, weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False,
    mode: int = 0, sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Layer | None:  # fmt: skip
    scales = per_sample_weights
    if scale_grad_by_freq or (scales is not None and (tracked(scales) or scales.requires_grad)):
        return None
    return EmbeddingBag(weight, indices, offsets, mode, scales, include_last_offset, padding_idx)


def _einsum(tracked: Tracked, equation: str, operands: Any, path: Any = None) -> Layer | None:
    operands = list(operands)
    parameters = [x for x in operands if tracked(x)]
    others = [x for x in operands if not tracked(x) and depends(x)]
    if len(parameters) != 1 or not others or "." in equation or "->" not in equation:
        return None
    return Einsum(equation, operands, parameters[0], max(others, key=Tensor.dim))


def _expand(tracked: Tracked, args: Any, kwargs: Any, within: int = 0) -> Layer | None:
    tensors = list(tensors_in((args, kwargs)))
    parameters = [t for t in tensors if tracked(t)]
    others = [t for t in tensors if not tracked(t) and depends(t)]
    if len(parameters) != 1:
        return None
    return Expand(parameters[0], max(others, key=Tensor.dim), within)


def _functions(names: str, *places: Any) -> list[Any]:
    return [getattr(place, name) for name in names.split() for place in places if hasattr(place, name)]


_BINDERS: dict[Any, Binder] = {
    torch._C._nn.linear: _linear,
    torch.addmm: _addmm,
    torch.batch_norm: _batch_norm,
    torch.group_norm: _group_norm,
    torch.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: _rms_norm,
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
    **dict.fromkeys(_functions("matmul mm __matmul__", torch, Tensor), _matmul),
    **dict.fromkeys(_functions("conv1d conv2d conv3d", torch), _conv),
    **dict.fromkeys(_functions("conv_transpose1d conv_transpose2d conv_transpose3d", torch), _conv_transpose),
}

_BROADCASTING = set(
    _functions(
        "add sub subtract mul multiply div divide true_divide rsub pow maximum minimum where lerp addcmul cat concat "
        "add_ sub_ mul_ div_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
        "__rtruediv__ __itruediv__ __rdiv__ __pow__ __rpow__",
        torch,
        Tensor,
    )
)
_BROADCASTING.add(F.scaled_dot_product_attention)  # of a bias of the scores

_MATRICES = frozenset(_functions("matmul bmm __matmul__ __rmatmul__ baddbmm", torch, Tensor))
"""Products of matrices in the last two dimensions, which broadcast in those before."""

_EINSUM = torch._C._VariableFunctions.einsum  # type: ignore[attr-defined]
