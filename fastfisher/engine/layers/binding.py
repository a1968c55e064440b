"""The formula for a call."""

from __future__ import annotations

from typing import Any

from fastfisher.engine.calls import positional, tensors_in
from fastfisher.engine.layers.base import FORMULAS, Layer, Tracked
from fastfisher.engine.layers.expand import BROADCASTING, EINSUM, MATRICES, bind_einsum, bind_expand


def bind(func: Any, args: Any, kwargs: Any, tracked: Tracked) -> Layer | None:
    """The formula for a call of ``func``, or None. ``tracked`` tells the parameters from what depends on examples."""
    if func in BROADCASTING:
        return bind_expand(tracked, args, kwargs)
    if func == EINSUM:
        return bind_einsum(tracked, *args, **kwargs)
    layer = None
    if func in FORMULAS and not any(t.is_complex() for t in tensors_in((args, kwargs))):
        placed, named = positional(func, args, kwargs)
        try:
            layer = FORMULAS[func](tracked, *placed, **named)
        except TypeError:  # the binder does not know one of the arguments
            return None
    return bind_expand(tracked, args, kwargs, 2) if layer is None and func in MATRICES else layer
