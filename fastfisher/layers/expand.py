"""Parameters used as they are in broadcasting functions: gains, scales, biases, class tokens, position embeddings.

The call is made on one copy of the parameter per example (an expanded view: no memory), and autograd's own gradient of
the copies is the gradient of each example.
"""

from __future__ import annotations

from torch import Tensor

from fastfisher.layers.base import Layer, Layout, computing


class Expand(Layer):
    """A broadcasting function of a parameter and of ``operand``."""

    replaces = True

    def __init__(self, parameter: Tensor, operand: Tensor) -> None:
        super().__init__(operand, operand.dim(), {"value": parameter})
        self.parameter = parameter

    def check_unchanged(self) -> None:
        """The operand is autograd's business."""

    def _dim(self, layout: Layout) -> int:
        """The parameter's own dimension that faces the examples; negative where it has none there."""
        return layout.dim - (self.operand.dim() - self.parameter.dim())

    def accepts(self, layout: Layout) -> bool:
        if layout.examples == 1:
            return True
        if self.parameter.dim() > self.operand.dim():
            return False
        dim = self._dim(layout)
        # One row for all examples, or the same row for each (a class token expanded to the batch).
        return dim < 0 or self.parameter.shape[dim] == 1 or self.parameter.stride(dim) == 0

    def narrow(self) -> Tensor:
        dim = self._dim(self.layout)
        if self.layout.examples > 1 and dim >= 0 and self.parameter.shape[dim] > 1:
            return self.parameter.narrow(dim, 0, 1)
        return self.parameter

    def output(self) -> Tensor:
        value = self.narrow().detach()
        if self.layout.examples == 1:
            return value.view_as(value)
        value = value.view(*[1] * (self.operand.dim() - value.dim()), *value.shape)
        sizes = list(value.shape)
        sizes[self.layout.dim] = self.operand.shape[self.layout.dim]
        return value.expand(sizes)

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout.examples == 1:
            d = grad[None]
        else:
            d = self.layout.split(grad)
            if self.layout.repeat > 1:
                d = d.sum(1)
        d = computing(d).reshape(self.layout.examples, *self.tensors["value"].shape)
        return d, d

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        return d
