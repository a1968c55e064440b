"""A forward that is watched for a capture: the calls that parameters take part in, and what depends on the examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfisher.engine.calls import map_tensors, name_of, opened, tensors_in, writes_first
from fastfisher.engine.checkpointing import graph_nodes, keep_saved_tensors
from fastfisher.engine.layers import DECOMPOSED, Layer, Layout, Recurrence, Unrolled, bind, depends, unrolled
from fastfisher.engine.random_state import RandomState
from fastfisher.engine.taps import Own, Receiver, Tap, TapOfRecurrence
from fastfisher.inputs import Inputs, count_examples, differentiable, input_tensors, map_inputs, take_rows
from fastfisher.model import call_model


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


@dataclass
class _Seen:
    """A call in the forward of a few examples."""

    func: Any
    operand: Tensor | None


class Watch(TorchFunctionMode):
    """Sees every call of a forward of ``parameters`` (by name) and examples, and taps those that join the two.

    Attributes:
        layers: the calls that have a formula, in order.
        unplaced: those of them whose examples have to be found; the layers in one list have the same rows.
        fallbacks: by name, why nothing here can follow a parameter.
        names: the parameters' names, by id.
        followed: by id, the parameters and the tensors computed from parameters alone. What else depends on an example
            requires a gradient or carries the mark of :func:`_mark`.
        anchor: an input of every tap, so that a backward to it goes through all of them.

    Args:
        probe: where to note the calls of a forward of a few examples, in which no layer is tapped.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        parameters: dict[str, Tensor],
        known: Known,
        probe: list[_Seen] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.parameters, self.known, self.probing = model, parameters, known, probe
        self.examples = examples = count_examples(inputs)
        self.layers: list[Layer] = []
        self.unplaced: list[list[Layer]] = []
        self.fallbacks: dict[str, str] = {}
        self.receiver = Receiver()
        self.anchor = torch.zeros((), device=input_tensors(inputs)[0].device, requires_grad=True)

        def mark(x: Tensor) -> Tensor:
            shared = examples > 1 and (x.dim() == 0 or len(x) == 1)
            x = differentiable(x.detach())
            return x if shared else _mark(x)

        self.inputs = map_inputs(inputs, mark)
        self.names = {id(p): name for name, p in parameters.items()}
        self.followed: dict[int, Tensor] = {id(p): p for p in parameters.values()}
        self.calls = 0
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
            # Examples are written into something computed from parameters alone. From here on it, and every view of its
            # memory, depends on the examples and is no longer treated as a parameter.
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
            layer = None  # the formulas are for one argument that depends on the examples
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
        misplaced = len(self.layers) in self.known.scattered
        scattered = misplaced or _level(layer.operand) == _SCATTERED
        if not (scattered and layer.by_rows) and not misplaced:
            layout = self._layout(index, func, layer.operand, layer.leading, scattered)
            if layout is not None and layer.accepts(layout):
                layer.layout = layout
                return True
        if layer.by_rows:
            self.unplaced.append([layer])
        return layer.by_rows

    def _tap(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Any:
        anchor, receiver = self.anchor, self.receiver
        self.layers.append(layer)
        if layer.pulls_back:
            return Own.apply(layer.operand, anchor, receiver, layer)  # type: ignore[no-untyped-call]
        if not layer.replaces:
            tapped = Tap.apply(layer.output(), anchor, receiver, layer)  # type: ignore[no-untyped-call]
            return layer.finish(tapped)
        (original,) = layer.tensors.values()
        narrowed = layer.narrow()
        self._follow([narrowed])
        copies = Own.apply(None, anchor, receiver, layer)  # type: ignore[no-untyped-call]

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
        here = range(len(self.layers), len(self.layers) + call.products)
        scattered = call.packed or _level(call.operand) == _SCATTERED or any(i in self.known.scattered for i in here)
        layout = None if scattered else self._layout(index, func, call.operand, 2, False)
        if layout is not None:
            layout = call.layout(layout)

        def run(recurrence: Recurrence, rows: Tensor, h: Tensor, c: Tensor | None) -> Any:
            self.layers.extend(recurrence.layers)
            if layout is None:
                self.unplaced.append(list(recurrence.layers))
            else:
                for layer in recurrence.layers:
                    layer.layout = layout
            return TapOfRecurrence.apply(rows, h, c, self.anchor, self.receiver, recurrence)  # type: ignore[no-untyped-call]

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
                self.fallbacks.setdefault(name, reason)

    def _layout(self, index: int, func: Any, operand: Tensor, leading: int, scattered: bool) -> Layout | None:
        """Where the examples are in ``operand``, or None where that cannot be told.

        Certain where dimension 0 has their number and no other dimension a multiple of it, unless the operand has been
        indexed by what the examples say. Otherwise the forward is run once more with a few examples, and the dimension
        that shrinks is theirs.
        """
        examples, shape = self.examples, operand.shape[:leading]
        if examples == 1:
            return Layout(1, 0, shape[0] if shape else 1)
        if not scattered and shape and shape[0] == examples and all(size % examples for size in shape[1:]):
            return Layout(examples, 0)
        met = self.known.layouts.get(index)
        if met is None or scattered or met[:2] != (func, operand.shape):
            met = func, operand.shape, self._shrunk(index, func, operand, leading, scattered)
            if not scattered:
                self.known.layouts[index] = met
        return met[2]

    def _shrunk(self, index: int, func: Any, operand: Tensor, leading: int, scattered: bool) -> Layout | None:
        """By the operand of the same call in a forward of a few examples."""
        examples = self.examples
        few = 2 if examples > 2 else 3
        if self.probed is None:
            self.probed = []
            inputs = take_rows(self.inputs, torch.arange(few) % examples)
            probe = Watch(self.model, inputs, self.parameters, self.known, self.probed)
            random = RandomState.on_devices_of(self.model.parameters())
            try:
                probe.run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return None  # the model runs with this one batch size only
            finally:
                random.restore()
        seen = self.probed[index] if index < len(self.probed) else None
        if seen is None or seen.func != func or seen.operand is None or seen.operand.dim() != operand.dim():
            return None
        return Layout.between(operand, seen.operand, examples, few, leading, compared=scattered)


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
