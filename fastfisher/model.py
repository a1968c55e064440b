"""How a model is called and what it is made of: its logits, parameters by name, copies, modes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.stateless import _reparametrize_module

from fastfisher.checks import check_model
from fastfisher.inputs import Call, as_call, known_of
from fastfisher.outputs import tensors_within
from fastfisher.placement import check_held
from fastfisher.slow_path import warn_slow_path

Result = TypeVar("Result")


# ---- calls -----------------------------------------------------------------------------------------------------------


def call_model(model: nn.Module, inputs: Any) -> Tensor:
    """The logits, the classes last, of the model called as :func:`as_call` says."""
    call = as_call(model, inputs)
    return _seen(call, call.run(model))


def copy_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers, by name."""
    buffers = dict(model.named_buffers())
    copies = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(list(copies.values()), list(buffers.values()))  # on a GPU two launches, not many
    return copies


def call_copy(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Any, buffers: dict[str, Tensor] | None = None
) -> Tensor:
    """The logits with other parameters and with copies of the buffers: the model itself stays as it is.

    The copies are of ``buffers``, where given, or else of the model's own.
    """
    copies = copy_buffers(model) if buffers is None else {name: buffer.clone() for name, buffer in buffers.items()}
    return call_with(model, copies | parameters, inputs)


def call_with(model: nn.Module, state: dict[str, Tensor], inputs: Any) -> Tensor:
    """The logits of the model with other parameters and buffers, of which it moves those in ``state``."""
    call = as_call(model, inputs)
    return call_within(model, state, lambda: _seen(call, call.run(model)))


def call_within(model: nn.Module, state: dict[str, Tensor], function: Callable[[], Result]) -> Result:
    """``function()``, while the model has the tensors of ``state`` in the places of its own.

    Put back the right way: a module that is registered under two names (the embedding of a prompt-tuned model) has its
    tensors taken out twice, the second time those that were put in. ``torch.func.functional_call`` puts them back in
    the order in which they were taken, so that the model keeps the other tensors; here the first one taken out is the
    last one put back.
    """
    with _reparametrize_module(model, state, tie_weights=True, stack_weights=True):
        return function()


def _seen(call: Call, output: Any) -> Tensor:
    logits = call.read(output)
    if call.see is not None:
        with torch._C.DisableTorchFunction():  # what it does is no part of a forward that is recorded
            call.see(output, logits)
    return logits


def heads_beside(model: nn.Module, output: Any, logits: Tensor) -> list[str]:
    """The trainable parameters that other tensors in ``output`` depend on, and the logits do not, by name.

    Auxiliary heads have some; hidden states, caches and losses that come beside the logits have none.
    """
    if isinstance(output, Tensor):
        return []
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    seen: set[Any] = set()
    reached_leaves([logits], seen)
    held = output if isinstance(output, Mapping | tuple | list) else getattr(output, "__dict__", {})
    others = [x for x in tensors_within(held) if x.requires_grad]
    return list(dict.fromkeys(names[id(x)] for x in reached_leaves(others, seen) if id(x) in names))


def check_heads(model: nn.Module, call: Call, trainable: int) -> Call:
    """The call, whose forward raises where the model returns a trainable head beside the logits: a loss of the logits
    alone would leave it untrained without a word.

    Looked for once for each model, kind of call and number of ``trainable`` parameters, in that forward itself: what a
    head depends on is read off its graph.
    """
    kind = "heads", len(call.args), tuple(sorted(call.kwargs)), model.training, trainable
    known = known_of(model)
    if kind in known:
        return call

    def see(output: Any, logits: Tensor) -> None:
        if not logits.requires_grad or kind in known:
            return
        heads = heads_beside(model, output, logits)
        if heads:
            raise ValueError(
                f"model: expected it to return logits alone where loss= is not given, got further outputs with "
                f"parameters of their own ({', '.join(heads[:3])}{', ...' if len(heads) > 3 else ''}), which would not "
                "be trained; make the loss of all outputs yourself, with FisherPenalty.watching() and term(), or give "
                "loss=, which gets all that the model returns"
            )
        known[kind] = True

    return dataclasses.replace(call, see=see)


def parameters_beside(model: nn.Module, loss: Tensor, inputs: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that a loss depends on beside the model's and the inputs themselves: of a head in the loss, or of
    a network that has made the inputs."""
    known = {id(x) for x in (*model.parameters(), *inputs)}
    return [x for x in reached_leaves([loss], set()) if isinstance(x, nn.Parameter) and id(x) not in known]


def reached_leaves(tensors: Iterable[Tensor], seen: set[Any]) -> list[Tensor]:
    """The leaves that the graph of the tensors leads to by nodes not ``seen``, which are added there."""
    found, stack = [], [x.grad_fn if x.grad_fn is not None else x for x in tensors]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        if not isinstance(node, Tensor):
            stack.extend(edge for edge, _ in node.next_functions)
    return found


# ---- parameters and modes --------------------------------------------------------------------------------------------


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


def chosen_names(
    trainable: dict[str, Tensor], params: Iterable[Tensor] | None, *, sharded: bool = False
) -> frozenset[str]:
    """The names of the parameters that a penalty or a measurement is about: all, or those in ``params``.

    Args:
        trainable: as :func:`trainable_parameters` has them.
        params: the parameters that are meant; None for all.
        sharded: whether the caller knows what to do with parameters that are spread over processes.

    Raises:
        ValueError: ``params`` is empty or holds a tensor that is no trainable parameter of the model, or a parameter is
            spread over processes and the caller has not said that it can handle it.
    """
    check_held(trainable, sharded)
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
    """Raises ValueError where a parameter was made in inference mode, and can never have a gradient, or is of a lazy
    module and not there yet; it is named."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"model: expected parameters that are there, got {name} of a lazy module, which its first forward "
                "makes; call the model once before"
            )
        if parameter.is_inference():
            raise ValueError(
                f"model: expected parameters that can have a gradient, got {name}, which was made within "
                "torch.inference_mode(); make or load the model outside of it"
            )


@contextmanager
def taking_gradients(model: nn.Module) -> Iterator[None]:
    """Within, gradients can be taken whatever the caller's mode: ``inference_mode`` and ``no_grad`` are left.

    Raises:
        ValueError: a parameter was made in inference mode (it is named), or another thread uses the model: shifted
            parameters stand in the modules while they are called, and two threads would take each other's.
    """
    check_differentiable(model)
    lock = known_of(model).setdefault("in use", threading.RLock())
    if not lock.acquire(blocking=False):
        raise ValueError(
            "model: expected one that no other thread is using in fastfisher at the same time; give each thread a copy "
            "(copy.deepcopy)"
        )
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        lock.release()


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
