"""Normalisations: batch (in eval mode), layer, group, instance and RMS norm, and their affine parameters.

With x̂ the normalised input and D the gradient of the output, an example's gradients are Σ D x̂ for the weight and Σ D
for the bias, over the positions that share an element of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.engine.layers.base import Layer, Layout, chunks, computing, squares


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
