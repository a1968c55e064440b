"""What a formula is, and where the examples are in a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""How many elements of per-example gradients may exist at once, where a formula has to make them."""

GRAM_ELEMENTS = 1 << 24
"""The same for each of the two sides of a Gram matrix: the larger, the fewer times a gradient is made again."""


@dataclass(frozen=True)
class Layout:
    """Where ``examples`` examples are in a tensor: along ``dim``, each with ``repeat`` neighbouring rows.

    With ``inner`` the example is the fast index of that dimension (row = position·examples + example), as in the
    flattened (positions, examples, features) of attention.
    """

    examples: int
    dim: int
    repeat: int = 1
    inner: bool = False

    def split(self, x: Tensor) -> Tensor:
        """``x`` with its examples in front: [examples, repeat, the other dimensions], repeat left out where it is 1."""
        if self.repeat == 1:
            return x.movedim(self.dim, 0)
        if self.inner:
            return _unflatten(x, self.dim, self.repeat, self.examples).movedim(self.dim + 1, 0)
        return _unflatten(x, self.dim, self.examples, self.repeat).movedim(self.dim, 0)

    @staticmethod
    def between(
        full: Tensor, part: Tensor, examples: int, few: int, leading: int, *, compared: bool = False
    ) -> Layout | None:
        """The layout of ``full``, given the same tensor ``part`` for the first ``few`` examples alone; or None.

        Shapes tell which dimension it is, and values which index is the fast one; they are also ``compared`` where
        shapes may agree by chance.
        """
        changed = [d for d in range(full.dim()) if full.shape[d] != part.shape[d]]
        if len(changed) != 1 or changed[0] >= leading:
            return None
        dim = changed[0]
        repeat = full.shape[dim] // examples
        if full.shape[dim] != repeat * examples or part.shape[dim] != repeat * few:
            return None
        if repeat == 1 and not compared:
            return Layout(examples, dim)
        full, part = full.detach(), part.detach()
        if few > examples:  # the probe repeated an example
            few = examples
            outer = part.narrow(dim, 0, repeat * few)
            inner = _unflatten(part, dim, repeat, -1).narrow(dim + 1, 0, few).flatten(dim, dim + 1)
        else:
            outer = inner = part
        matches = []
        for is_inner, expected in ((False, outer), (True, inner)):
            if is_inner:
                rows = _unflatten(full, dim, repeat, examples).narrow(dim + 1, 0, few).flatten(dim, dim + 1)
            else:
                rows = full.narrow(dim, 0, repeat * few)
            difference = (rows.double() - expected.double()).abs().max()
            if difference <= 1e-3 * expected.double().abs().max():
                matches.append(is_inner)
        if repeat == 1:
            return Layout(examples, dim) if matches else None
        return Layout(examples, dim, repeat, matches[0]) if len(matches) == 1 else None


def _unflatten(x: Tensor, dim: int, slow: int, fast: int) -> Tensor:
    return x.reshape(*x.shape[:dim], slow, fast, *x.shape[dim + 1 :])


@dataclass(frozen=True)
class Rows(Layout):
    """Examples whose rows are anywhere: those of a mixture of experts, of packed sequences, of a sorted batch.

    ``index[i]`` has the rows of example i, filled up with the number of a row of zeros behind the last one. The rows
    are the first ``leading`` dimensions, flattened.
    """

    index: Tensor = field(default_factory=lambda: torch.empty(0))
    leading: int = 1

    @staticmethod
    def of(owner: Tensor, examples: int, leading: int) -> Rows:
        """The layout of rows of which row r belongs to example ``owner[r]``, or to none where that is −1."""
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner[owner >= 0], minlength=examples)
        most = int(counts.max())
        index = torch.full((examples, most), len(owner), dtype=torch.int64, device=owner.device)
        order = order[len(owner) - int(counts.sum()) :]
        starts = counts.cumsum(0) - counts
        index[owner[order], torch.arange(len(order), device=owner.device) - starts[owner[order]]] = order
        return Rows(examples, 0, index=index, leading=leading)

    def split(self, x: Tensor) -> Tensor:
        """[examples, rows of an example, the other dimensions]."""
        rows = x.reshape(-1, *x.shape[self.leading :])
        return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[self.index]


