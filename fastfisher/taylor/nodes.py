"""What a tape holds: operations by kind, each with its first derivative along a direction and its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class Linear(Node):
    """An operation that is linear (or piecewise linear) in all that moves, jointly."""

    def __init__(self, name: str, inputs: Sequence[int], function: Callable[..., Tensor]) -> None:
        super().__init__(name, inputs)
        self.first = function  # type: ignore[method-assign]


class Product(Node):
    """y = a·b + c for a bilinear product; c may be absent, or not move."""

    wants_weight = True

    def __init__(self, name: str, inputs: Sequence[int], product: Callable[..., Tensor], a: Tensor, b: Tensor) -> None:
        super().__init__(name, inputs)
        self.product, self.a, self.b = product, a, b

    def first(self, *moving: Tensor) -> Tensor:
        a, b, *shift = moving
        return self.product(self.a, b, *shift).add_(self.product(a, self.b))

    def source(self, moving: tuple[Tensor, ...], first: Tensor) -> Tensor:
        assert self.weight is not None
        return 2 * _inner(self.weight, self.product(moving[0], moving[1]))


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
