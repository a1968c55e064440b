"""R as a function of the norm of the gradient: its square, as in the paper, or another.

Whatever the function φ, ∇R is a product of the Hessian and one direction: of a norm n = ‖g‖ it is φ'(n) H g/n, which is
φ'(n)/(2n) times that of the square. A finite difference along that direction serves for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfisher.host import looking_waits

NAMES: dict[str, Callable[[Tensor], Tensor]] = {"squared_norm": torch.square, "norm": lambda norm: norm}


@dataclass(frozen=True)
class OfNorm:
    """φ, element by element.

    Attributes:
        of: a name, or a function of a tensor of norms.

    Raises:
        ValueError: it is neither.
    """

    of: str | Callable[[Tensor], Tensor] = "squared_norm"

    def __post_init__(self) -> None:
        if not (callable(self.of) or (isinstance(self.of, str) and self.of in NAMES)):
            names = ", ".join(f'"{name}"' for name in NAMES)
            raise ValueError(f"of: expected {names} or a function of a tensor of norms, got {self.of!r}")

    @property
    def squared(self) -> bool:
        """Whether it is the square, whose gradient needs no norm."""
        return self.of == "squared_norm"

    def __call__(self, norms: Tensor) -> Tensor:
        """φ(n) of each.

        Raises:
            ValueError: the function does not give one number for each norm.
        """
        found: Any = NAMES[self.of](norms) if isinstance(self.of, str) else self.of(norms)
        if not (isinstance(found, Tensor) and found.shape == norms.shape and found.is_floating_point()):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"of: expected a function that gives one number for each norm {tuple(norms.shape)}, got {got}"
            )
        if norms.requires_grad and not found.requires_grad:
            raise ValueError("of: expected a function that depends on the norm, got one whose value has no gradient")
        if not isinstance(self.of, str) and norms.numel() > 1 and not looking_waits(norms):
            self._check_alone(norms.detach(), found.detach())
        return found

    def _check_alone(self, norms: Tensor, found: Tensor) -> None:
        """Raises ValueError where φ of one norm is another beside others."""
        with torch.no_grad():
            alone: Any = self.of(norms[:1])  # type: ignore[operator]
        if not torch.allclose(alone, found[:1], rtol=1e-3, equal_nan=True):
            raise ValueError(
                f"of: expected a function of each norm by itself, got one that is {float(alone):g} of a norm alone and "
                f"{float(found[0]):g} beside others, as with a mean or a maximum in it"
            )

    def gain(self, norms: Tensor) -> Tensor:
        """φ'(n)/(2n) of each, 0 where n is: what the gradient of the square is multiplied by."""
        leaf = norms.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self(leaf).sum(), leaf)
        return torch.where(norms > 0, slope / (2 * norms), 0.0)


SQUARED = OfNorm()


def norm_of(squared: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def norms_by_example(gradients: dict[str, Tensor], examples: int) -> Tensor:
    """The norm of each example's part of gradients in inputs, (N,), differentiable.

    Raises:
        ValueError: an input is shared by all examples, and its gradient belongs to none.
    """
    for name, g in gradients.items():
        if g.dim() == 0 or len(g) != examples:
            raise ValueError(
                f"of: expected inputs of which each example has its own, got input {name} of shape {tuple(g.shape)} "
                f"for {examples} examples; expand what they share, or leave it out by requires_grad"
            )
    return norm_of(
        torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in gradients.values()]).sum(0)
    )
