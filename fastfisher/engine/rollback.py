"""A call that does not come to its end leaves nothing moved: random generators, buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfisher.checks import check_generator, check_model
from fastfisher.engine.calls import opened, written
from fastfisher.engine.random_state import RandomState
from fastfisher.inputs import known_of
from fastfisher.model import taking_gradients

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def undone_on_error(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[None]:
    """Whatever is raised within, Ctrl-C and a lack of memory included, puts the random generators (the default ones of
    the CPU and of the model's devices, and ``generator``) and the model's buffers back to what they were.

    Costs a copy of the buffers and of the generators' states; nothing is put back where nothing is raised.
    """
    modules = list(model.modules())  # gone through once: that takes longer than the copies
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    placed = [(module._buffers, dict(module._buffers)) for module in modules if module._buffers]
    buffers = list({id(b): b for _, own in placed for b in own.values() if b is not None}.values())
    random = RandomState.on_devices_of(parameters)
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
        for places, own in placed:  # a forward may have put other tensors there
            places.clear()
            places.update(own)
        with torch.no_grad():
            if buffers:
                torch._foreach_copy_(buffers, before)
        raise


@contextmanager
def leaving_parameters(model: nn.Module) -> Iterator[None]:
    """Within, a forward that is about to write into a parameter of the model is refused, before it does.

    Looked for until the model has once been called in these modes without it.

    Raises:
        NotImplementedError: it is about to; the parameter and the function are named.
    """
    known = known_of(model)
    kind = "leaves its parameters", tuple(module.training for module in model.modules())
    if kind in known:
        yield
        return
    with _Watching(model):
        yield
    known[kind] = True


class _Watching(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if _has_memory(p)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = written(func, args, kwargs)
        if target is not None and _has_memory(target) and func is not Tensor.requires_grad_:
            name = self.names.get(target.untyped_storage().data_ptr())
            if name is not None:
                raise NotImplementedError(
                    f"model: expected a forward that leaves the parameters as they are, got one that changes {name} by "
                    f"{getattr(func, '__name__', func)} (as embeddings with max_norm do); change it before, outside "
                    "of the forward"
                )
        inner = opened(func)  # F.embedding renormalises its weight by a function that it calls
        if inner is None:
            return func(*args, **kwargs)
        with self:
            return inner(*args, **kwargs)


def _has_memory(x: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # a wrapper of vmap or grad, which has no memory of its own
        return False
    return x.layout == torch.strided and type(x) in (Tensor, nn.Parameter) and x.numel() > 0


def undoing(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``function(model, ..., generator=...)`` within :func:`undone_on_error`, whatever the caller's grad mode."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        model: Any = args[0] if args else kwargs["model"]
        generator: Any = kwargs.get("generator")
        check_model(model)
        check_generator(generator)
        enabled = torch.is_grad_enabled()
        with taking_gradients(model), leaving_parameters(model), undone_on_error(model, generator):
            result: Any = function(*args, **kwargs)
        if isinstance(result, Tensor) and not enabled:
            result = result.detach()
        return result  # type: ignore[no-any-return]

    return call
