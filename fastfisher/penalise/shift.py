"""The parameters at θ + ρd, or the inputs at x + ρd: where the gradient of the penalised loss is taken once more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fastfisher.distributed.sharded import backward, local_part, reshard
from fastfisher.distributed.single import Single
from fastfisher.engine.gates import Gates
from fastfisher.engine.gradients import dense
from fastfisher.inputs import Inputs, input_tensors, map_inputs
from fastfisher.lists import add_, plus
from fastfisher.model import call_copy, call_model

Gradients = dict[str, Tensor]
Receive = Callable[[Gradients], None]
Moved = tuple[Callable[[Inputs], Tensor], Gradients]
"""The forward there, and its leaves by name."""

LARGE = 1 << 16
"""A parameter of so many elements is worth a call of its own."""


class Copies:
    """Shifts copies of the parameters: the model's own are never written.

    Attributes:
        parameters: the model's, by name.
        looks: whether the host may look at a loss there and decide by it: not where other processes do not see it.
    """

    looks = True

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        self.model, self.gates = model, gates
        self.parameters: Gradients = dict(model.named_parameters())

    def at(self, direction: Gradients, length: Tensor | None, names: list[str]) -> AbstractContextManager[Moved]:
        """Within, the forward at θ + length·direction (at θ where None), and its leaves of those names."""
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        if length is not None:
            moved = plus([parameters[name] for name in direction], length, list(direction.values()))
            parameters.update(zip(direction, moved, strict=True))
        # What required a gradient at θ does here: that is how the gates tell what moves.
        parameters = {n: p.detach().requires_grad_(self.parameters[n].requires_grad) for n, p in parameters.items()}
        leaves = {name: parameters[name] for name in names}
        return nullcontext((lambda inputs: call_copy(self.model, parameters, inputs, self.gates.buffers), leaves))

    def backward(self, loss: Tensor, leaves: Gradients, receive: Receive) -> None:
        """Gives ``receive`` the gradients: that of a large parameter as soon as the backward has made it, so that the
        gradient never exists as a whole (one copy of the parameters less at the peak), and those of the small ones in
        one call. With free gates a parameter may have none."""
        made: set[str] = set()

        # The hook may not hold `leaves`: these hold the hook, and would live on until the next garbage collection.
        def at_once(name: str, leaf: Tensor) -> None:
            made.add(name)
            receive({name: _taken(leaf)})

        for name, leaf in leaves.items():
            if leaf.numel() >= LARGE:
                leaf.register_post_accumulate_grad_hook(functools.partial(at_once, name))  # type: ignore[no-untyped-call]
        if leaves:  # and nothing else: the caller's inputs may require a gradient, too
            loss.backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
        rest = {name: _taken(leaf) for name, leaf in leaves.items() if name not in made}
        if rest:
            receive(rest)

    def gradients(self, loss: Tensor, leaves: Gradients) -> Gradients:
        """All gradients at once; 0 for what is not used there."""
        found = dense(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def part(self, x: Tensor) -> Tensor:
        """What this process has of a parameter or its gradient."""
        return x

    def total(self, squares: Tensor) -> Tensor:
        """A sum of squares of this process's parts, of all."""
        return squares


class InPlace(Copies):
    """Shifts the shards of parameters in place, and puts them back from copies whatever is raised in between.

    Copies cannot serve: the forward of ``fully_shard`` gathers the parameters from the shards itself. The step is as
    long in all processes, whatever one of them meets.
    """

    looks = False

    def __init__(self, model: nn.Module, gates: Gates, world: Single) -> None:
        super().__init__(model, gates)
        self.world = world

    @contextmanager
    def at(self, direction: Gradients, length: Tensor | None, names: list[str]) -> Iterator[Moved]:
        """See :meth:`Copies.at`; parameters and buffers are as before on leaving."""
        shards = {name: local_part(self.parameters[name]) for name in direction}
        buffers = dict(self.model.named_buffers())
        before = [(x, x.clone()) for x in (*shards.values(), *buffers.values())]
        try:
            with torch.no_grad():
                for name, buffer in self.gates.buffers.items():  # as the forward at θ found them
                    buffers[name].copy_(buffer)
                if length is not None:
                    add_(list(shards.values()), length, [local_part(direction[name]) for name in shards])
            yield functools.partial(call_model, self.model), {name: self.parameters[name] for name in names}
        finally:
            reshard(self.model)  # what was gathered is of the shifted shards
            with torch.no_grad():
                for x, kept in before:
                    x.copy_(kept)

    def backward(self, loss: Tensor, leaves: Gradients, receive: Receive) -> None:
        """See :meth:`Copies.backward`; all at once."""
        receive(self.gradients(loss, leaves))

    def gradients(self, loss: Tensor, leaves: Gradients) -> Gradients:
        """See :meth:`Copies.gradients`: this process's parts of the sums over all."""
        found = backward(loss, list(leaves.values()), False)
        return {
            name: torch.zeros_like(leaf, requires_grad=False) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }

    def part(self, x: Tensor) -> Tensor:
        """See :meth:`Copies.part`."""
        return local_part(x)

    def total(self, squares: Tensor) -> Tensor:
        """See :meth:`Copies.total`."""
        return self.world.total(squares)


def shift_of(model: nn.Module, gates: Gates, world: Single) -> Copies:
    """The way to shift a model's parameters."""
    return InPlace(model, gates, world) if world.sharded else Copies(model, gates)


def named_inputs(inputs: Inputs) -> Gradients:
    """The tensors of the inputs by position."""
    return {str(i): x for i, x in enumerate(input_tensors(inputs))}


def moving_inputs(inputs: Inputs) -> Gradients:
    """Those that a gradient can be taken in.

    Raises:
        ValueError: there is none.
    """
    found = {name: x for name, x in named_inputs(inputs).items() if x.requires_grad}
    if not found:
        raise ValueError('inputs: expected a floating-point tensor that requires a gradient with wrt="inputs"')
    return found


def shifted_inputs(inputs: Inputs, direction: Gradients, length: Tensor | None) -> Inputs:
    """The inputs at x + length·direction, whose tensors are named by position."""
    position = iter(range(len(input_tensors(inputs))))

    def shift(x: Tensor) -> Tensor:
        d = direction.get(str(next(position)))
        moved = x.detach() if d is None or length is None else torch.addcmul(x.detach(), d, length.to(x.dtype))
        return moved.requires_grad_(x.requires_grad)

    return map_inputs(inputs, shift)  # type: ignore[no-any-return]


def _taken(leaf: Tensor) -> Tensor:
    """The gradient that a backward left, and leaves no longer."""
    grad, leaf.grad = leaf.grad, None
    if grad is None:
        return torch.zeros_like(leaf, requires_grad=False)
    return grad.to_dense() if grad.is_sparse else grad
