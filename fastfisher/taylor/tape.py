"""The tape: records the operations of a forward, and takes zᵀHz from what each of them knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from fastfisher.taylor.nodes import Linear, Node, Product


class NoRule(RuntimeError):
    """An operation of the forward that has no rule here; the message names it."""


RULES: dict[Any, tuple[Callable[..., Any], bool]] = {}
"""By function: the rule, and whether the function works in place."""


def rule_for(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rule for functions of these names in torch, Tensor and torch.nn.functional, and their x_ forms."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for name in " ".join(names).split():
            dunder = name.startswith("__")
            inplace_name = f"__i{name[2:]}" if dunder else f"{name}_"
            for place in (torch, Tensor, F, torch._C._nn, torch.special):
                if hasattr(place, name):
                    RULES[getattr(place, name)] = (rule, False)
                if hasattr(place, inplace_name):
                    RULES[getattr(place, inplace_name)] = (rule, True)
        return rule

    return register


class Tape(TorchFunctionMode):
    """The operations of one forward that depend on some parameters, each with a rule for its derivatives.

    Example:
        >>> tape = Tape(parameters)
        >>> with tape:
        ...     loss = F.cross_entropy(model(inputs), targets)
        >>> tape.finish(loss)
        >>> tape.curvature(directions)  # zᵀHz, for as many z as wanted

    Args:
        parameters: what moves, by name. Every tensor of the forward that requires a gradient must come from these.

    Raises:
        NoRule: in the forward or in :meth:`finish`: an operation has no rule, or hides from PyTorch's function modes
            (a custom ``autograd.Function``).
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.nodes: list[Node] = []
        self.slots: dict[int, int] = {}
        self._kept: list[Tensor] = []  # alive, so that an id stands for one tensor
        self._outputs: list[Tensor] = []
        self._current: dict[int, Tensor] = {}  # of a tensor changed in place: what it is now
        self._changed: set[int] = set()  # the storages of those
        for parameter in parameters.values():
            self._new_slot(parameter)

    def _new_slot(self, value: Tensor) -> int:
        self._kept.append(value)
        self.slots[id(value)] = len(self.slots)
        return len(self.slots) - 1

    def slot(self, value: Any) -> int | None:
        """The slot of a tensor that moves; None for everything else."""
        return self.slots.get(id(value)) if isinstance(value, Tensor) else None

    def add(self, node: Node, value: Tensor) -> Tensor:
        """Appends an operation whose output is ``value``, which must be a tensor of its own."""
        if id(value) in self.slots:
            value = value.view_as(value)
        node.output = self._new_slot(value)
        self.nodes.append(node)
        self._outputs.append(value)
        return value

    def linear(self, name: str, function: Callable[..., Tensor], moving: Sequence[Tensor], value: Tensor) -> Tensor:
        """Appends an operation that is linear in ``moving``, whose derivatives ``function`` takes."""
        slots = [self.slots[id(x)] for x in moving]
        return self.add(Linear(name, slots, function), value)

    def product(
        self, name: str, function: Callable[..., Tensor], a: Tensor, b: Tensor, shift: Tensor | None = None
    ) -> Tensor:
        """Appends y = function(a, b, shift) = a·b + shift for a bilinear product, whichever of the three moves."""
        value = function(a, b, shift) if shift is not None else function(a, b)
        slots = [self.slots[id(x)] for x in (a, b, shift) if self.slot(x) is not None]
        a_moves, b_moves = self.slot(a) is not None, self.slot(b) is not None
        fixed_a, fixed_b = a.detach(), b.detach()
        if a_moves and b_moves:
            return self.add(Product(name, slots, function, fixed_a, fixed_b), value)

        def derivative(*moving: Tensor) -> Tensor:
            if a_moves:
                return function(moving[0], fixed_b, *moving[1:])
            if b_moves:
                return function(fixed_a, *moving)
            return function(torch.zeros_like(fixed_a), fixed_b, *moving)

        return self.add(Linear(name, slots, derivative), value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*_map(self._now, args), **_map(self._now, kwargs))
        args, kwargs = _map(self._now, args), _map(self._now, kwargs)
        moving = any(id(x) in self.slots for x in tensors_in((args, kwargs)))
        if not moving:
            return func(*args, **kwargs)
        found = RULES.get(func)
        if found is None:
            out = func(*args, **kwargs)
            if any(x.requires_grad for x in tensors_in(out)):
                raise NoRule(f"{name_of(func)} has no rule")
            return out
        rule, inplace = found
        out = rule(self, func, *args, **kwargs)
        if inplace:
            self.replace(args[0], out)
        return out

    def replace(self, old: Tensor, new: Tensor) -> None:
        """From here on, ``old`` (which the caller wanted changed in place) means ``new``."""
        self._kept.append(old)
        self._current[id(old)] = new
        for known, replaced in list(self._current.items()):
            if replaced is old:
                self._current[known] = new
        self._changed.add(old.untyped_storage().data_ptr())

    def _now(self, x: Tensor) -> Tensor:
        x = self._current.get(id(x), x)
        if x.requires_grad and id(x) not in self.slots:
            raise NoRule("a tensor came from an operation that cannot be seen (a custom autograd.Function?)")
        if self._changed and id(x) in self.slots and x.untyped_storage().data_ptr() in self._changed:
            raise NoRule("a view of a tensor that was changed in place is used afterwards")
        return x

    def why_not_multilinear(self, logits: Tensor) -> str | None:
        """Why ``logits`` may not be piecewise linear in every single parameter; None where they are.

        Sufficient: every operation is piecewise linear in all of its inputs jointly, or a product of two of which no
        parameter reaches both. By induction each value is then piecewise linear in each single parameter.
        """
        end = self.slot(self._current.get(id(logits), logits))
        if end is None:
            return "the logits do not come from recorded operations"
        reached = self._reached()
        for node in self.nodes:
            if node.output > end:
                break
            if node.curved:
                return f"{node.name} is not piecewise linear"
            both = _common(node, reached)
            if both:
                names = [name for i, name in enumerate(self.names) if both >> i & 1]
                return f"{names[0]} reaches both factors of a {node.name}"
        return None

    def _reached(self) -> dict[int, int]:
        """By slot, the parameters on which it depends, as a set of bits."""
        reached = {slot: 1 << slot for slot in range(len(self.names))}
        for node in self.nodes:
            reached[node.output] = functools.reduce(int.__or__, (reached[slot] for slot in node.inputs))
        return reached

    def finish(self, loss: Tensor, *, reduced: bool = False, until: Tensor | None = None) -> None:
        """Takes δ of every operation that wants it, by one backward, and lets go of the graph.

        Args:
            loss: the scalar whose second derivatives are wanted.
            reduced: leave out the sources 2 ⟨δ, a′·b′⟩ of products that no parameter reaches on both sides. For a
                random z of independent elements of mean 0, a′ and b′ are then independent and of mean 0, and so is the
                source: what remains has the mean of zᵀHz, Tr(H), costs a convolution less for each convolution, and
                varies less, because the sources left out are most of the noise of zᵀHz.
            until: leave out the sources of what comes after this value. After the logits, that is the Gauss-Newton
                term of the loss, y′ᵀ∇²ℓ y′, the trace of which is that of the Fisher matrix.

        Raises:
            NoRule: ``loss`` or ``until`` does not come from recorded operations.
        """
        if self.slot(loss) is None:
            raise NoRule("the loss does not come from recorded operations")
        if reduced:
            reached = self._reached()
            for node in self.nodes:
                if isinstance(node, Product) and not _common(node, reached):
                    node.wants_weight = False
        if until is not None:
            last = self.slot(self._current.get(id(until), until))
            if last is None:
                raise NoRule("the logits do not come from recorded operations")
            for node in self.nodes:
                node.wants_weight = node.wants_weight and node.output <= last
        wanting = [(node, y) for node, y in zip(self.nodes, self._outputs, strict=True) if node.wants_weight]
        weights = torch.autograd.grad(loss, [y for _, y in wanting], allow_unused=True) if wanting else ()
        for (node, _), weight in zip(wanting, weights, strict=True):
            if weight is None:
                node.wants_weight = False
            else:
                with torch.no_grad():
                    node.weigh(weight)
        self._loss = self.slots[id(loss)]
        last_use = {slot: i for i, node in enumerate(self.nodes) for slot in node.inputs}
        self._dead: list[list[int]] = [[] for _ in self.nodes]
        for slot, i in last_use.items():
            self._dead[i].append(slot)
        self._outputs.clear()
        self._kept.clear()
        self.slots.clear()
        self._current.clear()

    @torch.no_grad()
    def curvature(self, directions: Sequence[Tensor]) -> Tensor:
        """zᵀHz of the loss, or what :meth:`finish` left of it; a float64 scalar.

        Args:
            directions: z, one tensor for each parameter, in their order and shapes.
        """
        moving: dict[int, Tensor] = dict(enumerate(directions))
        sources: list[Tensor] = []
        for node, dead in zip(self.nodes, self._dead, strict=True):
            inputs = tuple(moving[slot] for slot in node.inputs)
            first = node.first(*inputs)
            if node.wants_weight:
                sources.append(node.source(inputs, first).double())
            moving[node.output] = first
            for slot in dead:
                del moving[slot]
        return torch.stack(sources).sum() if sources else torch.zeros((), dtype=torch.float64)


def _common(node: Node, reached: dict[int, int]) -> int:
    """The parameters that reach both factors of a product, as a set of bits; of another operation, none."""
    return reached[node.inputs[0]] & reached[node.inputs[1]] if isinstance(node, Product) else 0


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(function, x) for x in value)
    if type(value) is dict:
        return {name: _map(function, x) for name, x in value.items()}
    return value


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from tensors_in(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors_in(x)


def name_of(function: Any) -> str:
    """A function's name for a message."""
    return str(resolve_name(function) or getattr(function, "__name__", repr(function)))
