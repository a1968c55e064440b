"""How a model is called and what it is made of: inputs of any structure, parameters by name, copies, modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfisher.arguments import check_model
from fastfisher.slow_path import warn_slow_path

Result = TypeVar("Result")

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
"""What a model is called with: a tensor, positional arguments or keyword arguments, batch first."""


def map_inputs(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Applies a function to every tensor of ``inputs``, which keep their structure."""

    def visit(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(visit(value) for value in inputs)
    if isinstance(inputs, dict):
        return {name: visit(value) for name, value in inputs.items()}
    raise TypeError(f"inputs: expected a tensor, a tuple or a dict of tensors, got {type(inputs).__name__}")


def input_tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors of ``inputs`` in order."""
    found: list[Tensor] = []
    map_inputs(inputs, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def count_examples(inputs: Inputs, name: str = "inputs") -> int:
    """How many examples there are: the size of the first tensor's dimension 0.

    Raises:
        ValueError: there is no tensor, or it is a scalar; ``name`` is the argument that is named.
    """
    tensors = input_tensors(inputs)
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, found none")
    if tensors[0].dim() == 0:
        raise ValueError(f"{name}: expected examples along dimension 0, got a scalar tensor")
    return len(tensors[0])


def requiring_grad(inputs: Inputs) -> Inputs:
    """The inputs with every floating-point tensor detached and requiring a gradient."""
    return map_inputs(inputs, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returned: the tensor itself, or its ``logits``, as models of Transformers have it.

    Raises:
        TypeError: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected it to return logits or an object with .logits, got {type(output).__name__}")
    return logits


def call_model(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits: the model called with a tensor, with a tuple's items, or with a dict's items by name."""
    inputs = map_inputs(inputs, differentiable)
    if isinstance(inputs, tuple):
        return logits_of(model(*inputs))
    if isinstance(inputs, dict):
        return logits_of(model(**inputs))
    return logits_of(model(inputs))


def call_copy(model: nn.Module, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """The logits with other parameters and with copies of the buffers: the model itself stays as it is."""
    inputs = map_inputs(inputs, differentiable)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()} | parameters
    args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else None
    return logits_of(torch.func.functional_call(model, state, args, kwargs))


class _Within(nn.Module):
    """Calls a function as a part of a model, so that ``functional_call`` puts other tensors in the model's places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def call_within(model: nn.Module, state: dict[str, Tensor], function: Callable[[], Result]) -> Result:
    """``function()``, while the model has the tensors of ``state`` in the places of its own parameters and buffers."""
    named = {f"model.{name}": value for name, value in state.items()}
    result: Result = torch.func.functional_call(_Within(model), named, (function,))
    return result


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name; a shared one once.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is none.
    """
    check_model(model)
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model: expected at least one parameter with requires_grad, found none")
    return found


def chosen_names(trainable: dict[str, Tensor], params: Iterable[Tensor] | None) -> frozenset[str]:
    """The names of the parameters that a penalty or a measurement is about: all, or those in ``params``.

    Raises:
        ValueError: ``params`` is empty or holds a tensor that is no trainable parameter of the model.
    """
    if params is None:
        return frozenset(trainable)
    if not isinstance(params, Iterable) or (isinstance(params, Tensor) and params.dim() == 0):
        raise ValueError(f"params: expected parameters of the model or None, got {type(params).__name__}")
    names = {id(p): name for name, p in trainable.items()}
    chosen = []
    for position, p in enumerate(params):
        if id(p) not in names:
            what = f"shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"params: item {position} ({what}) is no trainable parameter of the model")
        chosen.append(names[id(p)])
    if not chosen:
        raise ValueError("params: expected at least one parameter, got none")
    return frozenset(chosen)


def couples_examples(model: nn.Module) -> bool:
    """Whether one example's output depends on the others: a BatchNorm in train mode."""
    return any(m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def check_differentiable(model: nn.Module) -> None:
    """Raises ValueError where a parameter was made in inference mode, and can never have a gradient; it is named."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model: expected parameters that can have a gradient, got {name}, which was made within "
                "torch.inference_mode(); make or load the model outside of it"
            )


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd may save, where it was made in inference mode and that has been left."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode and, on leaving, every module back in the mode it was in.

    The flags are set one by one: ``model.eval()`` would call the modules' own ``train``, and some of those change the
    model, such as adapters that are merged into their weights. Within, gradients can be taken whatever the caller's
    mode: ``torch.inference_mode`` is left.

    Raises:
        ValueError: a parameter was made in inference mode; it is named.
    """
    check_differentiable(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode(False):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unhooked(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, the hooks of ``Tensor.register_hook`` on parameters do not run; on leaving they are back.

    ``torch.autograd.grad`` runs them too. A hook that masks, scales or counts gradients is meant for the gradient that
    the optimiser gets: it would distort a derivative that is only measured, or act on part of a gradient.
    """
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            if parameter._backward_hooks is not None:  # registered meanwhile
                hooks.update(parameter._backward_hooks)
                parameter._backward_hooks = None
            parameter._backward_hooks = hooks


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` compiled it."""
    return type(module).__name__ == "OptimizedModule" or bool(getattr(module, "_compiled_call_impl", None))


@contextmanager
def uncompiled(model: nn.Module | None, purpose: str) -> Iterator[None]:
    """Within, compiled modules of the model run as the Python they were made from.

    Compiled code hides its calls from ``TorchFunctionMode`` and cannot be differentiated twice. A
    :class:`SlowPathWarning` says once, with the ``purpose``, that this forward is not compiled.
    """
    modules = [] if model is None else model.named_modules()
    name = next((name or "(the model itself)" for name, module in modules if is_compiled(module)), None)
    if name is None:
        yield
        return
    warn_slow_path(f"{purpose} runs module {name!r} without torch.compile, whose code hides the calls of the layers")
    with torch.compiler.set_stance("force_eager"):
        yield
