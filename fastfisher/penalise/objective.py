"""The training loss of a step: mean cross-entropy, or a function of the caller's, and which targets it has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastfisher.data import check_own_loss, paired
from fastfisher.distributed.single import Counts
from fastfisher.inputs import Call, Inputs, check_examples, differentiable, map_inputs
from fastfisher.labels import KINDS
from fastfisher.model import as_given, check_heads
from fastfisher.penalise.options import Options
from fastfisher.penalise.point import Point
from fastfisher.targets import check_certain, check_counted


class Objective:
    """The training loss.

    Args:
        model: the model.
        options: ``loss``, ``class_dim``, and the labels of R, which may be the targets.
        shares: whether other processes have a part of the batch: then a part in which no row counts is none too few.
    """

    def __init__(self, model: nn.Module, options: Options, shares: bool) -> None:
        self.model, self.loss, self.class_dim, self.shares = model, options.loss, options.class_dim, shares
        self.labels, self.likelihood = options.settings.labels, options.settings.likelihood
        self.first_only = options.settings.first_only

    def batch(self, inputs: Inputs, given: Any, trainable: int) -> tuple[Call, Any]:
        """The call of the model and the targets; the first forward of a kind looks for heads beside the logits."""
        call, targets = paired(self.model, inputs, given, self.class_dim)
        call = map_inputs(call, differentiable)
        targets = differentiable(targets) if isinstance(targets, Tensor) else targets
        check_examples(call)
        if self.loss is not None:
            return call, targets
        if targets is None:
            raise ValueError("targets: expected those of the training loss, got None")
        call = check_heads(self.model, call, trainable)
        return (call if given is not None else check_own_loss(self.model, call, targets)), targets

    def fit(self, logits: Tensor, targets: Any) -> tuple[Any, Tensor | None]:
        """The targets of the training loss, and those of the rows of logits, where there are any.

        Raises:
            ValueError: they do not fit.
        """
        if self.loss is None or self.labels == "true":
            KINDS["true"].check_targets(targets, self.likelihood)
            rows = self.likelihood.fit(
                logits, targets, class_dim=self.class_dim, model=self.model, in_range=self.loss is not None
            )
            if not self.shares:
                check_counted(rows)
            return (rows if self.loss is None else targets), rows
        self.likelihood.check(logits)
        check_certain(logits, targets, self.class_dim)
        by_row = isinstance(targets, Tensor) and targets.shape == logits.shape[:-1]
        return targets, targets if by_row else None

    def at(self, logits: Tensor, targets: Any) -> Tensor:
        """The training loss, a scalar, at targets that :meth:`fit` has given."""
        if self.loss is None:
            return self.likelihood.loss(logits, targets)
        loss = self.loss(as_given(logits, self.class_dim), targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError("loss: expected a scalar tensor that depends on the logits")
        return loss

    def count(self, logits: Tensor, targets: Any) -> int:
        """How much the mean training loss of this process counts: by rows, or by examples where it is a callable."""
        count = int(self.likelihood.counted(logits, targets)) if self.loss is None else len(logits)
        if count == 0:
            raise ValueError("targets: expected at least one that counts in each process, got none")
        return count

    def counts(self, logits: Tensor, targets: Any, point: Point, of_rows: Tensor | None, true: Tensor | None) -> Counts:
        """What this process has of the batch; ``of_rows`` and ``true`` are the targets of all rows, and of those of the
        ``point``."""
        whole, counted = self.first_only or point.rows is logits, self.likelihood.counted
        return Counts(
            loss=lambda: self.count(logits, targets),
            penalised=lambda: counted(point.rows, true),
            rows=self.likelihood.shape_of_labels(point.rows).numel(),
            examples=len(point.rows),
            batch=len(logits),
            part=lambda: 1.0 if whole else counted(point.rows, true) / counted(logits, of_rows),
            first_only=self.first_only,
        )
