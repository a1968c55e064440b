"""What the mean of a source holds that no direction is needed for: the share of a layer's own parameters.

Take y = f(x) of each element, after a layer x = a·W + b. The derivative of x along z is x′ = own + up, with
own = a·z_W + z_b by the layer's own parameters and up = a′·W by those before it. The elements of z are independent, of
mean 0 and of variance 1, so own and up are uncorrelated wherever W and b play no part in a, and

    E⟨δ f″, x′²⟩ = ⟨δ f″, E[own²]⟩ + E⟨δ f″, up²⟩,        E[own²] = a²·1 + 1        (the last 1 where there is a bias),

the first of which is computed once, exactly. Directions serve for the second alone, and after the first layer, where up
is 0, for nothing. What selects, moves or scales elements (a reshape, BatchNorm in eval mode, adding a bias) may stand
between the layer and f: it does the same to own and up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfisher.engine.taylor.nodes import Elementwise, Linear, Node, Product, Square, wide


def take_out_own(
    nodes: Sequence[Node], parameters: Sequence[Tensor], reached: dict[int, int], count: int
) -> tuple[list[Node], list[Tensor]]:
    """Operations whose sources have the mean that those of ``nodes`` have, together with the constants returned.

    Args:
        nodes: in the order of the forward, with δ; the slots of ``parameters`` are the first.
        reached: by slot, the parameters on which it depends, as a set of bits.
        count: how many slots there are.
    """
    split = _Split(nodes, parameters, reached, count)
    constants, squares = [], {}
    for node in nodes:
        if isinstance(node, Elementwise) and node.wants_weight and split.own[node.inputs[0]]:
            assert node.weight is not None
            variance, up = split(node.inputs[0])
            constants.append((node.weight * variance).sum(dtype=torch.float64))
            node.wants_weight = False
            if up is not None:
                squares[node.output] = Square(node.name, [up], node.weight)
    after: list[Node] = []
    for node in nodes:
        if node.output in split.up_nodes:
            after.append(split.up_nodes[node.output])
        after.append(split.instead.get(node.output, node))
        if node.output in squares:
            after.append(squares[node.output])
            squares[node.output].output = split.new_slot()
    return after, constants


class _Split:
    """x′ = own + up by slot: the variance of own, and the slot of up.

    Attributes:
        own: by slot, the parameters that own depends on, as a set of bits, none of which up depends on.
        up_nodes: by slot, the operation that gives up, which goes before the one that gives x′.
        instead: by slot, what gives x′ from up, for no more than the operation itself costs.
    """

    def __init__(
        self, nodes: Sequence[Node], parameters: Sequence[Tensor], reached: dict[int, int], count: int
    ) -> None:
        self.parameters, self.count = parameters, count
        self.producers = {node.output: node for node in nodes}
        self.own = {slot: 1 << slot for slot in range(len(parameters))}
        self.places: dict[int, list[int]] = {}  # by slot, the inputs whose own parts are in its own
        self.has_up: set[int] = set()
        self.up_nodes: dict[int, Node] = {}
        self.instead: dict[int, Node] = {}
        for node in nodes:
            places = [place for place in range(len(node.inputs)) if self._stands_alone(node, place, reached)]
            if isinstance(node, Product) and [node.roles[place] for place in places] == ["c"] != node.roles:
                places = []  # taking own apart would cost one more product for every direction
            self.places[node.output] = places
            self.own[node.output] = functools.reduce(int.__or__, (self.own[node.inputs[i]] for i in places), 0)
            if len(places) < len(node.inputs) or any(slot in self.has_up for slot in node.inputs):
                self.has_up.add(node.output)

    def _stands_alone(self, node: Node, place: int, reached: dict[int, int]) -> bool:
        """Whether the own part of an input goes on as one, uncorrelated with what comes by the other inputs."""
        slot = node.inputs[place]
        if not (self.own[slot] and node.has_variance(place, slot < len(self.parameters))):
            return False
        return not any(self.own[slot] & reached[other] for i, other in enumerate(node.inputs) if i != place)

    def new_slot(self) -> int:
        self.count += 1
        return self.count - 1

    def __call__(self, slot: int) -> tuple[Tensor, int | None]:
        """The variance of own, by element, and the slot of up; None where nothing else moves x."""
        wanted, stack = set(), [slot]
        while stack:
            wanted.add(last := stack.pop())
            if last >= len(self.parameters):
                stack += [self.producers[last].inputs[place] for place in self.places[last]]
        variances: dict[int, Tensor] = {}
        for part in sorted(wanted):
            if part < len(self.parameters):
                variances[part] = torch.ones_like(wide(self.parameters[part].detach()))
                continue
            node = self.producers[part]
            found = [node.variance(place, variances.pop(node.inputs[place])) for place in self.places[part]]
            variances[part] = functools.reduce(torch.add, found)
            if part in self.has_up and part not in self.up_nodes:
                self._add_up(part)
        return variances[slot], self.up_nodes[slot].output if slot in self.has_up else None

    def _add_up(self, slot: int) -> None:
        node, taken = self.producers[slot], self.places[slot]
        rest = [place for place in range(len(node.inputs)) if place not in taken or node.inputs[place] in self.has_up]
        inputs = [self.up_nodes[node.inputs[i]].output if i in taken else node.inputs[i] for i in rest]
        up = self.up_nodes[slot] = Linear(node.name, inputs, node.partial(rest))
        up.output, up.dtype = self.new_slot(), node.dtype
        if isinstance(node, Product) and not node.wants_weight and not set(rest) & set(taken):
            by_own = node.partial(taken)
            slots = [*(node.inputs[place] for place in taken), up.output]
            whole = self.instead[slot] = Linear(node.name, slots, lambda *t: by_own(*t[:-1]).add_(t[-1]))
            whole.output, whole.dtype = slot, node.dtype
