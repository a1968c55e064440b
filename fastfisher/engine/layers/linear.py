"""Linear layers: y = x Wᵀ + b on the last dimension, and products with a parameter from the right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.engine.layers.base import (
    Layer,
    Tracked,
    chunks,
    computing,
    formula_for,
    functions,
    gram_of_positions,
    squares,
    used,
)


def gram_is_cheaper(positions: int, inputs: int, outputs: int, device: torch.device) -> bool:
    """Whether inner products of positions cost less than the gradient's tiles, by multiply-adds and measured rates.

    Per nanosecond and core 45 for the tiles (with outputs in whole vectors of 16), 30 for one triangle of the products.
    On a GPU by multiply-adds alone, in whole tiles of at least 16 each way; rates there are not yet measured.
    """
    if device.type == "cuda":
        tiles = [-(-n // 16) * 16 for n in (positions, inputs, outputs)]
        return tiles[0] ** 2 * (inputs + outputs) < positions * tiles[1] * tiles[2]
    direct = positions * inputs * (-(-outputs // 16) * 16) / 45
    return positions**2 * (inputs + outputs) / 2 / 30 < direct


class Linear(Layer):
    """F.linear. With inputs a_t and output gradients d_t, t = 1 … T, an example's gradient is Σ_t d_t a_tᵀ."""

    by_rows = True

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, tensors: dict[str, Tensor], transposed: bool = False
    ) -> None:
        super().__init__(input, input.dim() - 1, tensors)
        self.transposed = transposed  # the parameter is Wᵀ, as in x @ p
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def output(self) -> Tensor:
        # A product of two matrices is no view, so that a tap may return it in place.
        rows = self.operand.reshape(-1, self.operand.shape[-1])
        return F.linear(rows, self.weight, self.bias)

    def finish(self, out: Tensor) -> Tensor:
        return out.view(*self.operand.shape[:-1], out.shape[-1])

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        a = self.layout.split(self.operand.detach())
        d = self.layout.split(grad.view(*self.operand.shape[:-1], grad.shape[-1]))
        n = self.layout.examples
        a, d = computing(a.reshape(n, -1, a.shape[-1])), computing(d.reshape(n, -1, d.shape[-1]))
        common = torch.promote_types(a.dtype, d.dtype)
        return a.to(common), d.to(common)

    def joins(self, other: Layer) -> bool:
        """Whether the positions of another use of the same parameter may be put beside this one's."""
        return isinstance(other, Linear) and other.transposed == self.transposed

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if slot == "bias":
            return d.sum(1)
        return torch.bmm(a.mT, d) if self.transposed else torch.bmm(d.mT, a)

    def squared_norms(self, slots: list[str], a: Tensor, d: Tensor) -> dict[str, Tensor]:
        found = {}
        if "weight" in slots:
            positions, inputs, outputs = a.shape[1], a.shape[2], d.shape[2]
            if positions == 1:
                found["weight"] = squares(a) * squares(d)
            else:
                found["weight"] = ops.grad_sqnorm_linear(a, d, gram_is_cheaper(positions, inputs, outputs, a.device))
        if "bias" in slots:
            found["bias"] = squares(d.sum(1))
        return found

    def inner_products(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        if slot == "weight" and a.shape[1] * other_a.shape[1] < a.shape[2] * d.shape[2]:
            parts = []
            for rows in chunks(len(d), 2 * a.shape[1] * other_a.shape[1]):
                gram = torch.bmm(a[rows], other_a[rows].mT) * torch.bmm(d[rows], other_d[rows].mT)
                parts.append(gram.sum((1, 2), dtype=torch.float64))
            return torch.cat(parts)
        return super().inner_products(slot, a, d, other_a, other_d)

    def gram(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        inputs, outputs = a.shape[2], d.shape[2]
        if slot == "weight" and a.shape[1] * other_a.shape[1] * (inputs + outputs) < inputs * outputs:
            return gram_of_positions(lambda x, y: x.double() @ y.double().mT, a, d, other_a, other_d)
        return super().gram(slot, a, d, other_a, other_d)

    def total(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if slot == "bias":
            return d.sum((0, 1))
        a, d = a.flatten(0, 1), d.flatten(0, 1)
        return a.mT @ d if self.transposed else d.mT @ a


@formula_for(torch._C._nn.linear)
def _linear(tracked: Tracked, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Layer | None:
    if tracked(input) or weight.dim() != 2 or input.dim() < 2:
        return None
    return Linear(input, weight, bias, used(tracked, weight=weight, bias=bias))


@formula_for(*functions("matmul mm __matmul__"))
def _matmul(tracked: Tracked, input: Tensor, other: Tensor) -> Layer | None:
    if tracked(input) or other.dim() != 2 or input.dim() < 2:
        return None
    return Linear(input, other.mT, None, {"weight": other}, transposed=True)


@formula_for(torch.addmm)
def _addmm(tracked: Tracked, bias: Tensor, input: Tensor, other: Tensor, **scales: Any) -> Layer | None:
    if scales or tracked(input) or bias.dim() != 1 or not tracked(other):
        return None
    return Linear(input, other.mT, bias, used(tracked, weight=other, bias=bias), transposed=True)
