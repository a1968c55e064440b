"""What a tape holds: operations by kind, each with its first derivative along a direction and its source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor


class Node:
    """An operation some of whose inputs move; ``weight`` is δ, the gradient of the loss at its output.

    Attributes:
        name: the operation, for messages.
        inputs: the slots of what moves, in the order in which the methods take the derivatives.
    """

    curved = False
    """Whether the operation is neither linear in its inputs nor a product of two of them."""

    wants_weight = False

    def __init__(self, name: str, inputs: Sequence[int]) -> None:
        self.name, self.inputs = name, tuple(inputs)
        self.output, self.dtype = -1, torch.get_default_dtype()
        self.weight: Tensor | None = None

    def first(self, *moving: Tensor) -> Tensor:
        """The derivative of the output."""
        raise NotImplementedError

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        """⟨δ, f″[x′, x′]⟩; called where ``wants_weight`` and δ is not zero."""
        raise NotImplementedError

    def weigh(self, weight: Tensor) -> None:
        """Takes δ, and prepares what is the same for every direction."""
        self.weight = weight

    # Of an operation that is linear in the derivatives of its inputs, and for random directions (taylor/known.py):

    def has_variance(self, place: int, independent: bool) -> bool:
        """Whether :meth:`variance` serves for an input, whose elements may be ``independent`` or not."""
        return False

    def variance(self, place: int, v: Tensor) -> Tensor:
        """The variance of each element of the output if this input alone moves, its elements with variance ``v``."""
        raise NotImplementedError

    def partial(self, places: Sequence[int]) -> Callable[..., Tensor]:
        """The derivative of the output as a function of the derivatives of some inputs, with the others at rest."""
        raise NotImplementedError


class Linear(Node):
    """An operation that is linear (or piecewise linear) in all that moves, jointly.

    Args:
        squares: of an operation of one input each of whose outputs is a multiple of one input element or 0: the map
            with the squares of these factors for factors.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[int],
        function: Callable[..., Tensor],
        squares: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(name, inputs)
        self.first = function  # type: ignore[method-assign]
        self.squares = squares

    def has_variance(self, place: int, independent: bool) -> bool:
        return self.squares is not None

    def variance(self, place: int, v: Tensor) -> Tensor:
        assert self.squares is not None
        return self.squares(v)

    def partial(self, places: Sequence[int]) -> Callable[..., Tensor]:
        return self.first


class Sum(Node):
    """A sum of one or two inputs that move, each with a constant factor, and of what does not move."""

    def __init__(self, name: str, inputs: Sequence[int], factors: Sequence[Any], shape: torch.Size) -> None:
        super().__init__(name, inputs)
        self.factors, self.shape = tuple(factors), shape

    def first(self, *moving: Tensor) -> Tensor:
        return self._sum(moving, self.factors)

    def has_variance(self, place: int, independent: bool) -> bool:
        return True

    def variance(self, place: int, v: Tensor) -> Tensor:
        return self._sum([v], [self.factors[place] ** 2])

    def partial(self, places: Sequence[int]) -> Callable[..., Tensor]:
        factors = [self.factors[place] for place in places]
        return lambda *moving: self._sum(moving, factors)

    def _sum(self, moving: Sequence[Tensor], factors: Sequence[Any]) -> Tensor:
        parts = [t if s == 1 else s * t for t, s in zip(moving, factors, strict=True)]
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return total if total.shape == self.shape else total.expand(self.shape)


