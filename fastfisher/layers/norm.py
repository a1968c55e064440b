"""Normalisations: batch (in eval mode), layer, group, instance and RMS norm, and their affine parameters.

With x̂ the normalised input and D the gradient of the output, an example's gradients are Σ D x̂ for the weight and Σ D
for the bias, over the positions that share an element of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastfisher.layers.base import Layer, Layout, chunks, computing


class _Affine(Layer):
    """A normalisation followed by weight and bias; ``function(input, weight, bias)`` is the whole."""

    def __init__(
        self, input: Tensor, leading: int, function: Callable[..., Tensor], tensors: dict[str, Tensor],
        weight: Tensor | None, bias: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(input, leading, tensors)
        self.function = function
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
        return chunks(examples, self.operand.numel() // examples)


class TrailingNorm(_Affine):
    """torch.layer_norm and rms_norm: one weight for each element of the last ``len(shape)`` dimensions."""

    def __init__(
        self, input: Tensor, shape: tuple[int, ...], function: Callable[..., Tensor], tensors: dict[str, Tensor],
        weight: Tensor | None, bias: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(input, input.dim() - len(shape), function, tensors, weight, bias)
        self.shape = shape

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        product = d if slot == "bias" else d * a
        return product.reshape(len(d), -1, *self.shape).sum(1)
