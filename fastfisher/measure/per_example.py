"""From a captured forward to the gradients of single examples: norms, inner products and sums, none materialised.

One forward, one backward to the outputs of the layers, and a formula per layer (``engine/layers``): the cost of a
plain forward and backward, and no array of examples x parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.engine.capture import Capture, Part
from fastfisher.engine.completeness import verified_capture
from fastfisher.engine.layers import GRAM_ELEMENTS, Layer, chunks, computing, dots, flat_rows, squares
from fastfisher.engine.one_by_one import Gradients, Reduce, gradients_of_each
from fastfisher.engine.taps import Receive
from fastfisher.inputs import Call, check_examples, differentiable, map_inputs
from fastfisher.slow_path import warn_slow_path

Seen = dict[int, tuple[Tensor, Tensor]]
"""By the id of a layer, what it saw in a forward and a backward: see :meth:`.Layer.seen`."""


class Captured:
    """A batch whose forward was captured, in the mode in which it is measured.

    Args:
        verify: compare the first capture of a model and kind of batch with its ordinary gradient.

    Attributes:
        logits: without their graph.
        examples: how many there are.

    Raises:
        ValueError: there is no example, or the model gives no row of logits for each.
    """

    def __init__(self, model: nn.Module, inputs: Call, names: Iterable[str], verify: bool) -> None:
        self.model, self.inputs = model, map_inputs(inputs, differentiable)
        check_examples(inputs)
        self.capture = (verified_capture if verify else Capture)(model, self.inputs, names)
        self.logits, self.examples = self.capture.logits.detach(), self.capture.examples
        if self.logits.dim() < 1 or len(self.logits) != self.examples:
            raise ValueError(
                f"model: expected logits (N, ..., C) for N = {self.examples} examples, got shape "
                f"{tuple(self.logits.shape)}"
            )

    def zeros(self) -> Tensor:
        """float64[N]."""
        return torch.zeros(self.examples, dtype=torch.float64, device=self.logits.device)

    def pull(self, cotangent: Tensor, receive: Receive, retain_graph: bool = False) -> None:
        """:meth:`.Capture.backward`, after which it is known, and said, which parameters go a slower way.

        Raises:
            ValueError: they cannot, because the forward draws random numbers.
        """
        capture = self.capture
        capture.backward(cotangent, receive, retain_graph=retain_graph)
        if capture.told or not capture.fallbacks:
            return
        capture.told = True
        capture.check_repeatable()
        for reason in dict.fromkeys(capture.fallbacks.values()):
            slow = ", ".join(name for name, why in capture.fallbacks.items() if why == reason)
            warn_slow_path(f"per-example gradients of {slow} take a backward for each example: {reason}")

    def side(self, cotangent: Tensor) -> Side:
        """One backward, and what the layers saw in it; the graph is released."""
        kept: Seen = {}

        def keep(layer: Layer, grad: Tensor) -> None:
            kept[id(layer)] = layer.seen(grad)

        self.pull(cotangent, keep)
        return Side(self, cotangent, kept)

    def squared_norms(self, cotangent: Tensor, retain_graph: bool, with_mean: bool) -> tuple[dict[str, Tensor], float]:
        """One backward: the examples' squared norms by parameter, float64[N]; and, where asked for, ‖mean gradient‖².

        Each is taken as soon as its layer's gradient arrives. What layers of parameters with several uses saw is kept
        until all are there.
        """
        direct, held = self._uses()
        norms = {name: self.zeros() for name in self.capture.parameters}
        squared_totals = dict.fromkeys(self.capture.parameters, 0.0)
        kept: Seen = {}

        def note(layer: Layer, slot: str, name: str, found: Tensor, a: Tensor, d: Tensor) -> None:
            norms[name] += found
            if with_mean:
                squared_totals[name] += float(squares(layer.total(slot, a, d)[None]))

        def receive(layer: Layer, grad: Tensor) -> None:
            slots = direct.get(id(layer), [])
            if slots or id(layer) in held:
                a, d = layer.seen(grad)
                found = layer.squared_norms([slot for slot, _ in slots], a, d)
                for slot, name in slots:
                    note(layer, slot, name, found[slot], a, d)
                if id(layer) in held:
                    kept[id(layer)] = (a, d)

        self.pull(cotangent, receive, retain_graph)
        side = Side(self, cotangent, kept)
        for name, groups in self.capture.apart.items():
            for use in side.uses([group for group in groups if len(group) > 1]):
                found = use.layer.squared_norms([use.slot], use.a, use.d)[use.slot]
                note(use.layer, use.slot, name, found, use.a, use.d)
        totals: Gradients = {}
        for rows, squared in side.made(reduced=lambda made: _squares_of(made, totals if with_mean else None)):
            for name, values in squared.items():
                norms[name][rows] = values
        squared_totals |= {name: float(squares(total[None])) for name, total in totals.items()}
        return norms, sum(squared_totals.values()) / self.examples**2

    def _uses(self) -> tuple[dict[int, list[tuple[str, str]]], set[int]]:
        """By layer, the slots of parameters whose norm is that of one use; and the layers of all other parameters."""
        capture = self.capture
        direct: dict[int, list[tuple[str, str]]] = {}
        held = {id(part.layer) for groups in capture.joint.values() for group in groups for part in group}
        for name, groups in capture.apart.items():
            for group in groups:
                if len(group) == 1:
                    direct.setdefault(id(group[0].layer), []).append((group[0].slot, name))
                else:
                    held.update(id(part.layer) for part in group)
        return direct, held


def _squares_of(gradients: Gradients, totals: Gradients | None) -> Gradients:
    """The squared norm of each example's gradient, by parameter; the gradients are added to ``totals``."""
    if totals is not None:
        for name, g in gradients.items():
            totals[name] = totals.get(name, 0) + g.sum(0)
    if len(next(iter(gradients.values()))) > 1:
        return {name: squares(g) for name, g in gradients.items()}
    each = torch._foreach_norm([flat_rows(computing(g)) for g in gradients.values()])
    return {name: norm.double().square()[None] for name, norm in zip(gradients, each, strict=True)}


