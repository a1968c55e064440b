"""Parameters used as they are in broadcasting functions: gains, scales, biases, class tokens, position embeddings.

The call is made on one copy of the parameter per example (an expanded view: no memory), and autograd's own gradient of
the copies is the gradient of each example.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine.calls import tensors_in
from fastfisher.engine.layers.base import Layer, Layout, Tracked, computing, depends, functions

COPIED_ELEMENTS = 1 << 26
"""How many elements the gradients of all copies may have."""


class Expand(Layer):
    """A broadcasting function of a parameter and of ``operand``, or one that multiplies matrices ``within`` it."""

    replaces = True

    def __init__(self, parameter: Tensor, operand: Tensor, within: int = 0) -> None:
        super().__init__(operand, operand.dim() - within, {"value": parameter})
        # Not the operand itself, which is released before the number of its dimensions is asked for.
        self.parameter, self.dims = parameter, operand.dim()

    def check_unchanged(self) -> None:
        """No check here: autograd itself detects an operand that was changed."""

    def _dim(self, layout: Layout) -> int:
        """The parameter's own dimension that faces the examples; negative where it has none there."""
        return layout.dim - (self.dims - self.parameter.dim())

    def accepts(self, layout: Layout) -> bool:
        if layout.examples == 1:
            return True
        if self.parameter.dim() > self.operand.dim() or layout.examples * self.parameter.numel() > COPIED_ELEMENTS:
            return False
        dim = self._dim(layout)
        # One row for all examples, the same row for each (a class token expanded to the batch), or a row of its own.
        return dim < 0 or self.parameter.shape[dim] in (1, self.operand.shape[layout.dim])

    def _own_rows(self) -> bool:
        """Whether each example uses rows of its own, as of an embedding of positions that was looked up for each."""
        dim = self._dim(self.layout)
        return self.layout.examples > 1 and dim >= 0 and self.parameter.shape[dim] > 1 and not self._copied(dim)

    def _copied(self, dim: int) -> bool:
        return self.parameter.stride(dim) == 0

    def narrow(self) -> Tensor:
        dim = self._dim(self.layout)
        if self.layout.examples > 1 and dim >= 0 and self.parameter.shape[dim] > 1 and self._copied(dim):
            return self.parameter.narrow(dim, 0, 1)
        return self.parameter

    def output(self) -> Tensor:
        value = self.narrow().detach()
        if self.layout.examples == 1 or self._own_rows():
            return value.view_as(value)
        value = value.view(*[1] * (self.operand.dim() - value.dim()), *value.shape)
        sizes = list(value.shape)
        sizes[self.layout.dim] = self.operand.shape[self.layout.dim]
        return value.expand(sizes)

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        examples = torch.arange(self.layout.examples, device=grad.device)
        if self.layout.examples == 1:
            return examples, computing(grad)[None]
        if self._own_rows():
            return examples, computing(self._place().split(grad))
        d = self.layout.split(grad)
        if self.layout.repeat > 1:
            d = d.sum(1)
        return examples, computing(d).reshape(self.layout.examples, *self.tensors["value"].shape)

    def _place(self) -> Layout:
        """Where the examples are in the parameter."""
        return replace(self.layout, dim=self._dim(self.layout))

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if not self._own_rows():
            return d
        found = d.new_zeros(len(d), *self.tensors["value"].shape)
        for gradient, example, rows in zip(found, a.tolist(), d, strict=True):
            self._place().split(gradient)[example].copy_(rows)
        return found


class Einsum(Expand):
    """torch.einsum of a parameter: with a copy for each example, whose subscripts get that of the examples."""

    def __init__(self, equation: str, operands: list[Tensor], parameter: Tensor, operand: Tensor) -> None:
        super().__init__(parameter, operand)
        left, _, self.out = equation.replace(" ", "").partition("->")
        self.subscripts = left.split(",")
        self.operands = operands
        self.rows = operand.shape

    def _letter(self, layout: Layout) -> str:
        place = next(i for i, x in enumerate(self.operands) if x is self.operand)
        return self.subscripts[place][layout.dim]

    def accepts(self, layout: Layout) -> bool:
        if layout.examples == 1:
            return True
        letter = self._letter(layout)
        own = next(s for s, x in zip(self.subscripts, self.operands, strict=True) if x is self.parameter)
        fits = layout.examples * layout.repeat * self.parameter.numel() <= COPIED_ELEMENTS
        return letter in self.out and letter not in own and fits

    def rewritten(self, args: Any) -> Any:
        if self.layout.examples == 1:
            return args
        letter = self._letter(self.layout)
        pairs = zip(self.subscripts, self.operands, strict=True)
        subscripts = ",".join(letter + s if x is self.parameter else s for s, x in pairs)
        return (f"{subscripts}->{self.out}", *args[1:])

    def _own_rows(self) -> bool:
        return False

    def narrow(self) -> Tensor:
        return self.parameter

    def output(self) -> Tensor:
        value = self.parameter.detach()
        if self.layout.examples == 1:
            return value.view_as(value)
        return value.expand(self.rows[self.layout.dim], *value.shape)

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        examples = torch.arange(self.layout.examples, device=grad.device)
        if self.layout.examples == 1:
            return examples, computing(grad)[None]
        d = replace(self.layout, dim=0).split(computing(grad))
        return examples, d.sum(1) if self.layout.repeat > 1 else d


def bind_einsum(tracked: Tracked, equation: str, operands: Any, path: Any = None) -> Layer | None:
    """The formula for an einsum of one parameter, or None."""
    operands = list(operands)
    parameters = [x for x in operands if tracked(x)]
    others = [x for x in operands if not tracked(x) and depends(x)]
    if len(parameters) != 1 or not others or "." in equation or "->" not in equation:
        return None
    return Einsum(equation, operands, parameters[0], max(others, key=Tensor.dim))


def bind_expand(tracked: Tracked, args: Any, kwargs: Any, within: int = 0) -> Layer | None:
    """The formula for a broadcasting function of one parameter, or for a product of matrices ``within`` it, or None."""
    tensors = list(tensors_in((args, kwargs)))
    parameters = [t for t in tensors if tracked(t)]
    others = [t for t in tensors if not tracked(t) and depends(t)]
    if len(parameters) != 1:
        return None
    return Expand(parameters[0], max(others, key=Tensor.dim), within)


BROADCASTING = {
    *functions(
        "add sub subtract mul multiply div divide true_divide rsub pow maximum minimum where lerp addcmul cat concat "
        "add_ sub_ mul_ div_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
        "__rtruediv__ __itruediv__ __rdiv__ __pow__ __rpow__"
    ),
    F.scaled_dot_product_attention,  # of a bias of the scores
}
"""Functions that broadcast a parameter to the shape of what depends on the examples."""

MATRICES = frozenset(functions("matmul bmm __matmul__ __rmatmul__ baddbmm"))
"""Products of matrices in the last two dimensions, which broadcast in those before."""

EINSUM = torch._C._VariableFunctions.einsum  # type: ignore[attr-defined]
