"""Embeddings: an example's gradient has, in the row of each token, the sum of the gradients where it occurs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfisher.engine.layers.base import Layer, Rows, Tracked, computing, formula_for, gram_of_positions, squares


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
    """torch.embedding_bag: the rows of the tokens of a bag added up, averaged, or the largest of each element.

    All tokens of a bag get the same gradient, times their weights. So of an example with a single bag the squared norm
    is that of the bag's gradient times Σ_v w_v², w_v the weight of all occurrences of token v; and just that of the
    bag's gradient where each element has come from one row, the largest.
    """

    several = True

    def __init__(
        self, weight: Tensor, indices: Tensor, offsets: Tensor, mode: int, scales: Tensor | None, include_last: bool,
        padding_idx: int | None,
    ) -> None:  # fmt: skip
        padding = -1 if padding_idx is None else padding_idx % len(weight)
        super().__init__(weight, offsets[:-1] if include_last else offsets, {"weight": weight}, padding)
        self.call = (indices, offsets, False, mode, False, scales, include_last, padding_idx)
        self.indices, self.largest = indices, mode == 2
        starts = self.operand.contiguous()
        places = torch.arange(len(indices), device=indices.device, dtype=offsets.dtype)
        self.bag = torch.searchsorted(starts, places, right=True) - 1
        weights = (indices != padding).to(computing(weight.detach()).dtype)
        self.counts = weights.new_zeros(len(starts)).index_add(0, self.bag, weights)
        if mode == 1:
            weights = weights / self.counts.clamp(min=1)[self.bag]
        self.weights = weights if scales is None else weights * scales.detach()
        bags = len(starts)
        self.even = len(indices) % bags == 0 and bool((starts == places[:: max(1, len(indices) // bags)]).all())

    def output(self) -> Tensor:
        out, *self.rest = torch.embedding_bag(self.weight, *self.call)
        return out

    def finish(self, out: Tensor) -> Any:
        return out, *self.rest

    def joins(self, other: Layer) -> bool:
        return False

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of each example the bags' gradients, [bags, features], and its tokens.

        Those are, in float64, [tokens, 3] with weights and the number of the bag; or [bags, features], the rows that
        the largest elements are of.
        """
        n = self.layout.examples
        d = self.layout.split(computing(grad)).reshape(n, -1, grad.shape[-1])
        if self.largest:
            d = d * self.layout.split(self.counts > 0).reshape(n, -1, 1)
            return self.layout.split(self.rest[2]).reshape(n, -1, grad.shape[-1]), d
        bags = len(grad)
        numbers = torch.arange(bags, device=grad.device)
        owner = torch.full((bags + 1,), -1, device=grad.device)
        place = torch.zeros_like(owner)
        owned = self.layout.split(numbers + 1).reshape(n, -1)  # numbers from 1; 0 marks a place without a bag
        owner[owned] = torch.arange(n, device=grad.device)[:, None]
        place[owned] = torch.arange(owned.shape[1], device=grad.device)
        tokens = torch.stack([self.indices.double(), self.weights.double(), place[self.bag + 1].double()], -1)
        if self.even and not isinstance(self.layout, Rows):
            return self.layout.split(tokens.view(bags, -1, 3)).reshape(n, -1, 3), d
        return Rows.of(owner[self.bag + 1], n, 1).split(tokens), d

    def _tokens(self, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and the gradients of their rows, as of an embedding."""
        examples = torch.arange(len(d), device=d.device)[:, None]
        return a[..., 0].long(), d[examples, a[..., 2].long()] * a[..., 1:2].to(d.dtype)

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if not self.largest:
            return super().gradients(slot, *self._tokens(a, d))
        return d.new_zeros(len(d), *self.weight.shape).scatter_add_(1, a, d)

    def squared_norms(self, slots: list[str], a: Tensor, d: Tensor) -> dict[str, Tensor]:
        if d.shape[1] > 1:
            if self.largest:
                return {"weight": self.materialised_norms("weight", a, d)}
            return super().squared_norms(slots, *self._tokens(a, d))
        norms = squares(d)
        if self.largest:
            return {"weight": norms}
        tokens, order = a[..., 0].sort(1)
        weights = a[..., 1].gather(1, order)
        starts = torch.ones_like(tokens, dtype=torch.bool)
        starts[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
        number = starts.flatten().cumsum(0) - 1
        of_tokens = weights.new_zeros(len(number)).index_add_(0, number, weights.flatten()).square()
        each = torch.where(starts, of_tokens[number].view_as(tokens), 0).sum(1)
        return {"weight": norms * each}

    def inner_products(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        return Layer.inner_products(self, slot, a, d, other_a, other_d)

    def gram(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        if self.largest:
            return Layer.gram(self, slot, a, d, other_a, other_d)
        return super().gram(slot, *self._tokens(a, d), *self._tokens(other_a, other_d))

    def total(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if not self.largest:
            return super().total(slot, *self._tokens(a, d))
        return d.new_zeros(self.weight.shape).scatter_add_(0, a.flatten(0, 1), d.flatten(0, 1))


@formula_for(torch.embedding)
def _embedding(
    tracked: Tracked, weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Layer | None:  # fmt: skip
    if scale_grad_by_freq:
        return None  # not the true gradient: it is divided by how often the index occurs
    return Embedding(weight, indices, {"weight": weight}, padding_idx)


@formula_for(torch.embedding_bag)
def _embedding_bag(
    tracked: Tracked, weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False,
    mode: int = 0, sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Layer | None:  # fmt: skip
    scales = per_sample_weights
    if scale_grad_by_freq or (scales is not None and (tracked(scales) or scales.requires_grad)):
        return None
    return EmbeddingBag(weight, indices, offsets, mode, scales, include_last_offset, padding_idx)
