"""Forwards whose ReLUs, max-pools, large convolutions and batch normalisations run through our own Functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfisher import ops
from fastfisher.engine.calls import Function, positional
from fastfisher.engine.checkpointing import in_checkpoint
from fastfisher.engine.fused.batch_norm import by_batch
from fastfisher.engine.fused.convolution import in_pieces
from fastfisher.engine.piecewise.rules import LeakyRelu, Relu, Run
from fastfisher.engine.piecewise.selection import MaxPool
from fastfisher.engine.piecewise.table import KNOWN
from fastfisher.model import is_compiled

FUSED_ELEMENTS = 1 << 18
"""For smaller inputs, what Python adds to a call is more than the kernels save."""

_OURS: tuple[Callable[[Function, Any, Any], Tensor | None], ...] = (in_pieces, by_batch)


@contextmanager
def fused_forward(model: torch.nn.Module) -> Iterator[Fused | None]:
    """Within, ReLU, max-pool, large convolutions and batch normalisation run through :mod:`fastfisher.engine.fused`:
    less time and memory, and the same values and gradients up to rounding.

    Where a module is compiled or scripted, no compiled kernel serves a tensor, or a checkpoint will run a call again,
    PyTorch's own run as ever, and so they do on other devices than the CPU.
    """
    hidden = any(is_compiled(module) or isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if ops.UNAVAILABLE is not None or hidden or device_of(model) != "cpu":
        yield None
    else:
        with Fused() as fused:
            yield fused


class Fused(Run, TorchFunctionMode):
    """See :func:`fused_forward`; ``met_large`` is whether any tensor was large enough for the kernels."""

    met_large = False

    def within(self) -> AbstractContextManager[Any]:
        """This forward."""
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            if x.numel() < FUSED_ELEMENTS:
                return func(*args, **kwargs)
            self.met_large = True
        if in_checkpoint():  # it will recompute without this mode, and must save the same tensors then as now
            return func(*args, **kwargs)
        known = KNOWN.get(func)
        if known is None or not isinstance(known.rule, Relu | LeakyRelu | MaxPool) or not has_gates(x):
            return ungated(func, args, kwargs)
        assert isinstance(x, Tensor)
        if x.device.type != "cpu":
            return func(*args, **kwargs)
        return known.rule.record(self, func, *positional(func, args, kwargs))[0]


def ungated(function: Function, args: Any, kwargs: Any) -> Any:
    """The call as it is, but a large convolution in pieces and a large batch normalisation by our own kernel."""
    x = args[0] if args else kwargs.get("input")
    if ops.UNAVAILABLE is None and not (isinstance(x, Tensor) and x.numel() < FUSED_ELEMENTS):
        for ours in _OURS:
            out = ours(function, args, kwargs)
            if out is not None:
                return out
    return function(*args, **kwargs)


def has_gates(x: Any) -> bool:
    """Whether an argument is one that kinks could be found in."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


def device_of(model: torch.nn.Module | None) -> str:
    """The type of device on which a model computes."""
    parameter = None if model is None else next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type
