"""Per-layer formulas: squared norms and inner products of per-example gradients, from what a layer saw.

One file per family of layers. :func:`bind` finds the formula for a call; ``base.py`` says what a formula is.
"""

from fastfisher.layers.base import Layer, Layout, chunks, computing, depends, squares, tensors_in
from fastfisher.layers.table import bind

__all__ = ["Layer", "Layout", "bind", "chunks", "computing", "depends", "squares", "tensors_in"]
