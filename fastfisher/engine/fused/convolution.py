"""Convolutions that go through a large batch in pieces: the same result with less memory, and in less time.

PyTorch's CPU convolution reorders its operands into blocked copies as large as they are: a backward holds two
activations' worth beside the one that it makes. Under glibc's malloc these are freshly mapped pages, whose first touch
costs as much as a good part of the arithmetic (backward of 128 images of 32x32x32 to 32 channels: 75 ms in one piece,
46 in eight; the first convolution of VGG-11: 70 and 32). In pieces of a few MiB the copies are small and are reused.
Under an allocator that keeps freed memory only the memory is saved, and pieces cost up to 5 % of the time.

The gradient in an input of few channels, such as an image, is a matrix product and a fold instead: oneDNN computes it
for channels in blocks of 16 (128 images of 3x32x32, 64 outputs of 4x4: 14 ms, and 5).

A piece is a range of examples; the weights' gradient is the sum over the pieces, in order, so it differs from
PyTorch's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.autocast import autocast_dtype
from fastfisher.engine.calls import complete

PIECE_BYTES = 2 << 20
"""The input or output of one piece takes at most this many bytes."""

LARGE_BYTES = 12 << 20
"""Above this, pieces save time (see above) and are always taken; from two pieces on, where memory has to be saved."""

FEW_CHANNELS = 4
"""Up to so many input channels the product and the fold take less than half of oneDNN's time; at 16 they take more."""

_saving: ContextVar[bool] = ContextVar("saving", default=False)


@contextmanager
def saving_memory() -> Iterator[None]:
    """Within, a backward takes pieces wherever they save memory, and not only where they save time as well."""
    token = _saving.set(True)
    try:
        yield
    finally:
        _saving.reset(token)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, size: int,
        large: bool, *how: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.size, ctx.large, ctx.bias_size = how, size, large, None if bias is None else [len(bias)]
        if not large:
            return convolve(x, weight, bias, *how)
        pieces = torch.split(x, size)
        first = convolve(pieces[0], weight, bias, *how)
        out = first.new_empty(len(x), *first.shape[1:])
        out[:size] = first
        for piece, target in zip(pieces[1:], torch.split(out, size)[1:], strict=True):
            target.copy_(convolve(piece, weight, bias, *how))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        dims = x.dim() - 2
        how = (ctx.bias_size, *(_each(value, dims) for value in (stride, padding, dilation)), False, [0] * dims, groups)
        derivatives = torch.ops.aten.convolution_backward
        wants_x, wants = _takes_input_gradient(ctx), list(ctx.needs_input_grad[2:4])
        differentiable = torch.is_grad_enabled()  # then PyTorch's formula, which has a derivative
        split, few = ctx.large or _saving.get(), wants_x and _has_few_channels(x, groups)
        if differentiable or not (split or few):
            return None, *derivatives(grad, x, weight, *how, [wants_x, *wants]), *[None] * (2 + len(ctx.how))
        pieces = list(zip(torch.split(grad, ctx.size), torch.split(x, ctx.size), strict=True))
        sums: list[Tensor | None] = [None, None]
        if any(wants) and not split:
            sums = list(derivatives(grad, x, weight, *how, [False, *wants])[1:])
        elif any(wants):
            for grad_piece, x_piece in pieces:
                parts = derivatives(grad_piece, x_piece, weight, *how, [False, *wants])[1:]
                sums = [part if total is None else total.add_(part) for total, part in zip(sums, parts, strict=True)]
        grad_x = None
        if wants_x:  # last: grad_x is then not in memory beside the copies that the weights' gradient takes
            grad_x = torch.empty_like(x)
            for (grad_piece, x_piece), target in zip(pieces, torch.split(grad_x, ctx.size), strict=True):
                target.copy_(
                    _input_gradient(grad_piece, weight, x.shape[2:], *how[1:4])
                    if few
                    else derivatives(grad_piece, x_piece, weight, *how, [True, False, False])[0]
                )
        return None, grad_x, *sums, *[None] * (2 + len(ctx.how))


def _has_few_channels(x: Tensor, groups: int) -> bool:
    """Whether :func:`_input_gradient` is to be taken. Narrower dtypes would round each of its sums."""
    return x.dim() == 4 and groups == 1 and x.shape[1] <= FEW_CHANNELS and x.dtype in (torch.float32, torch.float64)


def _input_gradient(
    grad: Tensor, weight: Tensor, size: torch.Size, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The gradient in the input, (N, C, *size): what each output gives its window, added up where windows overlap."""
    windows = weight.flatten(1).t() @ grad.flatten(2)
    return F.fold(windows, tuple(size), tuple(weight.shape[2:]), tuple(dilation), tuple(padding), tuple(stride))


def _takes_input_gradient(ctx: Any) -> bool:
    """Whether the backward that runs takes the gradient in x.

    A tensor may require a gradient that this backward is not for: GP_x takes that in the inputs at x alone, not at
    x + ρd. PyTorch's own nodes leave it out; ``needs_input_grad`` of a Python node is what was required in the forward.
    Of weights, which almost every backward is for, it is not asked: where the answer is an error, the error's trace
    keeps 2 MiB.
    """
    if not ctx.needs_input_grad[1]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[0][0])
    except RuntimeError:  # x is a leaf and autograd.grad runs, of which PyTorch cannot say it
        return True


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


_FUNCTIONS = {torch.conv1d: 3, torch.conv2d: 4, torch.conv3d: 5}


def in_pieces(function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """The convolution that ``function(*args, **kwargs)`` calls for, in pieces; None where that is not worth while.

    That is: another function, one example, tensors of at most two pieces, not row-major on the CPU, padding by name,
    or autocast.
    """
    if _FUNCTIONS.get(function) is None or autocast_dtype("cpu") is not None:
        return None
    x, weight, bias, stride, padding, dilation, groups = complete(function, args, kwargs)
    usual = x.device.type == "cpu" and x.dim() == _FUNCTIONS[function] and isinstance(padding, int | tuple | list)
    if not usual or len(x) < 2 or not (x.is_contiguous() and weight.is_contiguous()):
        return None
    # An estimate from above of the output's positions: padding that adds to them is rare.
    positions = x[0, 0].numel() // torch.Size(_each(stride, x.dim() - 2)).numel()
    example = max(x[0].numel(), len(weight) * positions) * x.element_size()
    if len(x) * example <= 2 * PIECE_BYTES:
        return None
    size, large = max(1, PIECE_BYTES // example), len(x) * example > LARGE_BYTES
    return _Convolution.apply(function, x, weight, bias, size, large, stride, padding, dilation, groups)  # type: ignore[no-any-return, no-untyped-call]
