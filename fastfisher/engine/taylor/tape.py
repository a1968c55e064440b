"""The tape: records the operations of a forward, and takes zᵀHz from what each of them knows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodWrapperType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfisher.engine.calls import map_tensors, name_of, opened, positional, tensors_in
from fastfisher.engine.checkpointing import keep_saved_tensors
from fastfisher.engine.taylor.held import Held, writes_to
from fastfisher.engine.taylor.known import take_out_own
from fastfisher.engine.taylor.nodes import Linear, Node, Product
from fastfisher.engine.taylor.registry import RULES, NoRule


class Tape(TorchFunctionMode):
    """The operations of one forward that depend on some parameters, each with a rule for its derivatives.

    What happens in place to the tensors that it holds is the matter of :class:`Held`.

    Example:
        >>> tape = Tape(parameters)
        >>> with tape:
        ...     loss = F.cross_entropy(model(inputs), targets)
        >>> tape.finish(loss)
        >>> tape.curvature(directions)  # zᵀHz, for as many z as wanted

    Args:
        parameters: what moves, by name. Every tensor of the forward that requires a gradient must come from these.

    Raises:
        NoRule: in the forward or in :meth:`finish`: an operation has no rule, hides from PyTorch's function modes (a
            custom ``autograd.Function``), or writes into a tensor that is held.
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.nodes: list[Node] = []
        self.slots: dict[int, int] = {}
        self._count = 0
        self.held = Held()
        self._flaw: str | None = None
        self._outputs: list[Tensor] = []
        self._known: list[Tensor] = []  # the part of the result that is the same for every direction
        self._parameters = list(parameters.values())
        for parameter in self._parameters:
            self._new_slot(parameter)

    def _new_slot(self, value: Tensor) -> int:
        self.held.hold(value)
        self.slots[id(value)] = self._count
        self._count += 1
        return self._count - 1

    def slot(self, value: Any) -> int | None:
        """The slot of a tensor that moves; None for everything else."""
        return self.slots.get(id(value)) if isinstance(value, Tensor) else None

    def current(self, value: Tensor) -> Tensor:
        """What a tensor is after all that was done to it in place."""
        return self.held.current(value)

    def add(self, node: Node, value: Tensor) -> Tensor:
        """Appends an operation whose output is ``value``, which must be a tensor of its own."""
        if value in self.held:
            value = value.view_as(value)
        node.output, node.dtype = self._new_slot(value), value.dtype
        self.nodes.append(node)
        self._outputs.append(value)
        return value

    def linear(
        self,
        name: str,
        function: Callable[..., Tensor],
        moving: Sequence[Tensor],
        value: Tensor,
        squares: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Appends an operation that is linear in ``moving``; ``function`` and ``squares``: see :class:`Linear`."""
        slots = [self.slots[id(x)] for x in moving]
        return self.add(Linear(name, slots, function, squares), value)

    def product(
        self,
        name: str,
        function: Callable[..., Tensor],
        a: Tensor,
        b: Tensor,
        shift: Tensor | None = None,
        sums: bool | Literal["single"] = True,
    ) -> Tensor:
        """Appends y = function(a, b, shift) = a·b + shift, whichever of the three moves; see :class:`Product`."""
        value = function(a, b, shift) if shift is not None else function(a, b)
        slots = [self.slot(x) for x in (a, b, shift)]
        return self.add(Product(name, slots, function, a.detach(), b.detach(), sums), value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keep_saved_tensors()
        if type(func) is MethodWrapperType and func.__name__ == "__set__":
            return self._set(func, args)
        args, kwargs = (
            map_tensors(self.held.checked, tuple(args)),
            map_tensors(self.held.checked, kwargs) if kwargs else {},
        )
        tensors = list(tensors_in((args, kwargs)))
        if not (torch.is_grad_enabled() and any(id(x) in self.slots for x in tensors)):
            return self._unfollowed(func, args, kwargs, tensors)
        found = RULES.get(func)
        if found is None:
            inside = opened(func, methods=True)
            if inside is not None:
                with self:
                    return inside(*args, **kwargs)
            out = self._unfollowed(func, args, kwargs, tensors)
            if any(x.requires_grad for x in tensors_in(out)):
                raise NoRule(f"{name_of(func)} has no rule")
            return out
        if kwargs:
            args, kwargs = positional(func, args, kwargs)
            if kwargs.pop("out", None) is not None:
                raise NoRule(f"{name_of(func)} has no rule for out=")
        rule, inplace = found
        taken = _keywords(rule) if kwargs else None
        if taken is not None and not kwargs.keys() <= taken:
            raise NoRule(f"{name_of(func)} has no rule for {min(kwargs.keys() - taken)}=")
        target: Any = args[0] if inplace else None
        if inplace and target.requires_grad and (target.is_leaf or (target._base is not None and target._base.is_leaf)):
            raise NoRule(f"{name_of(func)} writes into a parameter")
        out = rule(self, func, *args, **kwargs)
        for x in tensors:
            self.held.hold(x)
        if inplace:
            if out.dtype != target.dtype:
                with self:
                    out = out.to(target.dtype)
            self.held.replace(target, out)
        return out

    def _unfollowed(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Makes a call that needs no rule, as long as it leaves alone what the tape holds."""
        before = [writes_to(x) for x in tensors]
        out = func(*args, **kwargs)
        for x, writes in zip(tensors, before, strict=True):
            if writes_to(x) != writes and self.held.shares(x):
                raise NoRule(f"{name_of(func)} has no rule where it writes into a tensor that was used before")
            if id(x) in self.slots and not x.requires_grad:  # detach_()
                del self.slots[id(x)]
        return out

    def _set(self, func: Any, args: Any) -> Any:
        """Sets an attribute: data, hooks. PyTorch does so from C++, too, where nothing may be raised."""
        if any(self.held.shares(x) for x in tensors_in(args)):
            self._flaw = "setting an attribute of a tensor has no rule"
        return func(*args)

    def _check_complete(self) -> None:
        """Whether anything happened to what the tape holds that no call showed.

        Raises:
            NoRule: a tensor was written to, or a hook of the forward may change the gradient of one.
        """
        if self._flaw is not None:
            raise NoRule(self._flaw)
        self.held.check_unchanged()
        if any(x._backward_hooks for x in self._outputs):
            raise NoRule("a hook on the gradient of a tensor has no rule")

    def why_not_multilinear(self, logits: Tensor) -> str | None:
        """Why ``logits`` may not be piecewise linear in every single parameter; None where they are.

        Sufficient: every operation is piecewise linear in all of its inputs jointly, or a product of two of which no
        parameter reaches both. By induction each value is then piecewise linear in each single parameter.
        """
        self._check_complete()
        end = self.slot(self.held.current(logits))
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
                varies less, because the sources left out are most of the noise of zᵀHz. Of what remains, the mean of a
                part is known exactly and taken for it: see :mod:`fastfisher.engine.taylor.known`.
            until: leave out the sources of what comes after this value. After the logits, that is the Gauss-Newton
                term of the loss, y′ᵀ∇²ℓ y′, the trace of which is that of the Fisher matrix.

        Raises:
            NoRule: ``loss`` or ``until`` does not come from recorded operations.
        """
        self._check_complete()
        if self.slot(loss) is None:
            raise NoRule("the loss does not come from recorded operations")
        reached = self._reached() if reduced else {}
        if reduced:
            for node in self.nodes:
                if isinstance(node, Product) and not _common(node, reached):
                    node.wants_weight = False
        if until is not None:
            last = self.slot(self.held.current(until))
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
        if reduced:
            with torch.no_grad():
                self.nodes, self._known = take_out_own(self.nodes, self._parameters, reached, self._count)
        self._keep_only_what_counts()
        last_use = {slot: i for i, node in enumerate(self.nodes) for slot in node.inputs}
        self._dead: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            last_use.setdefault(node.output, i)
        for slot, i in last_use.items():
            self._dead[i].append(slot)
        self._outputs.clear()
        self.slots.clear()
        self.held = Held()

    def _keep_only_what_counts(self) -> None:
        """Lets go of the operations whose derivatives no source needs."""
        needed: set[int] = set()
        kept = []
        for node in reversed(self.nodes):
            if node.wants_weight or node.output in needed:
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]

    @torch.no_grad()
    def curvature(self, directions: Sequence[Tensor]) -> Tensor:
        """zᵀHz of the loss, or what :meth:`finish` left of it; a float64 scalar.

        Args:
            directions: z, one tensor for each parameter, in their order and shapes.
        """
        moving: dict[int, Tensor] = dict(enumerate(directions))
        sources = list(self._known)
        for node, dead in zip(self.nodes, self._dead, strict=True):
            inputs = tuple(moving[slot] for slot in node.inputs)
            first = node.first(*inputs)
            if node.wants_weight:
                sources.append(node.source(inputs, first).double())
            moving[node.output] = first if first.dtype == node.dtype else first.to(node.dtype)
            for slot in dead:
                del moving[slot]
        return torch.stack(sources).sum() if sources else torch.zeros((), dtype=torch.float64)


def _common(node: Node, reached: dict[int, int]) -> int:
    """The parameters that reach both factors of a product, as a set of bits; of another operation, none."""
    if not (isinstance(node, Product) and node.both_move):
        return 0
    return reached[node.inputs[0]] & reached[node.inputs[1]]


@functools.cache
def _keywords(rule: Callable[..., Any]) -> frozenset[str] | None:
    """The names of the arguments that a rule takes; None for one that takes any."""
    parameters = inspect.signature(rule).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)
