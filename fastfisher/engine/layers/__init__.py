"""Per-layer formulas: squared norms and inner products of per-example gradients, from what a layer saw.

One file per family of layers. :func:`bind` finds the formula for a call; ``base.py`` says what a formula is.
"""

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
from fastfisher.engine.layers.decomposed import DECOMPOSED
from fastfisher.engine.layers.recurrent import Recurrence, Unrolled, unrolled
from fastfisher.engine.layers.table import bind

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
