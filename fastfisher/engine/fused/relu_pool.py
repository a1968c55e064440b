"""ReLU and max-pool as linear maps behind gates: autograd Functions that keep bits and indices, not activations.

PyTorch's ReLU keeps its output for the backward, a leaky one its input, and its max-pool its input and 64-bit indices.
Here a ReLU keeps one bit per element and a max-pool 32 bits per output, with the same values and gradients to the last
bit; given the gates of another forward, all become the linear maps that they were there. They are differentiable to any
order.

A max-pool right after a ReLU knows that no gradient passes where its maximum is 0, so what it sends back is gated
already; the ReLU recognises that gradient (and only that one) and hands it on as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops


class Passage:
    """The gates of one ReLU call, and the gradient that a max-pool after it has gated already.

    The bits are in the order of the memory; ``order`` names its dimensions where that is not row by row. ``slope`` is
    what elements behind closed gates are multiplied by in a leaky ReLU; None in one that makes them 0.
    """

    def __init__(self, bits: Tensor | None = None, order: list[int] | None = None, slope: float | None = None) -> None:
        self.bits, self.order, self.slope = bits, order, slope
        self.output: weakref.ref[Tensor] | None = None
        self.version = 0
        # This reference keeps autograd from accumulating into the tensor in place; without it, `grad is gated` would
        # not prove that the gradient is the gated one.
        self.gated: Tensor | None = None

    def leads_to(self, x: Tensor) -> bool:
        """Whether ``x`` is this ReLU's output, unchanged since."""
        return self.output is not None and self.output() is x and x._version == self.version

    def has_gated(self, grad: Tensor) -> bool:
        """Whether ``grad`` came through a max-pool that has gated it; asked once in a backward."""
        gated, self.gated = self.gated, None
        return grad is gated

    def through(self, x: Tensor, inplace: bool) -> Tensor:
        """``x`` where the gates are open, else 0 or its multiple; outside of autograd."""
        if self.bits is None and not x.is_contiguous():
            self.order = _memory_order(x)
        order, slope = self.order, () if self.slope is None else (self.slope,)
        ordered = x if order is None else x.permute(order)
        if self.bits is None and inplace and ordered.is_contiguous():
            self.bits = ops.gate_relu_(ordered, *slope)
            return x
        if self.bits is None:
            out, self.bits = ops.gate_relu(ordered.contiguous(), *slope)
        else:
            out = ops.gate_apply(ordered.contiguous(), self.bits, *slope)
        out = out if order is None else alias(out, x.shape, order)
        return x.copy_(out) if inplace else out


class _Gate(torch.autograd.Function):
    """x where the gates are open, else 0, or x times the slope of a leaky ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passage: Passage, inplace: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.passage = passage
        out = passage.through(x, inplace)
        ctx.save_for_backward(passage.bits)
        if inplace:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None and not ctx.passage.has_gated(grad):
            (bits,) = ctx.saved_tensors
            grad = gate(grad, Passage(bits, ctx.passage.order, ctx.passage.slope), False)
        return grad, None, None


def gate(x: Tensor, passage: Passage, inplace: bool) -> Tensor:
    """ReLU of ``x`` by the gates of ``passage``, or by its own, which ``passage`` has afterwards."""
    return _Gate.apply(x, passage, inplace)  # type: ignore[no-any-return, no-untyped-call]


class _Take(torch.autograd.Function):
    """Of each plane (the last ``dims`` dimensions) the elements at ``indices``, and 0 at index -1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, dims: int, taken: Tensor | None, passage: Passage | None) -> Any:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dims, ctx.passage = x.shape, dims, passage
        ctx.order = None if x.is_contiguous() else _memory_order(x)
        if taken is None:
            taken = ops.gate_take(_planes(x, dims), _planes(indices, dims))
        return _stored(taken.view(indices.shape), ctx.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        put = _Put.apply(grad, indices, ctx.dims, ctx.shape, ctx.order)  # type: ignore[no-untyped-call]
        if ctx.passage is not None:
            ctx.passage.gated = put
        return put, None, None, None, None


class _Put(torch.autograd.Function):
    """The transpose of :class:`_Take`: each element added to its place in planes of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, indices: Tensor, dims: int, shape: torch.Size, order: list[int] | None) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.dims = dims
        put = ops.gate_put(_planes(y, dims), _planes(indices, dims), shape[-dims:].numel())
        return _stored(put.view(shape), order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return _Take.apply(grad, indices, ctx.dims, None, None), None, None, None, None  # type: ignore[no-untyped-call]


def relu(
    x: Tensor, *, inplace: bool, gates: Passage | None = None, by: Callable[[Tensor, Passage, bool], Tensor] = gate,
    slope: float | None = None,
) -> tuple[Tensor, Passage]:  # fmt: skip
    """ReLU of ``x``, leaky where ``slope`` is given, by the gates of another forward if given; ``by`` does the work.

    Returns:
        The output (``x`` itself where ``inplace``), and the passage that holds its gates.
    """
    passage = Passage(slope=slope) if gates is None else Passage(gates.bits, gates.order, slope)
    out = by(x, passage, inplace)
    passage.output, passage.version = weakref.ref(out), out._version
    return out, passage


def max_pool2d(x: Tensor, window: tuple[int, int], stride: tuple[int, int], after: Passage | None) -> Any:
    """Max-pool of ``x[..., H, W]`` without padding or dilation; ``after`` is the ReLU whose output ``x`` is, if so.

    Returns:
        The values and their places in each plane (int32; -1 where ``after`` is closed), both [..., H', W'].
    """
    lead, (height, width) = x.shape[:-2], x.shape[-2:]
    planes = x.detach().reshape(lead.numel(), height, width).contiguous()
    values, indices = ops.gate_max_pool(planes, *window, *stride, after is not None)
    size = [(n - w) // s + 1 for n, w, s in zip((height, width), window, stride, strict=True)]
    indices = indices.view(*lead, *size)
    return _Take.apply(x, indices, 2, values, after), indices  # type: ignore[no-untyped-call]


def take(x: Tensor, indices: Tensor, dims: int, after: Passage | None) -> Tensor:
    """A max-pool over the last ``dims`` dimensions of ``x`` that takes the elements at ``indices`` (int32)."""
    return _Take.apply(x, indices, dims, None, after)  # type: ignore[no-any-return, no-untyped-call]


def _planes(x: Tensor, dims: int) -> Tensor:
    """``x`` as (planes, elements), its last ``dims`` dimensions flattened."""
    lead = x.dim() - dims
    return x.reshape(x.shape[:lead].numel(), x.shape[lead:].numel()).contiguous()


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions from the longest stride to the shortest: channels-last memory stays as it is."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda i: (-strides[i], i))


def _stored(x: Tensor, order: list[int] | None) -> Tensor:
    """The values of ``x`` with its dimensions in memory in this order, or row by row; no view."""
    return alias(x if order is None else x.permute(order).contiguous(), x.shape, order)


def alias(x: Tensor, shape: torch.Size, order: list[int] | None = None) -> Tensor:
    """The contiguous ``x`` as a tensor of this shape, its dimensions in memory in this order.

    Not a view: autograd forbids in-place changes of views that come out of a Function.
    """
    order = list(range(len(shape))) if order is None else order
    strides, stride = [1] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension], stride = stride, stride * shape[dimension]
    return x.new_empty(0).set_(x.untyped_storage(), 0, shape, tuple(strides))