class Layer:
    """One call that parameters take part in, with the formulas for their per-example gradients.

    Attributes:
        tensors: the parameters by their role ("weight", "bias", …), as they were passed to the call.
        operand: the argument that holds the examples.
        leading: how many of its dimensions, from the first on, may be the examples'.
        pulls_back: whether the layer knows the gradient of its input itself (:meth:`pull_back`), cheaper than autograd.
        by_rows: whether the formula only needs to know which example each row (the ``leading`` dimensions, flattened)
            belongs to, which the backward can tell; see :class:`Rows`.
        several: whether further arguments may depend on the examples.
        replaces: whether the call is made as it is on one copy of the parameter per example (see expand.py).
        layout: where the examples are; set by the capture.
    """

    by_rows = False
    several = False
    replaces = False
    pulls_back = False
    tensors: dict[str, Tensor]
    operand: Tensor
    leading: int
    layout: Layout

    def __init__(self, operand: Tensor, leading: int, tensors: dict[str, Tensor]) -> None:
        self.operand, self.leading, self.tensors = operand, leading, tensors
        self._version = operand._version

    def accepts(self, layout: Layout) -> bool:
        """Whether the formula can work with examples that lie so."""
        return True

    def output(self) -> Tensor:
        """The call itself, with detached parameters; what it returns is no view."""
        raise NotImplementedError

    def pull_back(self, grad: Tensor) -> Tensor:
        """With ``pulls_back``: the gradient of the input."""
        raise NotImplementedError

    def finish(self, out: Tensor) -> Any:
        """The output in the shape that the caller expects."""
        return out

    def rewritten(self, args: Any) -> Any:
        """With ``replaces``: the arguments of the call, where it is another one with copies of the parameter."""
        return args

    def narrow(self) -> Tensor:
        """With ``replaces``: the part of the parameter that is copied for each example."""
        raise NotImplementedError

    def joins(self, other: Layer) -> bool:
        """Whether what :meth:`seen` gives of another use of the same parameter may be put behind this one's positions.

        Then the formulas serve for both uses together.
        """
        return False

    def check_unchanged(self) -> None:
        """Raises RuntimeError where the input was overwritten between forward and backward."""
        if self.operand._version != self._version:
            raise RuntimeError(
                f"the input of {type(self).__name__} (shape {tuple(self.operand.shape)}) was modified in place after "
                "it was used; per-example gradients need it as it was"
            )

    def release(self) -> None:
        """Lets go of the input; called when no further backward comes."""
        self.operand = self.operand.new_empty(0)
        self._version = 0

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the gradient of the output, examples in front."""
        return self.layout.split(self.operand.detach()), self.layout.split(grad)

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        """The gradient of each example, [n, *shape of the parameter], from rows of what :meth:`seen` gave."""
        raise NotImplementedError

    def squared_norms(self, slots: list[str], a: Tensor, d: Tensor) -> dict[str, Tensor]:
        """‖gradient of example i‖², float64[n], by role: from materialised chunks, unless a layer knows better."""
        return {slot: self.materialised_norms(slot, a, d) for slot in slots}

    def materialised_norms(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        """The same for one role, always from materialised chunks."""
        return torch.cat([squares(self.gradients(slot, a[rows], d[rows])) for rows in self.chunks(slot, len(d))])

    def total(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        """The sum of the gradients of all examples."""
        parts = [self.gradients(slot, a[rows], d[rows]).sum(0) for rows in self.chunks(slot, len(d))]
        return torch.stack(parts).sum(0)

    def inner_products(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        """The inner product of example i's gradient with that of example i in another capture, float64[n]."""
        parts = []
        for rows in self.chunks(slot, len(d)):
            mine, theirs = self.gradients(slot, a[rows], d[rows]), self.gradients(slot, other_a[rows], other_d[rows])
            parts.append(dots(mine, theirs))
        return torch.cat(parts)

    def gram(self, slot: str, a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor) -> Tensor:
        """The inner product of example i's gradient with that of example j in another capture, float64[n, m]."""
        elements = self.tensors[slot].numel()
        found = torch.empty(len(d), len(other_d), dtype=torch.float64, device=d.device)
        for mine in chunks(len(d), elements, GRAM_ELEMENTS):
            rows = self._flat_gradients(slot, a[mine], d[mine])
            for theirs in chunks(len(other_d), elements, GRAM_ELEMENTS):
                found[mine, theirs] = rows @ self._flat_gradients(slot, other_a[theirs], other_d[theirs]).mT
        return found

    def _flat_gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        """float64[n, elements of the parameter]."""
        parts = [self.gradients(slot, a[rows], d[rows]) for rows in self.chunks(slot, len(d))]
        return torch.cat([flat_rows(part).double() for part in parts])

    def chunks(self, slot: str, examples: int) -> Iterator[slice]:
        """Slices of examples whose gradients may exist at once."""
        yield from chunks(examples, self.tensors[slot].numel())


