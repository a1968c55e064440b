"""Gradients by autograd, by name: dense, complex ones as pairs of real numbers, and their norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.engine.checkpointing import REENTRANT
from fastfisher.model import unhooked

Differentiate = Callable[[Tensor, Sequence[Tensor], bool], Sequence[Tensor | None]]
"""(loss, sources, retain_graph) ↦ ∂loss/∂source, None where a source is not used."""


def autograd_gradients(loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
    """∂loss/∂source for each source, None where it is not used; without what hooks on the sources make of it.

    Raises:
        NotImplementedError: the forward has a checkpoint with ``use_reentrant=True``.
    """
    try:
        with unhooked(sources):
            return torch.autograd.grad(loss, sources, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise NotImplementedError(REENTRANT) from error
        raise


def dense(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, those of sparse embeddings with all their rows."""
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


def real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of its real and imaginary parts, in the same memory; any other as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of :func:`real`."""
    return dtype.to_real() if dtype.is_complex else dtype


def sum_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Σ ‖x‖² over tensors, complex ones too: a float64 scalar on the device."""
    parts = [real(x) for x in tensors]
    return ops.sum_squares(parts) if parts else torch.zeros((), dtype=torch.float64, device=device)


def scaled(loss: Tensor, scale: float | Tensor) -> Tensor:
    """The loss times the scale, which is most often 1: then it costs nothing, here and in the backward."""
    return loss if not isinstance(scale, Tensor) and scale == 1.0 else loss * scale