class Product(Node):
    """y = a·b + c for a bilinear product; each of the three moves or not, and c may be absent.

    Args:
        slots: those of a, b and c; None for what does not move.
        sums: whether an output is a sum of products of one element of a and one of b each, none of which is in two of
            them, so that the squares of y's factors are the product of the squares. "single": of one such product.
    """

    def __init__(
        self,
        name: str,
        slots: Sequence[int | None],
        product: Callable[..., Tensor],
        a: Tensor,
        b: Tensor,
        sums: bool | Literal["single"],
    ) -> None:
        super().__init__(name, [slot for slot in slots if slot is not None])
        self.product, self.a, self.b, self.sums = product, a, b, sums
        self.roles = [role for role, slot in zip("abc", slots, strict=True) if slot is not None]
        self.wants_weight = self.both_move

    @property
    def both_move(self) -> bool:
        """Whether a and b move, which are then the first two inputs."""
        return self.roles[:2] == ["a", "b"]

    def first(self, *moving: Tensor) -> Tensor:
        # Not a closure that the node keeps: the two would hold each other until the next garbage collection.
        return self._by_role(dict(zip(self.roles, moving, strict=True)), self.a, self.b)

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        assert self.weight is not None
        return 2 * _inner(self.weight, self._by_role({"b": moving[1]}, moving[0], self.b).to(self.weight.dtype))

    def partial(self, places: Sequence[int]) -> Callable[..., Tensor]:
        roles = [self.roles[place] for place in places]

        def derivative(*moving: Tensor) -> Tensor:
            return self._by_role(dict(zip(roles, moving, strict=True)), self.a, self.b)

        return derivative

    def has_variance(self, place: int, independent: bool) -> bool:
        return self.roles[place] == "c" or self.sums == "single" or (self.sums is True and independent)

    def variance(self, place: int, v: Tensor) -> Tensor:
        return self._by_role({self.roles[place]: v}, wide(self.a).square(), wide(self.b).square())

    def _by_role(self, moving: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        tensors = [a, b, *moving.values()]
        if any(x.dtype != a.dtype for x in tensors):  # in the forward, autocast made one of them
            dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
            a, b, moving = a.to(dtype), b.to(dtype), {role: x.to(dtype) for role, x in moving.items()}
        shift = (moving["c"],) if "c" in moving else ()
        if "b" in moving:
            y = self.product(a, moving["b"], *shift)
            return y.add_(self.product(moving["a"], b)) if "a" in moving else y
        return self.product(moving["a"] if "a" in moving else torch.zeros_like(a), b, *shift)


class Elementwise(Node):
    """A smooth function of each element, by its two derivatives."""

    curved = wants_weight = True

    def __init__(self, name: str, inputs: Sequence[int], slope: Tensor, curvature: Tensor) -> None:
        super().__init__(name, inputs)
        self.slope, self.curvature = slope, curvature

    def first(self, *moving: Tensor) -> Tensor:
        return moving[0] * self.slope

    def weigh(self, weight: Tensor) -> None:
        self.weight = self.curvature.mul_(weight)

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        return _inner(self.curvature * moving[0], moving[0])


class Square(Node):
    """A source ⟨weight, x′²⟩ and nothing else: no operation takes its output."""

    wants_weight = True

    def __init__(self, name: str, inputs: Sequence[int], weight: Tensor) -> None:
        super().__init__(name, inputs)
        self.weight, self.dtype = weight, weight.dtype

    def first(self, *moving: Tensor) -> Tensor:
        return moving[0]

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        assert self.weight is not None
        return _inner(self.weight * moving[0], moving[0])


class Softmax(Node):
    """p = softmax(x): p′ = p⊙u with u = x′ − ⟨p, x′⟩, and p″ = p⊙(u² − ⟨p, u²⟩)."""

    curved = wants_weight = True

    def __init__(self, name: str, inputs: Sequence[int], p: Tensor, dim: int) -> None:
        super().__init__(name, inputs)
        self.p, self.dim = p, dim

    def first(self, *moving: Tensor) -> Tensor:
        x = moving[0]
        return self.p * (x - (self.p * x).sum(self.dim, keepdim=True))

    def weigh(self, weight: Tensor) -> None:
        self.weight = self.p * (weight - (self.p * weight).sum(self.dim, keepdim=True))

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        assert self.weight is not None
        u = moving[0] - (self.p * moving[0]).sum(self.dim, keepdim=True)
        return _inner(self.weight * u, u)


class LogSumExp(Node):
    """y = scale·x − shift·log Σ exp x, elementwise or reduced: y″ = −shift·Var_p(x′) in each output of the row.

    Log-softmax has scale 1 and shift 1; logsumexp scale 0 and shift −1.
    """

    curved = wants_weight = True

    def __init__(self, name: str, inputs: Sequence[int], p: Tensor, dim: int, *, log_softmax: bool, keepdim: bool):
        super().__init__(name, inputs)
        self.p, self.dim, self.log_softmax, self.keepdim = p, dim, log_softmax, keepdim

    def _mean(self, x: Tensor) -> Tensor:
        return (self.p * x).sum(self.dim, keepdim=True)

    def first(self, *moving: Tensor) -> Tensor:
        mean = self._mean(moving[0])
        if self.log_softmax:
            return moving[0] - mean
        return mean if self.keepdim else mean.squeeze(self.dim)

    def weigh(self, weight: Tensor) -> None:
        if self.log_softmax:
            self.weight = -weight.sum(self.dim, keepdim=True)
        else:
            self.weight = weight if self.keepdim else weight.unsqueeze(self.dim)

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        assert self.weight is not None
        u = moving[0] - self._mean(moving[0])
        return (self.weight * self._mean(u * u)).sum()


class Normalise(Node):
    """n = (x − mean x)/σ with σ² = mean (x − mean x)² + eps over ``dims``; or, uncentred, n = x/σ.

    With v = x′ (centred) and a = ⟨n, v⟩/size = σ′:  n′ = (v − a n)/σ,  σ″ = (mean v² − a²)/σ,
    n″ = −(σ″ n + 2 a n′)/σ.
    """

    curved = wants_weight = True

    def __init__(self, name: str, inputs: Sequence[int], n: Tensor, rstd: Tensor, dims: list[int], centred: bool):
        super().__init__(name, inputs)
        self.n, self.rstd, self.dims, self.centred = n, rstd, dims, centred

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)

    def _centre(self, x: Tensor) -> Tensor:
        return x - self._mean(x) if self.centred else x

    def first(self, *moving: Tensor) -> Tensor:
        v = self._centre(moving[0])
        return (v - self._mean(self.n * v) * self.n) * self.rstd

    def weigh(self, weight: Tensor) -> None:
        self.weight = weight
        self.along = (weight * self.n).sum(self.dims, keepdim=True)

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        assert self.weight is not None
        v = self._centre(moving[0])
        a = self._mean(self.n * v)
        spread = (self._mean(v * v) - a * a) * self.rstd
        turned = (self.weight * first).sum(self.dims, keepdim=True)
        return -((spread * self.along + 2 * a * turned) * self.rstd).sum()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors of one shape."""
    if a.stride() == b.stride() and a.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 where it is less precise: squares and their sums leave float16's range."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
