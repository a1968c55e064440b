"""A call that does not come to its end leaves nothing moved: random generators, buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fastfisher.arguments import check_generator, check_model
from fastfisher.gates import RandomState

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def undone_on_error(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[None]:
    """Whatever is raised within, Ctrl-C and a lack of memory included, puts the random generators (the default ones of
    the CPU and of the model's devices, and ``generator``) and the model's buffers back to what they were.

    Costs a copy of the buffers and of the generators' states; nothing is put back where nothing is raised.
    """
    modules = list(model.modules())  # once: to go through them takes longer than the copies
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    buffers = list({id(b): b for module in modules for b in module._buffers.values() if b is not None}.values())
    random = RandomState.current(frozenset(p.device.index for p in parameters if p.device.type == "cuda"))
    drawn = None if generator is None else generator.get_state()
    before = [torch.empty_like(buffer) for buffer in buffers]
    with torch.no_grad():
        if buffers:
            torch._foreach_copy_(before, buffers)  # on a GPU two launches, not two for each layer
    try:
        yield
    except BaseException:
        random.restore()
        if generator is not None and drawn is not None:
            generator.set_state(drawn)
        with torch.no_grad():
            if buffers:
                torch._foreach_copy_(buffers, before)
        raise


def undoing(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``function(model, ..., generator=...)`` within :func:`undone_on_error`."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        model: Any = args[0] if args else kwargs["model"]
        generator: Any = kwargs.get("generator")
        check_model(model)
        check_generator(generator)
        with undone_on_error(model, generator):
            return function(*args, **kwargs)

    return call
