"""Per-layer formulas: squared norms and inner products of per-example gradients, from what a layer saw.

One file per family of layers. A formula is a subclass of :class:`Layer` and, below it, a function registered by
:func:`~fastfisher.engine.layers.base.formula_for` that makes one of a call. :func:`bind` finds it.
"""

from fastfisher.engine.layers import conv, embedding, linear, norm  # noqa: F401 (they register their formulas)
from fastfisher.engine.layers.base import (
    GRAM_ELEMENTS,
    Layer,
    Layout,
    Rows,
    chunks,
    computing,
    depends,
    dots,
    flat_rows,
    squares,
)
from fastfisher.engine.layers.binding import bind
from fastfisher.engine.layers.decomposed import DECOMPOSED
from fastfisher.engine.layers.recurrent import Recurrence, Unrolled, unrolled

__all__ = [
    "DECOMPOSED",
    "GRAM_ELEMENTS",
    "Layer",
    "Layout",
    "Recurrence",
    "Rows",
    "Unrolled",
    "bind",
    "chunks",
    "computing",
    "depends",
    "dots",
    "flat_rows",
    "squares",
    "unrolled",
]