Tracked = Callable[[Tensor], bool]
"""Tells the parameters, and what is computed from them alone, from everything else in a call."""

Binder = Callable[..., Layer | None]
"""``binder(tracked, *args, **kwargs)`` is the formula for a call with these arguments, or None where there is none."""

FORMULAS: dict[Any, Binder] = {}
"""By function of torch, its binder."""


def formula_for(*functions: Any) -> Callable[[Binder], Binder]:
    """Registers a binder for functions of torch; their arguments come in the positions of the signature."""

    def register(binder: Binder) -> Binder:
        FORMULAS.update(dict.fromkeys(functions, binder))
        return binder

    return register


def functions(names: str, *places: Any) -> list[Any]:
    """The functions of these names in ``torch`` and, unless other places are given, in ``Tensor``."""
    return [getattr(place, n) for n in names.split() for place in places or (torch, Tensor) if hasattr(place, n)]


def used(tracked: Tracked, **tensors: Tensor | None) -> dict[str, Tensor]:
    """Of the tensors by role, those that are tracked."""
    return {slot: t for slot, t in tensors.items() if t is not None and tracked(t)}


def depends(tensor: Tensor) -> bool:
    """Whether a tensor met in a capture, and not followed as a parameter, depends on the examples."""
    return tensor.requires_grad or getattr(tensor, "_fastfisher_depends", False)


def chunks(examples: int, elements: int, limit: int | None = None) -> Iterator[slice]:
    """Slices of the examples, each with at most ``limit`` elements (CHUNK_ELEMENTS by default), or a single example."""
    step = max(1, (limit or CHUNK_ELEMENTS) // max(1, elements))
    for start in range(0, examples, step):
        yield slice(start, min(examples, start + step))


def gram_of_positions(
    alike: Callable[[Tensor, Tensor], Tensor], a: Tensor, d: Tensor, other_a: Tensor, other_d: Tensor
) -> Tensor:
    """Σ_{s, t} alike(a_is, a_jt) ⟨d_is, d_jt⟩ over the positions s of example i and t of j, float64[n, m]."""
    positions, others = d.shape[1], other_d.shape[1]
    step = max(1, math.isqrt(CHUNK_ELEMENTS // max(1, positions * others)))
    found = torch.empty(len(d), len(other_d), dtype=torch.float64, device=d.device)
    for i in range(0, len(d), step):
        x, dx = a[i : i + step].flatten(0, 1), d[i : i + step].flatten(0, 1).double()
        for j in range(0, len(other_d), step):
            y, dy = other_a[j : j + step].flatten(0, 1), other_d[j : j + step].flatten(0, 1).double()
            products = (alike(x, y) * (dx @ dy.mT)).view(len(dx) // positions, positions, -1, others)
            found[i : i + step, j : j + step] = products.sum((1, 3))
    return found


def flat_rows(x: Tensor) -> Tensor:
    """x[i] as a vector of real numbers, for each i."""
    return (torch.view_as_real(x) if x.is_complex() else x).reshape(len(x), -1)


def squares(x: Tensor) -> Tensor:
    """The sum of squares of each row x[i], in float64."""
    return flat_rows(computing(x)).square().sum(1, dtype=torch.float64)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each x[i] with y[i], in float64; of complex numbers Re⟨x, y⟩."""
    return (flat_rows(computing(x)) * flat_rows(computing(y))).sum(1, dtype=torch.float64)


def computing(x: Tensor) -> Tensor:
    """``x`` in the precision that formulas compute in: at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
