"""What each layer saw in one forward and backward: its inputs and the gradients of its outputs.

No gradient of a parameter is computed, and no gradient of data below the first layer that has parameters. A
``TorchFunctionMode`` sees every call that a parameter takes part in, whoever makes it (a module, a functional, a bare
``gain * x``), and hands it to the formula in ``fastfisher/layers`` that knows it. The call is then made with the
detached parameter, and a node after it hands over the gradient of its output in the backward, when it exists and before
it is freed.

Functions of parameters alone (views, masks, weight normalisation, positions looked up in an embedding) are followed:
the tensor they give is treated like a parameter, and per-example gradients are pulled back through them. What nothing
here knows is named in ``Capture.fallbacks``.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfisher.layers import Layer, Layout, bind, depends, tensors_in
from fastfisher.model import (
    Inputs,
    call_model,
    count_examples,
    input_tensors,
    map_inputs,
    stateless,
    take_rows,
    uncompiled,
)

Receive = Callable[[Layer, Tensor], None]


@dataclass
class Part:
    """Where a parameter is used: the layer, the role it plays there, and the tensor that stands for it.

    ``tensor`` is the parameter itself, a view of it, or something computed from it and other parameters.
    """

    layer: Layer
    slot: str
    tensor: Tensor


class Capture:
    """One forward of a model whose layers are watched; :meth:`backward` may follow any number of times.

    Attributes:
        logits: the output of the forward, with its graph.
        parameters: stand-ins for the chosen parameters by name, leaves that share their memory.
        direct: by name, the parts that make up a parameter without overlap: squared norms add up over them.
        joint: by name, the parts of a parameter that is used more than once, or through functions of parameters: their
            per-example gradients must be added before they are squared.
        fallbacks: by name, why nothing here can follow a parameter.

    Raises:
        ValueError: there is no example, or the model couples examples (a batch norm on the statistics of the batch); it
            is named.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, names: Iterable[str]) -> None:
        found = dict(model.named_parameters())
        self.parameters = {name: found[name].data.requires_grad_() for name in names}
        others = {name: p.data for name, p in found.items() if name not in self.parameters}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.examples = count_examples(inputs)
        if self.examples == 0:
            raise ValueError("inputs: expected at least one example, got none")
        self.anchor = torch.zeros((), device=input_tensors(inputs)[0].device, requires_grad=True)
        self.layers: list[Layer] = []
        self.fallbacks: dict[str, str] = {}
        self._receive: Receive | None = None
        self._retain = True
        mode = _Watch(self, model, inputs)
        with torch.enable_grad(), uncompiled(model, "the measurement"):
            state = {f"model.{k}": v for k, v in (buffers | others | self.parameters).items()}
            self.logits = stateless(_Caller(model), state, (mode,), {})
        self.direct, self.joint = self._plan(mode)

    def backward(self, cotangent: Tensor, receive: Receive, *, retain_graph: bool = False) -> None:
        """Pulls ``cotangent`` (shaped as the logits) back; ``receive(layer, gradient of its output)`` as it comes."""
        if not self.logits.requires_grad:
            return  # no parameter that could be followed takes part
        self._receive, self._retain = receive, retain_graph
        try:
            with torch.enable_grad():  # a scalar: with grad_outputs= the first call imports sympy, 30 MB and a second
                total = (self.logits * cotangent).sum()
            torch.autograd.grad(total, self.anchor, retain_graph=retain_graph, allow_unused=True)
        finally:
            self._receive = None

    def receive(self, layer: Layer, grad: Tensor) -> None:
        """Called by the node after a layer."""
        layer.check_unchanged()
        if self._receive is not None:
            self._receive(layer, grad)
        if not self._retain:
            layer.release()

    def _plan(self, mode: _Watch) -> tuple[dict[str, list[Part]], dict[str, list[Part]]]:
        parts: dict[str, list[Part]] = {name: [] for name in self.parameters}
        for layer in self.layers:
            for slot, tensor in layer.tensors.items():
                for name in mode.sources[id(tensor)]:
                    parts[name].append(Part(layer, slot, tensor))
        for name in _leaves_reached(self.logits, self.parameters):
            self.fallbacks.setdefault(name, "it is used where no call can be seen, as in a custom autograd.Function")
        direct: dict[str, list[Part]] = {}
        joint: dict[str, list[Part]] = {}
        for name, leaf in self.parameters.items():
            if name not in self.fallbacks:
                (direct if _disjoint(leaf, [p.tensor for p in parts[name]]) else joint)[name] = parts[name]
        return direct, joint


