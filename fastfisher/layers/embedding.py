"""Embeddings: an example's gradient has, in the row of each token, the sum of the gradients where it occurs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfisher.layers.base import Layer, Rows, computing, gram_of_positions, squares


class Embedding(Layer):
    """torch.embedding, with repeated tokens added up before they are squared."""

    by_rows = True

    def __init__(self, weight: Tensor, indices: Tensor, tensors: dict[str, Tensor], padding_idx: int) -> None:
        super().__init__(indices, indices.dim(), tensors)
        self.weight, self.padding_idx = weight.detach(), padding_idx

    def output(self) -> Tensor:
        return torch.embedding(self.weight, self.operand.reshape(-1))

    def finish(self, out: Tensor) -> Any:
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


class EmbeddingBag(Embedding):
    """torch.embedding_bag: the rows of the tokens of a bag added up, averaged, or the largest of each element."""

    several = True

    def __init__(
        self, weight: Tensor, indices: Tensor, offsets: Tensor, mode: int, scales: Tensor | None, include_last: bool,
        padding_idx: int | None,
    ) -> None:  # fmt: skip
        padding = -1 if padding_idx is None else padding_idx % len(weight)
        super().__init__(weight, offsets[:-1] if include_last else offsets, {"weight": weight}, padding)
        self.call = (indices, offsets, False, mode, False, scales, include_last, padding_idx)
        self.indices, self.mode, self.scales = indices, mode, scales
        places = torch.arange(len(indices), device=indices.device)
        self.bag = torch.searchsorted(self.operand.contiguous(), places.to(offsets.dtype), right=True) - 1

    def output(self) -> Tensor:
        out, *self.rest = torch.embedding_bag(self.weight, *self.call)
        return out

    def finish(self, out: Tensor) -> Any:
        return out, *self.rest

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        d = computing(grad)[self.bag]
        counted = (self.indices != self.padding_idx).to(d.dtype)
        if self.mode == 1:
            counts = torch.zeros(len(grad), dtype=d.dtype, device=d.device).index_add(0, self.bag, counted)
            counted = counted / counts.clamp(min=1)[self.bag]
        if self.scales is not None:
            counted = counted * self.scales
        d = d * counted[:, None]
        if self.mode == 2:  # the row that PyTorch chose; where a bag has it more than once, a part to each
            chosen = (self.indices[:, None] == self.rest[2][self.bag]).to(d.dtype) * (counted != 0)[:, None]
            d = d * chosen / torch.zeros_like(grad, dtype=d.dtype).index_add(0, self.bag, chosen).clamp(min=1)[self.bag]
        bags = torch.arange(1, len(grad) + 1, device=grad.device)
        owner = torch.full((len(grad) + 1,), -1, device=grad.device)
        owned = self.layout.split(bags).reshape(self.layout.examples, -1)  # 0 fills up
        owner[owned] = torch.arange(self.layout.examples, device=grad.device)[:, None]
        rows = Rows.of(owner[self.bag + 1], self.layout.examples, 1)
        return rows.split(self.indices), rows.split(d)
