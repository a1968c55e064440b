"""Likelihoods: which distribution of a label the output of a model stands for.

All that penalty and measurements have to know of it is here: the loss −log p(y | output) and its gradient, how labels
are drawn, and a square root of the Fisher information of the output. They know neither of classes nor of a softmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.model import as_given
from fastfisher.ops import reference
from fastfisher.ops.sampled import sample_cross_entropy
from fastfisher.targets import IGNORED, check_classes, check_range, count_targets, fit, ignored

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Signs:
    """Random signs ε in place of labels: int8 of the output's shape, 1 and −1; 0 in the rows that do not count."""

    tensor: Tensor


Chosen = Tensor | Signs
"""Labels that are fixed, so that the loss can be taken at them again, with other parameters."""


class Likelihood(ABC):
    """p(y | output), the same in each row of an output of shape (N, …, *row).

    A row is what one label depends on; the labels of different rows are independent. Rows are numbered through the
    output in its order: an output that begins at row ``first`` of a larger one draws what those rows draw there.

    A likelihood has to say ``fit`` and ``loss``; and, where it serves the labels "sampled", "uniform", "rademacher" and
    "exact", ``draw``, ``draw_uniform``, ``draw_signs`` and ``root``. What comes after them follows from these, and is
    to be overridden where there is a faster way or something to refuse.
    """

    row_dims: ClassVar[int] = 0
    """How many of the last dimensions are one row: 1 where the last holds the classes, 0 where each element is one."""

    needs_targets: ClassVar[bool] = True
    """Whether the labels "true" have to be given."""

    @abstractmethod
    def fit(self, output: Tensor, targets: Any, **how: Any) -> Tensor:
        """The targets as ``loss`` takes them; ``how``: as in :func:`fastfisher.targets.fit`.

        Raises:
            ValueError: they do not fit the output.
        """

    @abstractmethod
    def loss(self, output: Tensor, labels: Chosen, reduction: Reduction = "mean") -> Tensor:
        """−log p(labels | output) for each row, or its mean over the rows that count, or its sum.

        At signs ε it is a function of the output whose gradient is Rε, F = RRᵀ the Fisher information of the output:
        over random signs, that has the mean 0 and the covariance F of the gradient at a drawn label.
        """

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """A label for each row, y ~ p(y | output)."""
        raise self._refusal("sampled")

    def draw_uniform(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """A label for each row, all alike probable whatever the output."""
        raise self._refusal("uniform")

    def draw_signs(self, output: Tensor, key: Tensor, first: int = 0) -> Signs:
        """Independent random signs, to be given to ``loss`` in place of labels."""
        raise self._refusal("rademacher")

    def root(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_k of the output's shape: in each row Σ_k r_k r_kᵀ is the Fisher information of that row."""
        raise self._refusal("exact")

    def _refusal(self, labels: str) -> ValueError:
        return ValueError(f'labels: got "{labels}", which {type(self).__name__} has none of')

    # ---- what follows

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

    def counted(self, output: Tensor, targets: Any) -> int | Tensor:
        """How many rows a mean is over; a float64 tensor where some may be left out."""
        out = self.ignored(output, targets)
        return self.shape_of_labels(output).numel() if out is None else (~out).sum(dtype=torch.float64)

    def counted_targets(self, targets: Tensor, class_dim: int | None) -> int:
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


class Categorical(Likelihood):
    """y ~ softmax(logits), the classes along the last dimension; the loss is the cross-entropy.

    Labels are class indices (−100 in a row that does not count) or class probabilities.
    """

    row_dims = 1

    def fit(self, output: Tensor, targets: Any, **how: Any) -> Tensor:
        return fit(output, targets, **how)

    def loss(self, output: Tensor, labels: Chosen, reduction: Reduction = "mean") -> Tensor:
        """The cross-entropy; at signs ε 2⟨√p, ε⟩, whose gradient in the logits is √p⊙ε − p⟨√p, ε⟩.

        Raises:
            ValueError: a label is no class, on the CPU.
        """
        rows, shape = output.reshape(-1, output.shape[-1]), self.shape_of_labels(output)
        if isinstance(labels, Signs):
            signs = labels.tensor.reshape(rows.shape)
            products = (rows.log_softmax(-1) / 2).exp() * signs
            if reduction == "none":
                return 2 * products.sum(-1).view(shape)
            total = 2 * products.sum()
            return total / (signs[:, :1] != 0).sum() if reduction == "mean" else total
        given = labels.reshape(rows.shape if labels.is_floating_point() else -1)
        try:
            found = F.cross_entropy(rows, given, reduction=reduction)
        except IndexError:  # on a GPU the device asserts
            check_range(labels, rows.shape[1], "targets")
            raise
        return found.view(shape) if reduction == "none" else found

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        return self.drawn_loss(output, key, first)[1]

    def draw_uniform(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        return self.draw(torch.zeros_like(output), key, first)

    def draw_signs(self, output: Tensor, key: Tensor, first: int = 0) -> Signs:
        signs = reference.rademacher_signs(output[..., 0].numel(), output.shape[-1], key, first)
        return Signs(signs.view(output.shape).to(output.device))

    def root(self, output: Tensor) -> Iterator[Tensor]:
        """The columns of a square root of diag(p) − ppᵀ = √p (I − uuᵀ) √p, u = √p.

        The Householder reflection that takes u to −e_C has C − 1 further columns, which span what is orthogonal to u:
        one fewer than there are classes.
        """
        u = output.softmax(-1).sqrt()
        shifted = u.clone()
        shifted[..., -1] += 1
        factor = u * shifted / shifted[..., -1:]
        for k in range(u.shape[-1] - 1):
            column = -factor * u[..., k : k + 1]
            column[..., k] += u[..., k]
            yield column

    def check(self, output: Tensor) -> None:
        super().check(output)
        check_classes(output)

    def check_drawable(self, output: Tensor) -> None:
        if bool((output.isnan() | (output == torch.inf)).any()):  # −inf is a class that is ruled out
            raise ValueError("model: expected logits of which labels can be drawn, got NaN or +inf among them")

    def ignored(self, output: Tensor, targets: Any) -> Tensor | None:
        return ignored(output, targets)

    def leave_out(self, labels: Chosen, out: Tensor) -> Chosen:
        if isinstance(labels, Signs):
            return super().leave_out(labels, out)
        if labels.is_floating_point():
            raise ValueError("targets: expected none of -100 beside labels that are probabilities")
        return labels.masked_fill(out, IGNORED)

    def counted_targets(self, targets: Tensor, class_dim: int | None) -> int:
        return count_targets(targets, class_dim)

    def drawn_loss(self, output: Tensor, key: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        return sample_cross_entropy(output, key=key, first=first, reduction="none", class_dim=-1)

    def drawn_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """softmax(logits) − onehot(ŷ)."""
        rows = output.reshape(-1, output.shape[-1])
        return ops.sample_cross_entropy(rows, key, 1.0, first)[2].view(output.shape)

    def signs_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """√p⊙ε − p⟨√p, ε⟩."""
        rows = output.reshape(-1, output.shape[-1])
        return ops.rademacher_cotangent(rows, key, 1.0, first).view(output.shape)


CATEGORICAL = Categorical()

EachLoss = Callable[[Tensor, Any], Tensor]
"""A loss of the caller's: of logits, as the model gives them, and targets, one value for each example (N,)."""


class CallersLoss(Likelihood):
    """A loss of the caller's, with targets of any kind or none. It says nothing of a distribution."""

    needs_targets = False

    def __init__(self, each: EachLoss, class_dim: int | None) -> None:
        self.each, self.class_dim = each, class_dim

    def fit(self, output: Tensor, targets: Any, **how: Any) -> Any:
        return targets

    def loss(self, output: Tensor, labels: Any, reduction: Reduction = "sum") -> Tensor:
        each = self.each(as_given(output, self.class_dim), labels)
        if not isinstance(each, Tensor) or not each.requires_grad:
            raise ValueError("loss: expected a tensor that depends on the logits, one value per example")
        if each.shape != output.shape[:1]:
            raise ValueError(f"loss: expected one value per example ({len(output)},), got {tuple(each.shape)}")
        return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