class _Caller(nn.Module):
    """Calls the model within the mode, so that ``functional_call`` itself is not watched."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, mode: _Watch) -> Any:
        return mode.run()


class _Tap(torch.autograd.Function):
    """The identity, in place; its backward hands the gradient of the layer's output over."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, capture: Capture, layer: Layer) -> Tensor:
        ctx.capture, ctx.layer = capture, layer
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.capture.receive(ctx.layer, grad)
        return grad if ctx.needs_input_grad[0] else None, None, None, None


class _Own(torch.autograd.Function):
    """A layer's own forward and backward, which also hands the gradient of the output over.

    Without an operand the output is a copy of a parameter for each example.
    """

    @staticmethod
    def forward(ctx: Any, operand: Tensor | None, anchor: Tensor, capture: Capture, layer: Layer) -> Tensor:
        ctx.capture, ctx.layer = capture, layer
        ctx.set_materialize_grads(False)
        return layer.output()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.capture.receive(ctx.layer, grad)
            grad = ctx.layer.pull_back(grad) if ctx.needs_input_grad[0] else None
        return grad, None, None, None


class _Watch(TorchFunctionMode):
    """Sees every call of a forward.

    ``sources`` names, for each parameter and each tensor computed from parameters alone (by id; ``alive`` keeps the ids
    from being used again), the parameters it stems from. Everything else that depends on an example requires a gradient
    or carries the mark of :func:`_mark`.
    """

    def __init__(self, capture: Capture, model: nn.Module, inputs: Inputs, probe: list[Tensor] | None = None) -> None:
        super().__init__()
        self.capture, self.model = capture, model
        self.inputs = map_inputs(inputs, lambda x: _mark(x.detach()))
        self.sources: dict[int, frozenset[str]] = {id(p): frozenset([n]) for n, p in capture.parameters.items()}
        self.alive: list[Tensor] = []
        self.calls = 0
        self.probing = probe
        self.probed: list[Tensor] | None = None

    def run(self) -> Any:
        """The model's output."""
        with self:
            return call_model(self.model, self.inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in(args)) + list(tensors_in(kwargs.values()))
        tracked = [t for t in tensors if id(t) in self.sources]
        mixed = any(depends(t) for t in tensors if id(t) not in self.sources)
        if not tracked or not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            if mixed:
                _mark_all(out)
                if func is Tensor.__setitem__:
                    _mark(args[0])
            return out
        if not mixed:
            return self._follow(func(*args, **kwargs), tracked)
        opened = _open(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        out = self._mixed(func, args, kwargs, tracked)
        _mark_all(out)
        return out

    def _follow(self, out: Any, tracked: list[Tensor]) -> Any:
        """Notes what a function of parameters alone gave."""
        names = frozenset().union(*(self.sources[id(t)] for t in tracked))
        for tensor in tensors_in([out]):
            if tensor.requires_grad:  # one changed in place has further sources
                self.sources[id(tensor)] = self.sources.get(id(tensor), frozenset()) | names
                self.alive.append(tensor)
        return out

    def _mixed(self, func: Any, args: Any, kwargs: Any, tracked: list[Tensor]) -> Any:
        """A call that joins parameters and examples."""
        layer = bind(func, args, kwargs, lambda t: id(t) in self.sources)
        others = [t for t in tensors_in([*args, *kwargs.values()]) if id(t) not in self.sources and depends(t)]
        if layer is not None and not layer.replaces and len(others) != 1:
            layer = None  # the formulas know of one argument that depends on the examples
        operand = layer.operand if layer is not None else None
        index = self.calls
        self.calls += 1
        if self.probing is not None:
            self.probing.append(operand if operand is not None else torch.empty(0))
        elif layer is not None and operand is not None:
            layout = self._layout(index, operand, layer.leading)
            if layout is not None and layer.accepts(layout):
                return self._tap(layer, layout, func, args, kwargs)
            reason = f"{_name(func)} has its examples where they cannot be told apart"
            self._give_up(tracked, reason)
        else:
            self._give_up(tracked, f"there is no formula for its use in {_name(func)}")
        return func(*_replace(args, self._detached), **_replace(kwargs, self._detached))

    def _tap(self, layer: Layer, layout: Layout, func: Any, args: Any, kwargs: Any) -> Any:
        self.capture.layers.append(layer)
        layer.layout = layout
        if layer.pulls_back:
            return _Own.apply(layer.operand, self.capture.anchor, self.capture, layer)  # type: ignore[no-untyped-call]
        if not layer.replaces:
            tapped = _Tap.apply(layer.output(), self.capture.anchor, self.capture, layer)  # type: ignore[no-untyped-call]
            return layer.finish(tapped)
        (original,) = layer.tensors.values()
        narrowed = self._follow(layer.narrow(), [original])
        copies = _Own.apply(None, self.capture.anchor, self.capture, layer)  # type: ignore[no-untyped-call]

        def swap(tensor: Tensor) -> Tensor:
            return copies if tensor is original else self._detached(tensor)

        layer.tensors = {"value": narrowed}
        return func(*_replace(args, swap), **_replace(kwargs, swap))

    def _detached(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in self.sources else tensor

    def _give_up(self, tracked: list[Tensor], reason: str) -> None:
        for tensor in tracked:
            for name in self.sources[id(tensor)]:
                self.capture.fallbacks.setdefault(name, reason)

    def _layout(self, index: int, operand: Tensor, leading: int) -> Layout | None:
        """Where the examples are in ``operand``, or None where that cannot be told.

        Certain where dimension 0 has their number and no other dimension a multiple of it. Otherwise the forward is run
        once more with a few examples, and the dimension that shrinks is theirs.
        """
        examples, shape = self.capture.examples, operand.shape[:leading]
        if examples == 1:
            return Layout(1, 0, shape[0] if shape else 1)
        if shape and shape[0] == examples and all(size % examples for size in shape[1:]):
            return Layout(examples, 0)
        few = 2 if examples > 2 else 3
        if self.probed is None:
            inputs = take_rows(self.inputs, torch.arange(few) % examples)
            self.probed = []
            probe = _Watch(self.capture, self.model, inputs, self.probed)
            try:
                probe.run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return None  # a model for this one batch size
        if index >= len(self.probed) or self.probed[index].dim() != operand.dim():
            return None
        return Layout.between(operand, self.probed[index], examples, few, leading)


# ---- small things ----------------------------------------------------------------------------------------------------


def _replace(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_replace(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _replace(item, function) for key, item in value.items()}
    return value


def _mark(tensor: Tensor) -> Tensor:
    """Notes on the tensor that it depends on the examples, also where it requires no gradient."""
    tensor._fastfisher_depends = True  # type: ignore[attr-defined]
    return tensor


def _mark_all(out: Any) -> None:
    for tensor in tensors_in([out]):
        if not tensor.requires_grad:
            _mark(tensor)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return f"torch.{name}" if not isinstance(func, types.FunctionType) else f"{func.__module__}.{name}"


_OPENED: dict[Any, Any] = {}
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _open(func: Any) -> Any:
    """A Python function of torch without its own look for overrides, so that the calls inside it are seen."""
    if not (isinstance(func, types.FunctionType) and func.__module__ in ("torch.nn.functional", "torch.functional")):
        return None
    if func not in _OPENED:
        scope = {**func.__globals__, **{check: lambda *_: False for check in _CHECKS}}
        copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = copy
    return _OPENED[func]


def _leaves_reached(out: Tensor, parameters: dict[str, Tensor]) -> list[str]:
    """The parameters that the graph of ``out`` leads to: none, where every use was seen."""
    names = {id(p): name for name, p in parameters.items()}
    found, seen, stack = [], set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            found.append(names[id(variable)])
        stack.extend(edge for edge, _ in node.next_functions)
    return found


def _disjoint(leaf: Tensor, tensors: list[Tensor]) -> bool:
    """Whether each tensor is the leaf or a view that has its elements once, and no two of them share one."""
    ranges = []
    for tensor in tensors:
        if tensor is not leaf and tensor._base is not leaf:
            return False
        extent = 0
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1:
                if stride <= extent:
                    return False
                extent += stride * (size - 1)
        ranges.append((tensor.storage_offset(), tensor.storage_offset() + extent))
    ranges.sort()
    return all(first[1] < second[0] for first, second in itertools.pairwise(ranges))
