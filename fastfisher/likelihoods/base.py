"""What penalty and measurements have to know of a likelihood, and all that follows from it.

A likelihood is the distribution of a label that the output of a model stands for: it says the loss −log p(y | output)
and its gradient, how labels are drawn, and a square root of the Fisher information of the output. Penalty and
measurements know neither of classes nor of a softmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfisher.ops.sampled import Reduction


@dataclass(frozen=True)
class Signs:
    """Random signs ε in place of labels: int8 of the output's shape, 1 and −1; 0 in the rows that do not count."""

    tensor: Tensor


Chosen = Tensor | Signs
"""Labels that are fixed, so that the loss can be taken at them again, with other parameters."""


class Likelihood(ABC):
    """p(y | output), the same in each row of an output of shape (N, …, *row).

    A row is what one label depends on; the labels of different rows are independent. The loss of an example is the sum
    over its rows, and a mean is one over all rows, as those of PyTorch's losses are. Rows are numbered through the
    output in its order: an output that begins at row ``first`` of a larger one draws what those rows draw there.

    One of your own needs ``nll``, and for labels that are drawn ``draw``, ``root`` or both; ``signs`` where random
    signs are to be penalised. What comes after them follows from these, and is to be overridden where there is a faster
    way or something to refuse.

    Example:
        >>> class Exponential(fastfisher.Likelihood):  # y ~ rate·exp(−rate·y), the output being log(rate)
        ...     def nll(self, output, labels):
        ...         return output.exp() * labels - output
        ...
        ...     def draw(self, output, key, first=0):
        ...         z = fastfisher.Gaussian().draw(torch.zeros_like(output), key, first)  # normal, row by row
        ...         return -torch.special.log_ndtr(z) * (-output).exp()
        ...
        ...     def root(self, output):
        ...         yield torch.ones_like(output)  # the Fisher information of log(rate) is 1
    """

    row_dims: ClassVar[int] = 0
    """How many of the last dimensions are one row: 1 where the last holds the classes, 0 where each element is one."""

    needs_targets: ClassVar[bool] = True
    """Whether the labels "true" have to be given."""

    what: ClassVar[str] = "output"
    """What the values of the output are called in messages."""

    title: ClassVar[str] = "negative log-likelihood"
    """What the loss is called there."""

    natural: bool = False
    """Whether the Hessian of ``nll`` in the output is the Fisher information whatever the label, as it is where the
    output are the natural parameters of an exponential family. The trace of the Gauss-Newton matrix is then Tr(F)."""

    bends: ClassVar[bool] = False
    """Whether the curvature of the loss changes where values of the output change by about 1, as that of a softmax
    does: a finite difference then keeps them from moving far."""

    # ---- what a likelihood says

    @abstractmethod
    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        """−log p(labels | output) of each row, up to a constant, differentiable in the output."""

    def signs(self, output: Tensor, signs: Tensor) -> Tensor:
        """For each row a function of the output whose gradient is Rε: ε the signs of that row, RRᵀ its Fisher
        information F. Over random signs, that has the mean 0 and the covariance F of the gradient at a drawn label."""
        raise self._refusal("rademacher")

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """A label for each row, y ~ p(y | output)."""
        raise self._refusal("sampled")

    def draw_uniform(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """A label for each row, all alike probable whatever the output."""
        raise self._refusal("uniform")

    def root(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_k of the output's shape: in each row Σ_k r_k r_kᵀ is the Fisher information of that row."""
        raise self._refusal("exact")

    def fit(self, output: Tensor, targets: Any, *, name: str = "targets", **how: Any) -> Tensor:
        """The targets as ``nll`` takes them; ``how``: as in :func:`fastfisher.targets.fit`.

        Raises:
            ValueError: they do not fit the output; ``name`` is the argument that is named.
        """
        return check_shape(self, output, targets, name)

    def _refusal(self, labels: str) -> ValueError:
        return ValueError(
            f'labels: got "{labels}", which likelihood={type(self).__name__} has no way to make; see '
            "fastfisher.Likelihood for the method that says it"
        )

    # ---- what follows

    @property
    def distribution(self) -> Likelihood:
        """The distribution alone, without weights of classes and the like, which belong to the loss at targets."""
        return self

    def loss(self, output: Tensor, labels: Chosen, reduction: Reduction = "mean") -> Tensor:
        """``nll``, or ``signs`` at random signs: of each row, its mean over the rows that count, or its sum."""
        each = self.signs(output, labels.tensor) if isinstance(labels, Signs) else self.nll(output, labels)
        return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()

    def draw_signs(self, output: Tensor, key: Tensor, first: int = 0) -> Signs:
        """Independent random signs, to be given to ``loss`` in place of labels."""
        raise self._refusal("rademacher")

    def check(self, output: Tensor) -> None:
        """Raises ValueError where the output has no rows, or none that stand for such a distribution."""
        if output.dim() <= self.row_dims:
            raise ValueError(f"model: expected an output (N, ...), got shape {tuple(output.shape)}")

    def check_drawable(self, output: Tensor) -> None:
        """Raises ValueError where the output has values of which no label can be drawn."""
        if not bool(output.isfinite().all()):
            raise ValueError("model: expected an output of which labels can be drawn, got NaN or inf in it")

    def ignored(self, output: Tensor, targets: Any) -> Tensor | None:
        """Which rows the targets take out of every mean and sum; None where there are none."""
        return None

    def leave_out(self, labels: Chosen, out: Tensor) -> Chosen:
        """The labels, or signs, without the rows in ``out``."""
        if isinstance(labels, Signs):
            return Signs(labels.tensor.masked_fill(self.over_rows(out), 0))
        raise ValueError(f"targets: expected all of them to count, since {type(self).__name__} leaves out no rows")

    def over_rows(self, mask: Tensor) -> Tensor:
        """A mask of rows, in a shape that broadcasts over the output."""
        return mask.reshape(*mask.shape, *(1,) * self.row_dims)

    def shape_of_labels(self, output: Tensor) -> torch.Size:
        """The shape of one label for each row."""
        return output.shape[: output.dim() - self.row_dims]

    def columns(self, output: Tensor) -> int:
        """How many columns ``root`` has for each row."""
        return max(1, output.shape[-1]) if self.row_dims else 1

    def counted(self, output: Tensor, targets: Any) -> int | Tensor:
        """What a mean divides by: how many rows count; a float64 tensor where some may be left out."""
        out = self.ignored(output, targets)
        return self.shape_of_labels(output).numel() if out is None else (~out).sum(dtype=torch.float64)

    def counting(self, targets: Tensor) -> Tensor:
        """Which of targets that are one for each row, before ``fit``, are of rows that count."""
        return torch.ones_like(targets, dtype=torch.bool)

    def counted_targets(self, targets: Tensor, class_dim: int | None) -> float:
        """The same without an output, of targets before ``fit``."""
        return targets.numel()

    def gradient(self, output: Tensor, labels: Chosen) -> Tensor:
        """The gradient in the output of the loss summed over all rows."""
        leaf = output.detach().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.loss(leaf, labels, "sum"), leaf)
        return found

    def drawn_loss(self, output: Tensor, key: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """The loss of each row at labels that are drawn, and the labels."""
        labels = self.draw(output.detach(), key, first)
        return self.loss(output, labels, "none"), labels

    def drawn_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """``gradient`` at labels that are drawn."""
        return self.gradient(output, self.draw(output, key, first))

    def signs_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """``gradient`` at random signs: a cotangent whose covariance is the Fisher information of the output."""
        return self.gradient(output, self.draw_signs(output, key, first))


class Constant:
    """A tensor that a likelihood holds, copied once for each device and dtype: a captured step copies nothing. Where
    its holder has written into it since, the copies follow.

    Args:
        tensor: the tensor.
        name: the argument that it is.

    Raises:
        ValueError: it requires a gradient, which it would never get.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a constant, got a tensor that requires a gradient, which it would not get; give "
                f"{name}.detach(), or train it by a loss= of which it is a part, as a parameter of the model"
            )
        self._tensor, self._written = tensor.detach(), self._writes(tensor)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {(tensor.device, tensor.dtype): self._tensor}

    @staticmethod
    def _writes(tensor: Tensor) -> int:
        return 0 if tensor.is_inference() else tensor._version

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the device of ``x``, in its dtype or another."""
        place, written = (x.device, dtype or x.dtype), self._writes(self._tensor)
        if written != self._written:
            self._written = written
            for copied in self._copies.values():
                if copied is not self._tensor:
                    copied.copy_(self._tensor)
        if place not in self._copies:
            self._copies[place] = self._tensor.to(*place)
        return self._copies[place]


def check_shape(likelihood: Likelihood, output: Tensor, targets: Any, name: str) -> Tensor:
    """The targets, which have to be a tensor of one for each row of the output, on its device.

    A shape that would merely broadcast is refused: (N,) beside (N, 1) makes N² losses of what was meant as N.

    Raises:
        ValueError: they are not; ``name`` is the argument that is named.
    """
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(targets).__name__}")
    if targets.device != output.device:
        raise ValueError(f"{name}: expected a tensor on {output.device}, where the output is, got {targets.device}")
    wanted, shape = tuple(likelihood.shape_of_labels(output)), tuple(targets.shape)
    if shape != wanted:
        hint = ""
        if (*shape, 1) == wanted:
            hint = f"; give {name}.unsqueeze(-1), or let the model return its output without the last dimension"
        elif shape == (*wanted, 1):
            hint = f"; give {name}.squeeze(-1)"
        elif len(shape) == 1 and len(wanted) == 2 and not targets.is_floating_point():
            hint = f"; class indices of one label each are for likelihood={'categorical'!r}"
        raise ValueError(f"{name}: expected shape {wanted}, one for each row of the output, got {shape}{hint}")
    return targets