@dataclass
class Use:
    """One use of a parameter, or several that one formula serves together, and what its layer saw."""

    layer: Layer
    slot: str
    tensor: Tensor
    a: Tensor
    d: Tensor


@dataclass
class Side:
    """What the layers of a capture saw in one backward; gradients are made a chunk of examples at a time."""

    of: Captured
    cotangent: Tensor
    seen: Seen

    @property
    def capture(self) -> Capture:
        """The capture."""
        return self.of.capture

    def uses(self, groups: list[list[Part]]) -> Iterator[Use]:
        """Those of which a gradient came."""
        for group in groups:
            came = [part for part in group if id(part.layer) in self.seen]
            if came:
                a, d = zip(*(self.seen[id(part.layer)] for part in came), strict=True)
                first = came[0]
                both = (a[0], d[0]) if len(came) == 1 else (torch.cat(a, 1), torch.cat(d, 1))
                yield Use(first.layer, first.slot, first.tensor, *both)

    def inner_products(self, other: Side) -> Tensor:
        """⟨g_i, h_i⟩, float64[N]."""
        total = self.of.zeros()
        alike, rest = self._alike(other)
        for mine, theirs in alike:
            total += mine.layer.inner_products(mine.slot, mine.a, mine.d, theirs.a, theirs.d)
        for (rows, g), (_, h) in zip(self.made(rest), other.made(rest), strict=True):
            for name in g:
                total[rows] += dots(g[name], h[name])
        return total

    def gram(self, other: Side) -> Tensor:
        """⟨g_i, h_j⟩ for all pairs of examples, float64[N, M]."""
        total = self.cotangent.new_zeros(self.capture.examples, other.capture.examples, dtype=torch.float64)
        alike, rest = self._alike(other)
        for mine, theirs in alike:
            total += mine.layer.gram(mine.slot, mine.a, mine.d, theirs.a, theirs.d)
        for rows, g in self.made(rest, GRAM_ELEMENTS):
            for columns, h in other.made(rest, GRAM_ELEMENTS):
                for name in g:
                    if name in h:
                        total[rows, columns] += flat_rows(g[name]).double() @ flat_rows(h[name]).double().mT
        return total

    def totals(self) -> dict[str, Tensor]:
        """The summed gradient of each parameter."""
        found = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.capture.parameters.items()}
        for name, groups in (self.capture.apart | self.capture.joint).items():
            for use in self.uses(groups):
                total = use.layer.total(use.slot, use.a, use.d)
                found[name] += _pull_back(use.tensor, self.capture.parameters[name], total[None])[0]
        for _, gradients in self._each(self.capture.fallbacks):
            for name, g in gradients.items():
                found[name] += g.sum(0)
        return found

    def made(
        self, names: Iterable[str] | None = None, limit: int | None = None, reduced: Reduce | None = None
    ) -> Iterator[tuple[slice, Gradients]]:
        """The gradients of parameters whose parts overlap or that have no formula, some parameters after the other.

        Args:
            names: of which parameters instead.
            limit: how many elements a chunk may have.
            reduced: what to make of each chunk.
        """
        wanted = {*self.capture.joint, *self.capture.fallbacks} if names is None else set(names)
        for name in self.capture.parameters:
            if name in wanted and name not in self.capture.fallbacks:
                leaf = self.capture.parameters[name]
                groups = self.capture.apart.get(name) or self.capture.joint.get(name) or []
                for rows in chunks(self.capture.examples, leaf.numel(), limit):
                    shape = (rows.stop - rows.start, *leaf.shape)
                    total = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
                    for use in self.uses(groups):
                        g = use.layer.gradients(use.slot, use.a[rows], use.d[rows])
                        total += _pull_back(use.tensor, leaf, g)
                    yield rows, {name: total} if reduced is None else reduced({name: total})
        yield from self._each([name for name in self.capture.fallbacks if name in wanted], limit, reduced)

    def _each(
        self, names: Iterable[str], limit: int | None = None, reduced: Reduce | None = None
    ) -> Iterator[tuple[slice, Gradients]]:
        names = list(names)
        if not names:
            return
        batch, start = (self.of.model, self.of.inputs, self.capture.parameters), 0
        for found in gradients_of_each(*batch, names, self.cotangent, limit, reduced):
            count = len(found[names[0]])
            yield slice(start, start + count), found
            start += count

    def _alike(self, other: Side) -> tuple[list[tuple[Use, Use]], list[str]]:
        """Pairs of uses whose inner products add up, and the parameters whose gradients have to be made."""
        pairs: list[tuple[Use, Use]] = []
        rest = []
        for name in self.capture.parameters:
            mine, theirs = self.capture.apart.get(name), other.capture.apart.get(name)
            if mine is None or theirs is None or [_place(g) for g in mine] != [_place(g) for g in theirs]:
                rest.append(name)
                continue
            for one, two in zip(mine, theirs, strict=True):
                pairs += zip(self.uses([one]), other.uses([two]), strict=False)
        return pairs, rest


def _place(group: list[Part]) -> tuple[Any, ...]:
    """Which formula serves for which elements of a parameter."""
    part = group[0]
    return type(part.layer), part.slot, part.tensor.storage_offset(), part.tensor.shape, part.tensor.stride()


def _pull_back(tensor: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    """Gradients in a function of parameters, pulled back to one of them."""
    if tensor is leaf:
        return gradients
    gradients = gradients.to(tensor.dtype)

    def pull(gradient: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            tensor, leaf, gradient, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return gradient.new_zeros(len(gradient), *leaf.shape) if batched and found is None else found

    if len(gradients) > 1:
        try:
            return pull(gradients, True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a function that vmap does not know
            pass
    pulled = [pull(gradient, False) for gradient in gradients]
    return torch.stack([torch.zeros_like(leaf, requires_grad=False) if g is None else g for g in pulled])
