"""One of several classes: a softmax over logits and the cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.checks import is_number
from fastfisher.host import looking_waits
from fastfisher.likelihoods.base import Chosen, Constant, Likelihood, Signs
from fastfisher.ops import reference
from fastfisher.ops.sampled import Reduction, sample_cross_entropy
from fastfisher.targets import IGNORED, check_classes, check_range, count_targets, fit, ignored


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """y ~ softmax(logits), the classes along the last dimension (or ``class_dim=``); the loss is the cross-entropy.

    Labels are class indices, or class probabilities. Weights and smoothing are those of ``F.cross_entropy``: they
    belong to the loss at targets, the training loss and the labels "true" among them, and have no part in labels that
    are drawn: the distribution that the logits stand for, and its Fisher matrix, are without them.

    Args:
        weight: (C,), the weight of each class in the loss at targets; a mean is one over these weights.
        label_smoothing: the part s in [0, 1] of each target that is spread evenly over all classes.
        ignore_index: the target of a row that does not count.

    Raises:
        ValueError: an argument is none of these; it is named.
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = IGNORED

    _weights: Constant | None = field(init=False, repr=False)

    row_dims: ClassVar[int] = 1
    what: ClassVar[str] = "logits"
    title: ClassVar[str] = "cross-entropy"
    bends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        w, s = self.weight, self.label_smoothing
        if w is not None and not (isinstance(w, Tensor) and w.dim() == 1 and w.is_floating_point()):
            got = f"{w.dtype} of shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"weight: expected a floating-point tensor (C,) or None, got {got}")
        if w is not None and not bool((w.isfinite() & (w >= 0)).all()):
            raise ValueError(f"weight: expected finite weights >= 0, got {w.tolist()}")
        if not (is_number(s) and 0 <= s <= 1):
            raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {s!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index: expected an integer, got {self.ignore_index!r}")
        object.__setattr__(self, "_weights", None if w is None else Constant(w, "weight"))

    @property
    def natural(self) -> bool:  # type: ignore[override]
        """See :class:`Likelihood`: the Hessian is diag(p) − ppᵀ times the weight of the target."""
        return self.weight is None

    @property
    def distribution(self) -> Likelihood:
        """See :meth:`.Likelihood.distribution`."""
        return CATEGORICAL

    def fit(self, output: Tensor, targets: Any, *, name: str = "targets", **how: Any) -> Tensor:
        """Class indices with −100 in the rows that do not count, or class probabilities, the classes last."""
        if self.weight is not None and len(self.weight) != output.shape[-1]:
            raise ValueError(f"weight: expected one for each of {output.shape[-1]} classes, got {len(self.weight)}")
        marked = self.ignore_index != IGNORED and isinstance(targets, Tensor) and not targets.is_floating_point()
        if marked:
            out = targets == self.ignore_index
            if not looking_waits(targets):
                check_range(targets.masked_fill(out, 0), output.shape[-1], name, IGNORED - 1)
            # Who has another mark does not mean −100 by it: it is as wrong as any other number that is no class.
            targets = targets.long().masked_fill(targets == IGNORED, IGNORED - 1).masked_fill(out, IGNORED)
        return fit(output, targets, name=name, **how)

    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of each row; see ``loss``."""
        return self.loss(output, labels, "none")

    def signs(self, output: Tensor, signs: Tensor) -> Tensor:
        """2⟨√p, ε⟩, whose gradient in the logits is √p⊙ε − p⟨√p, ε⟩."""
        return 2 * ((output.log_softmax(-1) / 2).exp() * signs).sum(-1)

    def loss(self, output: Tensor, labels: Chosen, reduction: Reduction = "mean") -> Tensor:
        """See :meth:`.Likelihood.loss`; one call of PyTorch's own, which reduces as it goes.

        Raises:
            ValueError: a label is no class, on the CPU.
        """
        rows, shape = output.reshape(-1, output.shape[-1]), self.shape_of_labels(output)
        if isinstance(labels, Signs):
            signs = labels.tensor.reshape(rows.shape)
            each = self.signs(rows, signs)
            if reduction == "none":
                return each.view(shape)
            return each.sum() / (signs[:, :1] != 0).sum() if reduction == "mean" else each.sum()
        given = labels.reshape(rows.shape if labels.is_floating_point() else -1)
        weight = None if self._weights is None else self._weights.like(rows)
        try:
            found = F.cross_entropy(
                rows, given, weight=weight, label_smoothing=self.label_smoothing, reduction=reduction
            )
        except IndexError:  # on a GPU the device asserts
            check_range(labels, rows.shape[1], "targets")
            raise
        return found.view(shape) if reduction == "none" else found

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """See :meth:`.Likelihood.draw`."""
        return self.drawn_loss(output, key, first)[1]

    def draw_uniform(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """See :meth:`.Likelihood.draw_uniform`."""
        return self.draw(torch.zeros_like(output), key, first)

    def draw_signs(self, output: Tensor, key: Tensor, first: int = 0) -> Signs:
        """See :meth:`.Likelihood.draw_signs`."""
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
        for k in range(self.columns(u)):
            column = -factor * u[..., k : k + 1]
            column[..., k] += u[..., k]
            yield column

    def columns(self, output: Tensor) -> int:
        """See :meth:`.Likelihood.columns`."""
        return output.shape[-1] - 1

    def check(self, output: Tensor) -> None:
        """See :meth:`.Likelihood.check`."""
        super().check(output)
        check_classes(output)

    def check_drawable(self, output: Tensor) -> None:
        """See :meth:`.Likelihood.check_drawable`; −inf is a class that is ruled out."""
        if bool((output.isnan() | (output == torch.inf)).any()):
            raise ValueError("model: expected logits of which labels can be drawn, got NaN or +inf among them")

    def ignored(self, output: Tensor, targets: Any) -> Tensor | None:
        """See :meth:`.Likelihood.ignored`."""
        return ignored(output, targets)

    def leave_out(self, labels: Chosen, out: Tensor) -> Chosen:
        """See :meth:`.Likelihood.leave_out`."""
        if isinstance(labels, Signs):
            return super().leave_out(labels, out)
        if labels.is_floating_point():
            raise ValueError("targets: expected none of -100 beside labels that are probabilities")
        return labels.masked_fill(out, IGNORED)

    def counted(self, output: Tensor, targets: Any) -> int | Tensor:
        """See :meth:`.Likelihood.counted`; with weights, those of the targets' classes."""
        if self._weights is None or not isinstance(targets, Tensor) or targets.is_floating_point():
            return super().counted(output, targets)
        weights = self._weights.like(output, torch.float64)
        return weights[targets.clamp(min=0)].masked_fill(targets == IGNORED, 0).sum()

    def counting(self, targets: Tensor) -> Tensor:
        """See :meth:`.Likelihood.counting`."""
        return targets != self.ignore_index

    def counted_targets(self, targets: Tensor, class_dim: int | None) -> float:
        """See :meth:`.Likelihood.counted_targets`."""
        if targets.is_floating_point():
            return count_targets(targets, class_dim)
        counting = self.counting(targets)
        if self._weights is None:
            return int(counting.sum())
        weights = self._weights.like(targets, torch.float64)
        return float(weights[targets[counting].long().clamp(0, len(weights) - 1)].sum())

    def drawn_loss(self, output: Tensor, key: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """See :meth:`.Likelihood.drawn_loss`."""
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
