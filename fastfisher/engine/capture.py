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
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfisher.engine.checkpointing import graph_nodes, refuse_recomputed
from fastfisher.engine.layers import Layer
from fastfisher.engine.random_state import RandomState
from fastfisher.engine.row_owners import RowOwners
from fastfisher.engine.taps import Receive
from fastfisher.engine.watching import Known, Watch
from fastfisher.inputs import Inputs, count_examples
from fastfisher.model import call_within, uncompiled


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
        layers: the calls that have a formula, in order.
        apart: by name, the parts that make up a parameter without overlap, each a list of uses that one formula serves
            together (a layer that is called at every time step): squared norms add up over the parts.
        joint: by name, the uses of a parameter through functions of parameters or with several formulas, in lists like
            those of ``apart``: their per-example gradients must be added before they are squared.
        fallbacks: by name, why nothing here can follow a parameter. The first backward may add to it.
        told: whether the caller has already told the user of the fallbacks.
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
        self.known = known or Known()
        self.told = False
        before = RandomState.on_devices_of(found.values())
        watch = Watch(model, inputs, self.parameters, self.known)
        with torch.enable_grad(), uncompiled(model, "the measurement"):
            self.logits = call_within(model, buffers | others | self.parameters, watch.run)
        self.random = before.has_moved()
        self.layers, self.fallbacks = watch.layers, watch.fallbacks
        self._unplaced, self._anchor, self._receiver = watch.unplaced, watch.anchor, watch.receiver
        for node in graph_nodes(self.logits):
            refuse_recomputed(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in watch.names:
                reason = "it is used where no call can be seen, as in a custom autograd.Function"
                self.fallbacks.setdefault(watch.names[id(variable)], reason)
        if self._receiver.strayed:
            reason = "a gradient is taken within the forward, of which it is a part"
            self.fallbacks.update(dict.fromkeys(self.parameters, reason))
        self.parts = self._parts(watch)
        self.apart, self.joint = self._plan()

    def backward(self, cotangent: Tensor, receive: Receive, *, retain_graph: bool = False) -> None:
        """Pulls ``cotangent`` (shaped as the logits) back; ``receive(layer, gradient of its output)`` as it comes.

        The first backward finds the examples of layers whose rows may be anywhere, which takes another one, and two
        where further ones are to come; it may add to ``fallbacks``.
        """
        waiting, self._unplaced = self._unplaced, []
        if (
            waiting and retain_graph
        ):  # with a cotangent without zeros: in this one a row's gradient may be 0 that is not in the next
            self._place(waiting, random_cotangent(self.logits), lambda layer, grad: None)
        elif waiting:
            self._place(waiting, cotangent, receive)
            return
        self._pull(cotangent, receive, retain_graph)

    def _pull(self, cotangent: Tensor, receive: Receive, retain_graph: bool) -> None:
        if not self.logits.requires_grad:
            return  # no parameter that could be followed takes part
        self._receiver.function, self._receiver.retain = receive, retain_graph
        try:
            with torch.enable_grad():  # differentiate a scalar: grad_outputs= would import sympy (30 MB, a second)
                total = (self.logits * cotangent).sum()
            torch.autograd.grad(total, self._anchor, retain_graph=retain_graph, allow_unused=True)
        finally:
            self._receiver.function = None

    def check_repeatable(self) -> None:
        """Raises ValueError where parameters have no formula and the forward draws random numbers.

        They take a forward for each example, which would draw others.
        """
        if self.random and self.fallbacks:
            raise ValueError(
                f"model: expected a forward without random numbers, as {named(self.fallbacks)} have no formula and "
                "take a forward for each example, which would draw others; got one that draws (dropout in eval mode?)"
            )

    def _parts(self, watch: Watch) -> dict[str, list[Part]]:
        """By name, the uses of each parameter: those of the tensors whose graphs lead to it."""
        parts: dict[str, list[Part]] = {name: [] for name in self.parameters}
        sources: dict[int, list[str]] = {}
        for layer in self.layers:
            for slot, tensor in layer.tensors.items():
                if id(tensor) not in sources:
                    sources[id(tensor)] = watch.sources(tensor)
                for name in sources[id(tensor)]:
                    parts[name].append(Part(layer, slot, tensor))
        return parts

    def _place(self, unplaced: list[list[Layer]], cotangent: Tensor, receive: Receive) -> None:
        """A backward that also finds which example each row of some layers belongs to."""
        owners = RowOwners(unplaced, self.examples)
        for layers in owners.find(cotangent, lambda scaled, receive: self._pull(scaled, receive, True), receive):
            self._without(layers)

    def _plan(self) -> tuple[dict[str, list[list[Part]]], dict[str, list[list[Part]]]]:
        apart: dict[str, list[list[Part]]] = {}
        joint: dict[str, list[list[Part]]] = {}
        for name, leaf in self.parameters.items():
            if name not in self.fallbacks:
                groups = _together(self.parts[name])
                (apart if _disjoint(leaf, [group[0].tensor for group in groups]) else joint)[name] = groups
        return apart, joint

    def _without(self, layers: list[Layer]) -> None:
        """Takes the parameters of some layers for those without a formula."""
        numbers = {id(layer) for layer in layers}
        names = [name for name, parts in self.parts.items() if any(id(part.layer) in numbers for part in parts)]
        reason = f"rows of a {type(layers[0]).__name__} belong to several examples"
        self.fallbacks.update(dict.fromkeys(names, reason))
        self.apart, self.joint = self._plan()


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
