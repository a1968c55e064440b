"""What is pulled back through a captured forward: the gradient of the loss in the logits, at each draw of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastfisher.distributed.single import Single
from fastfisher.inputs import differentiable
from fastfisher.labels import Labels, Rows
from fastfisher.likelihoods.subject import Subject
from fastfisher.ops.sampled import new_key


class Keys:
    """The keys that labels are drawn with: one in all, whose offset counts the draws, while the rows of logits are
    counted through all batches. The same labels are drawn however the data are cut into batches.

    Of several processes the key is that of rank 0, and the rows of each batch are those of rank 0 first.
    """

    def __init__(self, generator: torch.Generator | None, world: Single | None = None) -> None:
        self.generator, self.world = generator, world or Single()
        self.key: Tensor | None = None
        self.drawn = self.done = self.rows = 0

    def begin(self, drawn: int) -> None:
        """A pass over the data is to come, after so many draws of each example."""
        self.drawn, self.done, self.rows = drawn, 0, 0

    def of(self, draw: int, rows: int, device: torch.device) -> tuple[Tensor, int]:
        """The key for one draw of a batch of so many rows, and the number of its first row."""
        if self.key is None:
            self.key = new_key(self.generator, device)
        if draw == 0:  # of the next batch
            self.done += self.rows
        key, first, self.rows = self.world.share_key(self.key.clone(), rows)
        key[1] += self.drawn + draw
        return key, self.done + first


class Cotangents:
    """The gradients of the summed loss in the logits of one batch; several a draw where their squared norms add up.

    Args:
        logits: without their graph, the classes last.
        targets: as the caller gave them.

    Raises:
        ValueError: targets or labels do not fit the logits, or no label can be drawn of them.
    """

    def __init__(self, logits: Tensor, labels: Labels, subject: Subject, targets: Any, keys: Keys) -> None:
        likelihood = subject.likelihood
        likelihood.check(logits)
        if targets is not None:
            targets = differentiable(targets) if isinstance(targets, Tensor) else targets
            targets = subject.fit(logits, targets)
        if labels.of_model:
            likelihood.check_drawable(logits)
        self.labels = labels.fitted(likelihood, logits, class_dim=subject.reading.class_dim)
        self.labels.check_targets(targets, likelihood)
        self._rows, self._keys, self._draws = Rows(labels.of(likelihood), logits, targets), keys, 0

    def draw(self) -> Iterator[Tensor]:
        """Those of one draw."""
        rows = self._rows
        if self.labels.drawn:
            count = rows.likelihood.shape_of_labels(rows.output).numel()
            key, first = self._keys.of(self._draws, count, rows.output.device)
            rows, self._draws = dataclasses.replace(rows, key=key, first=first), self._draws + 1
        return self.labels.cotangents(rows)
