"""Per-layer formulas: squared norms and inner products of per-example gradients, from what a layer saw.

One file per family of layers. :func:`bind` finds the formula for a call; ``base.py`` says what a formula is.
"""

from fastfisher.layers.base import (
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
    tensors_in,
)
from fastfisher.layers.decomposed import DECOMPOSED
from fastfisher.layers.recurrent import Recurrence, Unrolled, unrolled
from fastfisher.layers.table import bind

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
    "tensors_in",
    "unrolled",
]
