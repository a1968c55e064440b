"""The training loss of a step: that of the likelihood, or a function of the caller's, and which targets it has."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.data import check_own_loss, paired
from fastfisher.distributed.single import Counts, Single
from fastfisher.inputs import Call, Inputs, check_examples, differentiable, input_tensors, map_inputs
from fastfisher.labels import KINDS
from fastfisher.model import check_heads, couples_examples, parameters_beside
from fastfisher.outputs import Output, loss_of, tensors_within
from fastfisher.penalise.options import Options
from fastfisher.penalise.point import Point
from fastfisher.targets import IGNORED, check_certain, check_counted

Seen = Sequence[tuple[Any, int]]
"""What the model returned in each call, and for how many examples."""


class Objective:
    """The training loss.

    Args:
        model: the model.
        options: ``loss``, the subject, and the labels of R, which may be the targets.
        world: the processes that have a part of the batch: a part in which no row counts is then none too few.
    """

    def __init__(self, model: nn.Module, options: Options, world: Single) -> None:
        self.model, self.loss, self.shares = model, options.loss, world.shares
        self.subject, self.labels = options.settings.subject, options.settings.kind
        self.likelihood, self.first_only = self.subject.likelihood, options.settings.first_only
        self.in_parts = options.examples is not None
        self._seen: list[tuple[Any, int]] | None = None
        self._structured = self._alone = False
        self._looked = world.sharded  # where the leaves of a loss are shards put together, which are no parameters

    def batch(self, inputs: Inputs, given: Any, trainable: int) -> tuple[Call, Any]:
        """The call of the model and the targets; the first forward of a kind looks for heads beside the logits."""
        call, targets = paired(self.model, inputs, given, self.subject.reading)
        call = map_inputs(call, differentiable)
        targets = differentiable(targets) if isinstance(targets, Tensor) else targets
        check_examples(call)
        if self.subject.is_loss:  # the call has the targets
            return dataclasses.replace(call, see=self._look_alone) if self.in_parts else call, None
        if self.loss is not None:
            return dataclasses.replace(call, see=self._see), targets
        if targets is None:
            raise ValueError("targets: expected those of the training loss, got None")
        call = check_heads(self.model, call, trainable)
        return (call if given is not None else check_own_loss(self.model, call, targets, self.likelihood)), targets

    @contextmanager
    def seeing(self) -> Iterator[Seen]:
        """Within, what the model returns is noted for :meth:`at`: a loss of the caller's gets it whole."""
        seen: list[tuple[Any, int]] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    def _see(self, output: Any, logits: Tensor) -> None:
        if self._seen is not None:
            self._seen.append((output, len(logits)))

    def fit(self, logits: Tensor, targets: Any) -> tuple[Any, Tensor | None]:
        """The targets of the training loss, and those of the rows of logits, where there are any.

        Raises:
            ValueError: they do not fit.
        """
        if self.subject.is_loss:
            return None, None
        if self.loss is None or self.labels.name == "true":
            KINDS["true"].check_targets(targets, self.likelihood)
            rows = self.subject.fit(logits, targets, model=self.model, in_range=self.loss is not None)
            if not self.shares:
                check_counted(rows)
            return (rows if self.loss is None else targets), rows
        self.likelihood.check(logits)
        if self.likelihood.row_dims == 1:
            check_certain(logits, targets, self.subject.reading.class_dim)
        if not (isinstance(targets, Tensor) and targets.shape == self.likelihood.shape_of_labels(logits)):
            return targets, None
        of_rows = targets if targets.is_floating_point() else self._marked(targets)
        return targets, of_rows

    def _marked(self, targets: Tensor) -> Tensor:
        counting = self.likelihood.counting(targets)
        return targets.long().masked_fill(~counting, IGNORED)

    def at(self, logits: Tensor, targets: Any, seen: Seen = ()) -> Tensor:
        """The training loss, a scalar, at targets that :meth:`fit` has given, and what was ``seen`` in the forward."""
        if self.loss is None:
            return self.likelihood.loss(logits, targets)
        loss = loss_of(self.loss, self._output(logits, seen), targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError("loss: expected a scalar tensor that depends on the logits")
        return loss

    def _look_alone(self, output: Any, losses: Tensor) -> None:
        """Raises ValueError, of the first batch, where the loss of one example depends on the outputs of others: in a
        part of the batch it is then another."""
        if self._alone or len(losses) < 2 or couples_examples(self.model):
            return
        self._alone = True
        held = [x for x in tensors_within(output) if x.requires_grad and x.dim() and len(x) == len(losses)]
        found = torch.autograd.grad(losses[0], held, retain_graph=True, allow_unused=True) if held else ()
        if any(g is not None and bool(g[1:].any()) for g in found):
            raise ValueError(
                "examples: expected None with a loss that compares examples with each other, whose value of some of "
                "them by themselves is another"
            )

    def look_beside(self, loss: Tensor, inputs: Inputs) -> None:
        """Warns, of the first loss, where it depends on parameters that the step takes no gradient in."""
        if self._looked:
            return
        self._looked = True
        others = parameters_beside(self.model, loss, input_tensors(inputs))
        if others:
            count = f"{len(others)} parameters" if len(others) > 1 else "a parameter"
            warnings.warn(
                f"loss: it depends on {count} beside those of the model (the first of shape {tuple(others[0].shape)}), "
                "as of a head in the loss or of a network that made the inputs. No gradient comes there, so that they "
                "are not trained: put all that is trained into one module, or say requires_grad_(False), "
                "inputs.detach() or torch.no_grad() where they are meant to stay as they are",
                stacklevel=2,
            )

    def _output(self, logits: Tensor, seen: Seen) -> Any:
        """What the model returned: the logits as it gave them, or what they are a part of."""
        reading = self.subject.reading
        assert isinstance(reading, Output)
        # Once it is more than a tensor it always is, also at other parameters, where it is not seen.
        self._structured |= reading.find is not None or not all(isinstance(output, Tensor) for output, _ in seen)
        if not self._structured:
            return reading.as_given(logits)
        whole = [output for output, examples in seen if examples == len(logits)]
        if not whole:
            raise ValueError(
                "examples, mixed: expected neither with loss= of a model that returns more than a tensor: it comes in "
                "parts, or at other parameters, where it is not put together"
            )
        return whole[0]

    def count(self, logits: Tensor, targets: Any) -> float:
        """What the mean training loss of this process divides by; examples where it is a callable."""
        own = self.loss is not None or self.subject.is_loss
        count = float(len(logits) if own else self.likelihood.counted(logits, targets))
        if count == 0:
            raise ValueError("targets: expected at least one that counts in each process, got none")
        return count

    def counts(self, logits: Tensor, targets: Any, point: Point, of_rows: Tensor | None, true: Tensor | None) -> Counts:
        """What this process has of the batch; ``of_rows`` and ``true`` are the targets of all rows, and of those of the
        ``point``."""
        whole, counted = self.first_only or point.rows is logits, self.labels.of(self.likelihood).counted
        return Counts(
            loss=lambda: self.count(logits, targets),
            penalised=lambda: counted(point.rows, true),
            rows=self.likelihood.shape_of_labels(point.rows).numel(),
            examples=len(point.rows),
            batch=len(logits),
            part=lambda: 1.0 if whole else counted(point.rows, true) / counted(logits, of_rows),
            first_only=self.first_only,
        )
