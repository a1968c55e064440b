"""Which example each row of a layer's output belongs to, told by the backward.

The gradient of a row is linear in that of the logits. With that of example i times i + 1, the gradients of its rows
come i + 1 times as large; for many examples, digit by digit. A few random projections of a row tell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastfisher.engine.layers import Layer, Rows, computing
from fastfisher.engine.taps import Receive

Pull = Callable[[Tensor, Receive], None]
"""Pulls a cotangent of the logits back through a graph that stays."""


class RowOwners:
    """The owners of the rows of some layers, found by :meth:`find` and then given to the layers as their layout.

    Args:
        unplaced: the layers; those in one list have the same rows, which the first of them tells.
        examples: how many there are.
    """

    def __init__(self, unplaced: list[list[Layer]], examples: int) -> None:
        self.unplaced, self.examples = unplaced, examples
        self.first = {id(layers[0]) for layers in unplaced}
        self.plain: dict[int, Tensor] = {}  # by layer, the projections of the rows' gradients
        self.owners: dict[int, Tensor] = {}
        self.certain: dict[int, Tensor] = {}

    def find(self, cotangent: Tensor, pull: Pull, receive: Receive) -> list[list[Layer]]:
        """Gives the layers their layouts, and ``receive`` the gradients that ``cotangent`` leads to.

        Returns:
            Those with rows that belong to several examples.
        """
        waiting = {id(layer) for layers in self.unplaced for layer in layers}
        kept: list[tuple[Layer, Tensor]] = []

        def sort(layer: Layer, grad: Tensor) -> None:
            if id(layer) in self.first:
                self.plain[id(layer)] = _projected(layer, grad)
            if id(layer) in waiting:
                kept.append((layer, grad))
            else:
                receive(layer, grad)

        pull(cotangent, sort)
        self._compare(cotangent, pull)
        mixed = [layers for layers in self.unplaced if not self._place(layers)]
        for layer, grad in kept:
            receive(layer, grad)
        return mixed

    def _compare(self, cotangent: Tensor, pull: Pull) -> None:
        """Finds the owners, digit by digit of their numbers."""
        norms = {key: p.square().sum(1) for key, p in self.plain.items()}
        self.owners = {key: torch.zeros_like(norm, dtype=torch.int64) for key, norm in norms.items()}
        self.certain = {key: torch.ones_like(norm, dtype=torch.bool) for key, norm in norms.items()}
        base = 8 if torch.finfo(cotangent.dtype).eps > 1e-4 else 256
        step = 1

        def compare(layer: Layer, grad: Tensor) -> None:
            key = id(layer)
            if key in self.plain:
                p, scaled = self.plain[key], _projected(layer, grad)
                ratio = ((scaled * p).sum(1) / norms[key]).nan_to_num(1.0).round().clamp(1, base)
                self.certain[key] &= (scaled - ratio[:, None] * p).square().sum(1) <= 0.06 * norms[key]
                self.owners[key] += (ratio.long() - 1) * step

        while step < self.examples:
            digits = torch.arange(self.examples, device=cotangent.device) // step % base
            pull(cotangent * (digits + 1).to(cotangent).view(-1, *[1] * (cotangent.dim() - 1)), compare)
            step *= base
        for key, norm in norms.items():
            self.certain[key] &= self.owners[key] < self.examples
            self.owners[key].masked_fill_(norm == 0, -1)

    def _place(self, layers: list[Layer]) -> bool:
        """Gives layers with the same rows their layout; False where some row belongs to several examples."""
        key = id(layers[0])
        certain = key not in self.plain or bool(self.certain[key].all())
        # A layer without a gradient does not lead to the logits: no example owns its rows.
        found = certain and key in self.plain
        owner = self.owners[key] if found else torch.empty(0, dtype=torch.int64)
        layout = Rows.of(owner, self.examples, layers[0].leading)
        for layer in layers:
            layer.layout = layout
        return certain


def _projected(layer: Layer, grad: Tensor) -> Tensor:
    """A few random projections, always the same, of the rows of an output's gradient: float64[rows, 4]."""
    rows = layer.operand.shape[: layer.leading].numel()
    d = computing(grad).reshape(rows, grad.numel() // max(1, rows))
    directions = torch.randn(d.shape[1], 4, generator=torch.Generator().manual_seed(2))
    return (d @ directions.to(d.device, d.dtype)).double()
