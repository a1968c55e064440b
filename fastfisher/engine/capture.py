"""What each layer saw in one forward and backward: its inputs and the gradients of its outputs.

No gradient of a parameter is computed, and no gradient of data below the first layer that has parameters. A
``TorchFunctionMode`` sees every call that a parameter takes part in, whoever makes it (a module, a functional, a bare
``gain * x``), and hands it to the formula in ``fastfisher/engine/layers`` that knows it. The call is then made with the
detached parameter, and a node after it hands over the gradient of its output in the backward, when it exists and before
it is freed.

Functions of parameters alone (views, masks, weight normalisation, positions looked up in an embedding) are followed:
the tensor they give is treated like a parameter, and per-example gradients are pulled back through them. What nothing
here knows is named in ``Capture.fallbacks``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfisher.engine.calls import map_tensors, name_of, opened, tensors_in, writes_first
from fastfisher.engine.checkpointing import graph_nodes, keep_saved_tensors, refuse_recomputed
from fastfisher.engine.layers import (
    DECOMPOSED,
    Layer,
    Layout,
    Recurrence,
    Rows,
    Unrolled,
    bind,
    computing,
    depends,
    unrolled,
)
from fastfisher.engine.random_state import RandomState
from fastfisher.model import (
    Inputs,
    call_model,
    call_within,
    count_examples,
    differentiable,
    input_tensors,
    map_inputs,
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


class Receiver:
    """What the nodes of a forward hand their gradients to.

    They hold this and not the capture: the capture holds the logits, the logits their nodes, and Python's garbage
    collector cannot see a cycle that goes through autograd's nodes, so that it would never be freed.

    Attributes:
        function: who receives during :meth:`Capture.backward`.
        retain: whether another backward may follow.
        strayed: whether a gradient came at another time, because the forward takes one itself.
    """

    def __init__(self) -> None:
        self.function: Receive | None = None
        self.retain, self.strayed = True, False

    def __call__(self, layer: Layer, grad: Tensor) -> None:
        """Called by the node after a layer."""
        if self.function is None:
            self.strayed = True
            return
        layer.check_unchanged()
        self.function(layer, grad)
        if not self.retain:
            layer.release()


@dataclass
class Known:
    """What captures of a model and of batches of the same shapes have in common.

    Attributes:
        scattered: which layers have their examples in another order than the batch, as
            :mod:`fastfisher.engine.completeness` finds.
        layouts: where the examples are, by the number of the call, for the function and the shape that were met there.
    """

    scattered: frozenset[int] = frozenset()
    layouts: dict[int, tuple[Any, torch.Size, Layout | None]] = field(default_factory=dict)


class Capture:
    """One forward of a model whose layers are watched; :meth:`backward` may follow any number of times.

    Attributes:
        logits: the output of the forward, with its graph.
        parameters: stand-ins for the chosen parameters by name, leaves that share their memory.
        layers: the calls that have a formula, in order.
        apart: by name, the parts that make up a parameter without overlap, each a list of uses that one formula serves
            together (a layer that is called at every time step): squared norms add up over the parts.
        joint: by name, the uses of a parameter through functions of parameters or with several formulas, in lists like
            those of ``apart``: their per-example gradients must be added before they are squared.
        fallbacks: by name, why nothing here can follow a parameter. The first backward may add to it.
        told: whether the caller has said so.
        random: whether the forward drew random numbers from torch's generators.

    Args:
        known: what earlier captures of the same model and shapes have found out.

    Raises:
        ValueError: there is no example, or the model couples examples (a batch norm on the statistics of the batch); it
            is named.
        NotImplementedError: the model recomputes layers where they cannot be seen (reentrant checkpointing).
    """

    def __init__(self, model: nn.Module, inputs: Inputs, names: Iterable[str], known: Known | None = None) -> None:
        found = dict(model.named_parameters())
        self.parameters = {name: found[name].data.requires_grad_() for name in names}
        others = {name: p.data for name, p in found.items() if name not in self.parameters}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.examples = count_examples(inputs)
        if self.examples == 0:
            raise ValueError("inputs: expected at least one example, got none")
        self.anchor = torch.zeros((), device=input_tensors(inputs)[0].device, requires_grad=True)
        self.layers: list[Layer] = []
        self.unplaced: list[list[Layer]] = []  # those in one list have the same rows
        self.known = known or Known()
        self.fallbacks: dict[str, str] = {}
        self.told = False
        self.receiver = Receiver()
        state = buffers | others | self.parameters
        before = RandomState.on_devices_of(found.values())
        mode = _Watch(self, model, inputs)
        with torch.enable_grad(), uncompiled(model, "the measurement"):
            self.logits = call_within(model, state, mode.run)
        self.random = before.has_moved()
        for node in graph_nodes(self.logits):
            refuse_recomputed(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in mode.names:
                reason = "it is used where no call can be seen, as in a custom autograd.Function"
                self.fallbacks.setdefault(mode.names[id(variable)], reason)
        if self.receiver.strayed:
            reason = "a gradient is taken within the forward, of which it is a part"
            self.fallbacks.update(dict.fromkeys(self.parameters, reason))
        self.parts = self._parts(mode)
        self.apart, self.joint = self._plan()

    def backward(self, cotangent: Tensor, receive: Receive, *, retain_graph: bool = False) -> None:
        """Pulls ``cotangent`` (shaped as the logits) back; ``receive(layer, gradient of its output)`` as it comes.

        The first backward finds the examples of the ``unplaced`` layers, which takes another one, and two where further
        ones are to come; it may add to ``fallbacks``.
        """
        waiting, self.unplaced = self.unplaced, []
        if waiting and retain_graph:  # a gradient may be 0 in this backward and not in the next
            self._place(waiting, random_cotangent(self.logits), lambda layer, grad: None)
        elif waiting:
            self._place(waiting, cotangent, receive)
            return
        self._pull(cotangent, receive, retain_graph)

    def _pull(self, cotangent: Tensor, receive: Receive, retain_graph: bool) -> None:
        if not self.logits.requires_grad:
            return  # no parameter that could be followed takes part
        self.receiver.function, self.receiver.retain = receive, retain_graph
        try:
            with torch.enable_grad():  # a scalar: with grad_outputs= the first call imports sympy, 30 MB and a second
                total = (self.logits * cotangent).sum()
            torch.autograd.grad(total, self.anchor, retain_graph=retain_graph, allow_unused=True)
        finally:
            self.receiver.function = None

    def check_repeatable(self) -> None:
        """Raises ValueError where parameters have no formula and the forward draws random numbers.

        They take a forward for each example, which would draw others.
        """
        if self.random and self.fallbacks:
            raise ValueError(
                f"model: expected a forward without random numbers, as {named(self.fallbacks)} have no formula and "
                "take a forward for each example, which would draw others; got one that draws (dropout in eval mode?)"
            )

    def _parts(self, mode: _Watch) -> dict[str, list[Part]]:
        """By name, the uses of each parameter: those of the tensors whose graphs lead to it."""
        parts: dict[str, list[Part]] = {name: [] for name in self.parameters}
        sources: dict[int, list[str]] = {}
        for layer in self.layers:
            for slot, tensor in layer.tensors.items():
                if id(tensor) not in sources:
                    sources[id(tensor)] = mode.sources(tensor)
                for name in sources[id(tensor)]:
                    parts[name].append(Part(layer, slot, tensor))
        return parts

    def _plan(self) -> tuple[dict[str, list[list[Part]]], dict[str, list[list[Part]]]]:
        apart: dict[str, list[list[Part]]] = {}
        joint: dict[str, list[list[Part]]] = {}
        for name, leaf in self.parameters.items():
            if name not in self.fallbacks:
                groups = _together(self.parts[name])
                (apart if _disjoint(leaf, [group[0].tensor for group in groups]) else joint)[name] = groups
        return apart, joint

    def _place(self, unplaced: list[list[Layer]], cotangent: Tensor, receive: Receive) -> None:
        """A backward that also finds which example each row of some layers belongs to.

        The gradient of a row is linear in that of the logits. With that of example i times i + 1, the gradients of its
        rows come i + 1 times as large; for many examples, digit by digit. A few random projections of a row tell.
        """
        waiting = {id(layer) for layers in unplaced for layer in layers}
        first = {id(layers[0]) for layers in unplaced}
        kept: list[tuple[Layer, Tensor]] = []
        plain: dict[int, Tensor] = {}

        def sort(layer: Layer, grad: Tensor) -> None:
            if id(layer) in first:
                plain[id(layer)] = _projected(layer, grad)
            if id(layer) in waiting:
                kept.append((layer, grad))
            else:
                receive(layer, grad)

        self._pull(cotangent, sort, True)
        norms = {key: p.square().sum(1) for key, p in plain.items()}
        owners = {key: torch.zeros(len(p), dtype=torch.int64, device=p.device) for key, p in plain.items()}
        certain = {key: torch.ones(len(p), dtype=torch.bool, device=p.device) for key, p in plain.items()}
        base = 8 if torch.finfo(self.logits.dtype).eps > 1e-4 else 256
        step = 1

        def compare(layer: Layer, grad: Tensor) -> None:
            key = id(layer)
            if key in plain:
                p, scaled = plain[key], _projected(layer, grad)
                ratio = ((scaled * p).sum(1) / norms[key]).nan_to_num(1.0).round().clamp(1, base)
                certain[key] &= (scaled - ratio[:, None] * p).square().sum(1) <= 0.06 * norms[key]
                owners[key] += (ratio.long() - 1) * step

        while step < self.examples:
            digits = torch.arange(self.examples, device=cotangent.device) // step % base
            factors = (digits + 1).to(cotangent).view(-1, *[1] * (cotangent.dim() - 1))
            self._pull(cotangent * factors, compare, True)
            step *= base
        for layers in unplaced:
            key = id(layers[0])
            owner = torch.empty(0, dtype=torch.int64)  # where it does not lead to the logits
            if key in plain and bool((certain[key] & (owners[key] < self.examples)).all()):
                owner = owners[key].masked_fill(norms[key] == 0, -1)
            elif key in plain:
                self._without(layers)
            layout = Rows.of(owner, self.examples, layers[0].leading)
            for layer in layers:
                layer.layout = layout
        for layer, grad in kept:
            receive(layer, grad)

    def _without(self, layers: list[Layer]) -> None:
        """Takes the parameters of some layers for those without a formula."""
        numbers = {id(layer) for layer in layers}
        names = [name for name, parts in self.parts.items() if any(id(part.layer) in numbers for part in parts)]
        reason = f"rows of a {type(layers[0]).__name__} belong to several examples"
        self.fallbacks.update(dict.fromkeys(names, reason))
        self.apart, self.joint = self._plan()


class _Tap(torch.autograd.Function):
    """The identity, in place; its backward hands the gradient of the layer's output over."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, receiver: Receiver, layer: Layer) -> Tensor:
        ctx.receiver, ctx.layer = receiver, layer
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.receiver(ctx.layer, grad)
        return grad if ctx.needs_input_grad[0] else None, None, None, None


