"""Normalisations: batch (in eval mode), layer, group, instance and RMS norm, and their affine parameters.

With x̂ the normalised input and D the gradient of the output, an example's gradients are Σ D x̂ for the weight and Σ D
for the bias, over the positions that share an element of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.engine.layers.base import Layer, Layout, Tracked, chunks, computing, formula_for, squares, used


class _Affine(Layer):
    """A normalisation followed by weight and bias; ``function(input, weight, bias)`` is the whole."""

    def __init__(
        self, input: Tensor, leading: int, function: Callable[..., Tensor], tensors: dict[str, Tensor],
        weight: Tensor | None, bias: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(input, leading, tensors)
        self.function, self.size = function, input.numel()
        self.weight, self.bias = (None if t is None else t.detach() for t in (weight, bias))

    def output(self) -> Tensor:
        out = self.function(self.operand, self.weight, self.bias)
        return out.clone() if out._is_view() else out

    def normalised(self) -> Tensor:
        """x̂, without a graph."""
        with torch.no_grad():
            return self.function(self.operand.detach(), None, None)

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        d = self.layout.split(computing(grad))
        a = self.layout.split(computing(self.normalised())) if "weight" in self.tensors else d
        return a, d


class ChannelNorm(_Affine):
    """torch.batch_norm in eval mode, group_norm and instance_norm: one weight for each channel (dimension 1)."""

    def accepts(self, layout: Layout) -> bool:
        return layout.dim == 0

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        product = d if slot == "bias" else d * a
        if self.layout.repeat > 1:
            product = product.sum(1)
        return product.flatten(2).sum(2) if product.dim() > 2 else product

    def chunks(self, slot: str, examples: int) -> Iterator[slice]:
        """A chunk holds products of the size of the input."""
        return chunks(examples, self.size // examples)


class BatchNorm(ChannelNorm):
    """torch.batch_norm in eval mode: an affine function of each channel, y = (x − μ)/σ·w + b."""

    pulls_back = True

    def __init__(
        self, input: Tensor, function: Callable[..., Tensor], tensors: dict[str, Tensor], weight: Tensor | None,
        bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float,
    ) -> None:  # fmt: skip
        super().__init__(input, 1, function, tensors, weight, bias)
        self.mean, self.inverse = mean, (variance + eps).rsqrt()

    def output(self) -> Tensor:
        return self.function(self.operand.detach(), self.weight, self.bias)

    def pull_back(self, grad: Tensor) -> Tensor:
        factor = self.inverse if self.weight is None else self.inverse * self.weight
        return grad * factor.to(grad.dtype).view(-1, *[1] * (grad.dim() - 2))

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return self.layout.split(self.operand.detach()), self.layout.split(grad)

    def squared_norms(self, slots: list[str], a: Tensor, d: Tensor) -> dict[str, Tensor]:
        found = self._products(a, d)
        return {slot: squares(found[slot]) for slot in slots}

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        return self._products(a, d)[slot].to(computing(d).dtype)

    def _products(self, a: Tensor, d: Tensor) -> dict[str, Tensor]:
        """The gradients of each example, float64[N, C]."""
        channels, repeat = len(self.mean), self.layout.repeat
        a, d = (x.to(d.dtype).reshape(len(d) * repeat, channels, -1) for x in (a, d))
        products, sums = ops.channel_products(a, d, self.mean.to(d.dtype))
        products, sums = (x.view(-1, repeat, channels).sum(1) for x in (products, sums))
        return {"weight": products * self.inverse, "bias": sums}


class TrailingNorm(_Affine):
    """torch.layer_norm and rms_norm: one weight for each element of the last ``len(shape)`` dimensions."""

    by_rows = True

    def __init__(
        self, input: Tensor, shape: tuple[int, ...], function: Callable[..., Tensor], tensors: dict[str, Tensor],
        weight: Tensor | None, bias: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(input, input.dim() - len(shape), function, tensors, weight, bias)
        self.shape = shape

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        product = d if slot == "bias" else d * a
        return product.reshape(len(d), -1, *self.shape).sum(1)


@formula_for(torch.batch_norm)
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
    function = lambda x, w, b: torch.batch_norm(x, w, b, mean, variance, False, 0.0, eps, False)  # noqa: E731
    return BatchNorm(input, function, used(tracked, weight=weight, bias=bias), weight, bias, mean, variance, eps)


@formula_for(torch.group_norm)
def _group_norm(
    tracked: Tracked, input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    function = lambda x, w, b: torch.group_norm(x, groups, w, b, eps, False)  # noqa: E731
    return ChannelNorm(input, 1, function, used(tracked, weight=weight, bias=bias), weight, bias)


@formula_for(torch.instance_norm)
def _instance_norm(
    tracked: Tracked, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    variance: Tensor | None, use_input_stats: bool, momentum: float, eps: float, *_: Any,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    function = lambda x, w, b: torch.instance_norm(x, w, b, mean, variance, use_input_stats, 0.0, eps, False)  # noqa: E731
    return ChannelNorm(input, 1, function, used(tracked, weight=weight, bias=bias), weight, bias)


@formula_for(torch.layer_norm)
def _layer_norm(
    tracked: Tracked, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    function = lambda x, w, b: torch.layer_norm(x, shape, w, b, eps, False)  # noqa: E731
    return TrailingNorm(input, tuple(shape), function, used(tracked, weight=weight, bias=bias), weight, bias)


@formula_for(torch.rms_norm)
def _rms_norm(
    tracked: Tracked, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Layer | None:
    if tracked(input):
        return None
    function = lambda x, w, b: torch.rms_norm(x, shape, w, eps)  # noqa: E731
    return TrailingNorm(input, tuple(shape), function, used(tracked, weight=weight), weight, None)
