"""The data of a measurement: tensors, pairs or loaders, as batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastfisher.arguments import is_count
from fastfisher.model import Inputs, count_examples, map_inputs

Pair = tuple[Inputs, Tensor | None]
"""Inputs and, where there are any, targets."""


class Batches:
    """The batches of ``data`` on a device, as often as they are iterated.

    Args:
        data: a tensor of inputs, a pair (inputs, targets), or an iterable of either, taken batch by batch as it comes.
        device: where the batches go.
        samples: at most so many examples: a random choice of a pair's, the first of an iterable's.
        batch_size: how many examples at a time, where ``data`` is no iterable; all by default.
        generator: chooses the examples.

    Attributes:
        fraction: how much of all data is in the batches; known after they have been iterated.

    Raises:
        ValueError, TypeError: an argument is none of the above; it is named.
    """

    def __init__(
        self,
        data: Any,
        device: torch.device,
        *,
        samples: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if samples is not None and not is_count(samples):
            raise ValueError(f"samples: expected an integer >= 1 or None, got {samples!r}")
        if batch_size is not None and not is_count(batch_size):
            raise ValueError(f"batch_size: expected an integer >= 1 or None, got {batch_size!r}")
        self.data, self.samples, self.batch_size, self.device = data, samples, batch_size, device
        self.fraction = 1.0
        self.whole = isinstance(data, Tensor | dict) or (isinstance(data, tuple) and len(data) == 2)
        self.exhausted = False
        if self.whole:
            self.inputs, self.targets = _pair(data)
            examples = count_examples(self.inputs, "data")
            if self.targets is not None and self.targets.dim() == 0:
                raise ValueError("data: expected one target per input, got a scalar tensor")
            if self.targets is not None and len(self.targets) != examples:
                raise ValueError(f"data: expected one target per input, got {len(self.targets)} for {examples}")
            self.order: Tensor | None = None
            if samples is not None and samples < examples:
                source = generator.device if generator is not None else torch.device("cpu")
                self.order = torch.randperm(examples, generator=generator, device=source)[:samples]
                self.fraction = samples / examples
            self.examples = examples if self.order is None else samples or 0
        elif not isinstance(data, Iterable):
            raise TypeError(f"data: expected tensors or an iterable of batches, got {type(data).__name__}")

    def __iter__(self) -> Iterator[Pair]:
        if not self.whole:
            yield from self._stream()
            return
        size = self.batch_size or max(1, self.examples)
        for start in range(0, self.examples, size):
            rows: Any = slice(start, start + size)
            if self.order is not None:
                rows = self.order[rows]
            yield self._take(self.inputs, self.targets, rows)

    def _stream(self) -> Iterator[Pair]:
        if self.exhausted:
            raise ValueError("data: expected an iterable that can be iterated again with tolerance=, got an iterator")
        self.exhausted = iter(self.data) is self.data
        left = self.samples if self.samples is not None else math.inf
        for batch in self.data:
            inputs, targets = _pair(batch)
            size = count_examples(inputs, "data")
            if size:
                yield self._take(inputs, targets, slice(0, int(min(size, left))))
            left -= size
            if left <= 0:
                if self.samples is not None:
                    self.fraction = 0.0  # of a stream whose length is not known
                return

    def _take(self, inputs: Inputs, targets: Tensor | None, rows: Any) -> Pair:
        def take(x: Tensor) -> Tensor:
            return (x[rows.to(x.device) if isinstance(rows, Tensor) else rows] if x.dim() else x).to(self.device)

        return map_inputs(inputs, take), None if targets is None else take(targets)


def _pair(batch: Any) -> Pair:
    if isinstance(batch, Tensor | dict):
        return batch, None
    if isinstance(batch, list | tuple) and len(batch) == 2 and (batch[1] is None or isinstance(batch[1], Tensor)):
        inputs = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
        if isinstance(inputs, Tensor | dict | tuple):
            return inputs, batch[1]
    if isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], Tensor | dict | tuple):
        return batch[0], None
    raise TypeError(f"data: expected tensors or pairs (inputs, targets), got {type(batch).__name__}")
