"""Arithmetic on lists of tensors, such as all parameters of a model, in as few calls, and launches, as there can be."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastfisher.host import looking_waits


def plus(x: list[Tensor], factor: float | Tensor, y: list[Tensor]) -> list[Tensor]:
    """x + factor·y. The factor is read where that takes no waiting; on a GPU the products are made first."""
    if not x:
        return []
    if not isinstance(factor, Tensor) or not looking_waits(factor):
        return list(torch._foreach_add(x, y, alpha=float(factor)))
    return list(torch._foreach_add(_times(factor, y), x))


def add_(x: list[Tensor], factor: float | Tensor, y: list[Tensor]) -> None:
    """x += factor·y, in place, as :func:`plus`."""
    if not x:
        return
    if not isinstance(factor, Tensor) or not looking_waits(factor):
        torch._foreach_add_(x, y, alpha=float(factor))
    else:
        torch._foreach_add_(x, _times(factor, y))


def _times(factor: Tensor, y: list[Tensor]) -> list[Tensor]:
    dtypes = {tensor.dtype for tensor in y}
    if len(dtypes) > 1:
        return [tensor * factor.to(tensor.dtype) for tensor in y]
    return list(torch._foreach_mul(y, factor.to(dtypes.pop())))


def zeros(like: Iterable[Tensor]) -> list[Tensor]:
    """Tensors of 0, in one launch."""
    found = [torch.empty_like(x) for x in like]
    if found:
        torch._foreach_zero_(found)
    return found
