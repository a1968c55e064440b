"""Functions that are written here in terms of functions with a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_o = x₁ᵀ W_o x₂: a linear layer on the products of the elements of both inputs."""
    products = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return F.linear(products.flatten(-2), weight.flatten(1), bias)


def _embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Rows looked up one by one, and added bag by bag."""
    bags = len(offsets) - 1 if include_last_offset else len(offsets)
    places = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(offsets[:bags].contiguous(), places.to(offsets.dtype), right=True) - 1
    rows = F.embedding(indices, weight, scale_grad_by_freq=scale_grad_by_freq)
    counted = indices.ne(-1 if padding_idx is None else padding_idx).to(rows.dtype)
    out = rows.new_zeros(bags, weight.shape[1])
    if (
        mode == 2
    ):  # by element, the row that PyTorch chose; a row that occurs several times in a bag shares the gradient
        with torch.no_grad():
            chosen = torch.embedding_bag(
                weight.detach(), indices, offsets, False, 2, False, None, include_last_offset, padding_idx
            )[3]
            shares = (indices[:, None] == chosen[bag]).to(rows.dtype) * counted[:, None]
            shares = shares / torch.zeros_like(out).index_add(0, bag, shares)[bag].clamp(min=1)
        return out.index_add(0, bag, rows * shares), None, None, None
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    out = out.index_add(0, bag, rows * counted[:, None])
    if mode == 1:
        out = (
            out / torch.zeros(bags, dtype=out.dtype, device=out.device).index_add(0, bag, counted).clamp(min=1)[:, None]
        )
    return out, None, None, None


DECOMPOSED: dict[Any, Callable[..., Any]] = {torch.bilinear: _bilinear, torch.embedding_bag: _embedding_bag}
"""By function: another that takes the same arguments and gives the same."""
