"""Embeddings: an example's gradient has, in the row of each token, the sum of the gradients where it occurs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.layers.base import Layer, computing, gram_of_positions, squares


class Embedding(Layer):
    """torch.embedding, with repeated tokens added up before they are squared."""

    by_rows = True

    def __init__(self, weight: Tensor, indices: Tensor, tensors: dict[str, Tensor], padding_idx: int) -> None:
        super().__init__(indices, indices.dim(), tensors)
        self.weight, self.padding_idx = weight.detach(), padding_idx

    def output(self) -> Tensor:
        return torch.embedding(self.weight, self.operand.reshape(-1))

    def finish(self, out: Tensor) -> Tensor:
        return out.view(*self.operand.shape, out.shape[-1])

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad.view(*self.operand.shape, grad.shape[-1])
        tokens, d = self.layout.split(self.operand), self.layout.split(grad)
        n = self.layout.examples
        tokens, d = tokens.reshape(n, -1), computing(d.reshape(n, -1, d.shape[-1]))
        return tokens, d * (tokens != self.padding_idx)[..., None] if self.padding_idx >= 0 else d

    def joins(self, other: Layer) -> bool:
        return isinstance(other, Embedding)

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        out = d.new_zeros(len(d), *self.weight.shape)
        return out.scatter_add_(1, a[..., None].expand_as(d), d)

    def squared_norms(self, slots: list[str], a: Tensor, d: Tensor) -> dict[str, Tensor]:
        examples = torch.arange(len(a), device=a.device)[:, None]
        pairs, inverse = torch.unique(examples * len(self.weight) + a, return_inverse=True)
        rows = d.new_zeros(len(pairs), d.shape[-1]).index_add_(0, inverse.flatten(), d.flatten(0, 1))
        norms = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        return {"weight": norms.index_add_(0, pairs // len(self.weight), squares(rows))}

    def gram(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        return gram_of_positions(lambda x, y: x[:, None] == y, a, d, other_a, other_d)

    def total(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        return d.new_zeros(self.weight.shape).index_add_(0, a.flatten(), d.flatten(0, 1))