class _Own(torch.autograd.Function):
    """A layer's own forward and backward, which also hands the gradient of the output over.

    Without an operand the output is a copy of a parameter for each example.
    """

    @staticmethod
    def forward(ctx: Any, operand: Tensor | None, anchor: Tensor, receiver: Receiver, layer: Layer) -> Tensor:
        ctx.receiver, ctx.layer = receiver, layer
        ctx.set_materialize_grads(False)
        return layer.output()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.receiver(ctx.layer, grad)
            grad = ctx.layer.pull_back(grad) if ctx.needs_input_grad[0] else None
        return grad, None, None, None


class _Unrolled(torch.autograd.Function):
    """A recurrent layer: its backward hands over the gradients of the products of all time steps, layer by layer."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, h: Tensor, c: Tensor | None, anchor: Tensor, receiver: Receiver, recurrence: Recurrence
    ) -> Any:
        ctx.receiver, ctx.recurrence = receiver, recurrence
        return recurrence.forward(rows, h, c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            found, states = ctx.recurrence.backward(*grads)
            inputs = ctx.recurrence.inputs(found[0][1]) if ctx.needs_input_grad[0] else None
            for layer, grad in found:
                ctx.receiver(layer, grad)
        return inputs, *states, None, None, None


class _Watch(TorchFunctionMode):
    """Sees every call of a forward.

    ``followed`` has, by id, the parameters and the tensors computed from parameters alone. What else depends on an
    example requires a gradient or carries the mark of :func:`_mark`.
    """

    def __init__(self, capture: Capture, model: nn.Module, inputs: Inputs, probe: list[_Seen] | None = None) -> None:
        super().__init__()
        self.capture, self.model = capture, model
        examples = count_examples(inputs)

        def mark(x: Tensor) -> Tensor:
            shared = examples > 1 and (x.dim() == 0 or len(x) == 1)
            x = differentiable(x.detach())
            return x if shared else _mark(x)

        self.inputs = map_inputs(inputs, mark)
        self.names = {id(p): name for name, p in capture.parameters.items()}
        self.followed: dict[int, Tensor] = {id(p): p for p in capture.parameters.values()}
        self.calls = 0
        self.probing = probe
        self.probed: list[_Seen] | None = None

    def run(self) -> Any:
        """The model's output."""
        with self:
            return call_model(self.model, self.inputs)

    def sources(self, tensor: Tensor) -> list[str]:
        """The names of the parameters that a followed tensor is computed from."""
        if id(tensor) in self.names:
            return [self.names[id(tensor)]]
        leaves = [getattr(node, "variable", None) for node in graph_nodes(tensor)]
        return [self.names[id(leaf)] for leaf in leaves if id(leaf) in self.names]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            return func(*args, **kwargs)
        keep_saved_tensors()
        tracked, level = [], 0
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self.followed:
                tracked.append(tensor)
            else:
                level = max(level, _level(tensor))
        if level and _scatters(func, args):
            level = _SCATTERED
        if not tracked or not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            out = func(*args, **kwargs)
        elif not level:
            out = func(*args, **kwargs)
            self._follow([out, *_written(func, args)])
        elif (inner := opened(func)) is not None:
            with self:
                return inner(*args, **kwargs)
        elif (written := _written(func, args)) and id(written[0]) in self.followed:
            # Examples are written into a function of parameters: from here on it depends on them, with all that shares
            # its memory, and the parameters keep their place in its graph.
            self._forget(written[0])
            out = func(*args, **kwargs)
        else:
            out = self._mixed(func, args, kwargs, tracked)
        if level:
            _mark_all([out, *_written(func, args)], level)
        return out

    def _follow(self, found: Any) -> None:
        """Notes what a function of parameters alone gave."""
        for tensor in tensors_in(found):
            if tensor.requires_grad:
                self.followed[id(tensor)] = tensor

    def _forget(self, written: Tensor) -> None:
        memory = written.untyped_storage().data_ptr()
        shared = [key for key, t in self.followed.items() if t.untyped_storage().data_ptr() == memory]
        for key in shared:
            del self.followed[key]

    def _mixed(self, func: Any, args: Any, kwargs: Any, tracked: list[Tensor]) -> Any:
        """A call that joins parameters and examples."""
        recurrent = unrolled(func, args, kwargs, lambda t: id(t) in self.followed)
        if recurrent is not None:
            return self._recurrent(func, args, kwargs, recurrent, tracked)
        layer = bind(func, args, kwargs, lambda t: id(t) in self.followed)
        others = [t for t in tensors_in((args, kwargs)) if id(t) not in self.followed and depends(t)]
        if layer is not None and not (layer.replaces or layer.several) and len(others) != 1:
            layer = None  # the formulas know of one argument that depends on the examples
        if layer is None and func in DECOMPOSED:
            with self:
                return DECOMPOSED[func](*args, **kwargs)
        index = self._count(func, layer.operand if layer is not None else None)
        if self.probing is None:
            if layer is None:
                self._give_up(tracked, f"there is no formula for its use in {name_of(func)}")
            elif self._find(layer, func, index):
                return self._tap(layer, func, args, kwargs)
            else:
                self._give_up(tracked, f"{name_of(func)} has its examples where they cannot be told apart")
        return func(*map_tensors(self._detached, args), **map_tensors(self._detached, kwargs))

    def _count(self, func: Any, operand: Tensor | None) -> int:
        """The number of this call; with ``probing``, what it saw is noted."""
        index = self.calls
        self.calls += 1
        if self.probing is not None:
            self.probing.append(_Seen(func, operand))
        return index

    def _find(self, layer: Layer, func: Any, index: int) -> bool:
        """Finds the examples in what a layer works on; False where they cannot be told apart."""
        misplaced = len(self.capture.layers) in self.capture.known.scattered
        scattered = misplaced or _level(layer.operand) == _SCATTERED
        if not (scattered and layer.by_rows) and not misplaced:
            layout = self._layout(index, func, layer.operand, layer.leading, scattered)
            if layout is not None and layer.accepts(layout):
                layer.layout = layout
                return True
        if layer.by_rows:
            self.capture.unplaced.append([layer])
        return layer.by_rows

    def _tap(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Any:
        anchor, receiver = self.capture.anchor, self.capture.receiver
        self.capture.layers.append(layer)
        if layer.pulls_back:
            return _Own.apply(layer.operand, anchor, receiver, layer)  # type: ignore[no-untyped-call]
        if not layer.replaces:
            tapped = _Tap.apply(layer.output(), anchor, receiver, layer)  # type: ignore[no-untyped-call]
            return layer.finish(tapped)
        (original,) = layer.tensors.values()
        narrowed = layer.narrow()
        self._follow([narrowed])
        copies = _Own.apply(None, anchor, receiver, layer)  # type: ignore[no-untyped-call]

        def swap(tensor: Tensor) -> Tensor:
            return copies if tensor is original else self._detached(tensor)

        layer.tensors = {"value": narrowed}
        return func(*map_tensors(swap, layer.rewritten(args)), **map_tensors(swap, kwargs))

    def _recurrent(self, func: Any, args: Any, kwargs: Any, call: Unrolled, tracked: list[Tensor]) -> Any:
        """A recurrent network: each of its layers is a few linear layers, whose inputs come out one after the other."""
        call.states = [self._for_each_example(state) for state in call.states]
        index = self._count(func, call.operand)
        if self.probing is not None:
            return func(*map_tensors(self._detached, args), **map_tensors(self._detached, kwargs))
        here = range(len(self.capture.layers), len(self.capture.layers) + call.products)
        scattered = (
            call.packed or _level(call.operand) == _SCATTERED or any(i in self.capture.known.scattered for i in here)
        )
        layout = None if scattered else self._layout(index, func, call.operand, 2, False)
        if layout is not None:
            layout = call.layout(layout)

        def run(recurrence: Recurrence, rows: Tensor, h: Tensor, c: Tensor | None) -> Any:
            self.capture.layers.extend(recurrence.layers)
            if layout is None:
                self.capture.unplaced.append(list(recurrence.layers))
            else:
                for layer in recurrence.layers:
                    layer.layout = layout
            return _Unrolled.apply(rows, h, c, self.capture.anchor, self.capture.receiver, recurrence)  # type: ignore[no-untyped-call]

        return call.run(run)

    def _for_each_example(self, state: Tensor) -> Tensor:
        """An initial state that is learned, with its formula: that of a sum."""
        if id(state) not in self.followed:
            return state
        with self:
            return torch.add(_mark(torch.zeros_like(state, requires_grad=False)), state)

    def _detached(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in self.followed else tensor

    def _give_up(self, tracked: list[Tensor], reason: str) -> None:
        for tensor in tracked:
            for name in self.sources(tensor):
                self.capture.fallbacks.setdefault(name, reason)

    def _layout(self, index: int, func: Any, operand: Tensor, leading: int, scattered: bool) -> Layout | None:
        """Where the examples are in ``operand``, or None where that cannot be told.

        Certain where dimension 0 has their number and no other dimension a multiple of it, unless the operand has been
        indexed by what the examples say. Otherwise the forward is run once more with a few examples, and the dimension
        that shrinks is theirs.
        """
        examples, shape = self.capture.examples, operand.shape[:leading]
        if examples == 1:
            return Layout(1, 0, shape[0] if shape else 1)
        if not scattered and shape and shape[0] == examples and all(size % examples for size in shape[1:]):
            return Layout(examples, 0)
        met = self.capture.known.layouts.get(index)
        if met is None or scattered or met[:2] != (func, operand.shape):
            met = func, operand.shape, self._shrunk(index, func, operand, leading, scattered)
            if not scattered:
                self.capture.known.layouts[index] = met
        return met[2]

    def _shrunk(self, index: int, func: Any, operand: Tensor, leading: int, scattered: bool) -> Layout | None:
        """By the operand of the same call in a forward of a few examples."""
        examples = self.capture.examples
        few = 2 if examples > 2 else 3
        if self.probed is None:
            self.probed = []
            inputs = take_rows(self.inputs, torch.arange(few) % examples)
            probe = _Watch(self.capture, self.model, inputs, self.probed)
            random = RandomState.on_devices_of(self.model.parameters())
            try:
                probe.run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return None  # a model for this one batch size
            finally:
                random.restore()
        seen = self.probed[index] if index < len(self.probed) else None
        if seen is None or seen.func != func or seen.operand is None or seen.operand.dim() != operand.dim():
            return None
        return Layout.between(operand, seen.operand, examples, few, leading, compared=scattered)


@dataclass
class _Seen:
    """A call in the forward of a few examples."""

    func: Any
    operand: Tensor | None


# ---- small things ----------------------------------------------------------------------------------------------------


def random_cotangent(logits: Tensor) -> Tensor:
    """Numbers shaped as the logits, none near 0, always the same."""
    generator = torch.Generator().manual_seed(0)
    values = 0.5 + torch.rand(logits.shape, generator=generator)
    signs = torch.randint(2, logits.shape, generator=generator) * 2 - 1
    return (values * signs).to(logits.device, logits.dtype)


def named(names: Iterable[str]) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _projected(layer: Layer, grad: Tensor) -> Tensor:
    """A few random projections, always the same, of the rows of an output's gradient: float64[rows, 4]."""
    rows = layer.operand.shape[: layer.leading].numel()
    d = computing(grad).reshape(rows, grad.numel() // max(1, rows))
    directions = torch.randn(d.shape[1], 4, generator=torch.Generator().manual_seed(2))
    return (d @ directions.to(d.device, d.dtype)).double()


_LOOKS = frozenset(
    [Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__]
    + [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_nested")]
)
"""Functions that give no tensor."""

_DEPENDS, _SCATTERED = 1, 2


def _level(tensor: Tensor) -> int:
    """0 for what does not depend on the examples, 2 (``_SCATTERED``) for what was indexed by them, 1 for the rest."""
    return getattr(tensor, "_fastfisher_depends", 0) or (_DEPENDS if tensor.requires_grad else 0)


def _mark(tensor: Tensor, level: int = _DEPENDS) -> Tensor:
    """Notes on the tensor that it depends on the examples, also where it requires no gradient."""
    tensor._fastfisher_depends = level  # type: ignore[attr-defined]
    return tensor


def _mark_all(found: Any, level: int) -> None:
    for tensor in tensors_in(found):
        if level == _SCATTERED or not tensor.requires_grad:
            _mark(tensor, level)


_INDEXING = (
    "index_select gather take take_along_dim scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ "
    "index_add index_add_ index_copy index_copy_ index_put index_put_ index_reduce index_reduce_ repeat_interleave "
    "masked_select masked_scatter masked_scatter_ __getitem__ __setitem__"
)


_INDEXING_NAMES = frozenset(_INDEXING.split())


def _scatters(func: Any, args: Any) -> bool:
    """Whether a call moves rows along dimension 0 to where the examples say, as a router of tokens to experts does."""
    name = getattr(func, "__name__", "")
    if name not in _INDEXING_NAMES or len(args) < 2:
        return False
    if name in ("__getitem__", "__setitem__", "index_put", "index_put_"):
        first = args[1][0] if isinstance(args[1], tuple | list) and args[1] else args[1]
        return isinstance(first, Tensor) and depends(first)
    if isinstance(args[1], int) and args[1] % max(1, args[0].dim()):
        return False
    return any(depends(t) for t in tensors_in(args[1:]) if not t.is_floating_point())


def _written(func: Any, args: Any) -> list[Tensor]:
    """What a call writes into, and the tensor that it is a view of."""
    if not (args and isinstance(args[0], Tensor) and writes_first(func)):
        return []
    base = args[0]._base
    return [args[0]] if base is None else [args[0], base]


def _together(parts: list[Part]) -> list[list[Part]]:
    """The uses of the same tensor in the same role, where one formula serves for all of them."""
    groups: list[list[Part]] = []
    places: dict[tuple[int, str], int] = {}
    for part in parts:
        place = places.setdefault((id(part.tensor), part.slot), len(groups))
        if place < len(groups) and groups[place][0].layer.joins(part.layer):
            groups[place].append(part)
        else:
            groups.append([part])
    return groups


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
