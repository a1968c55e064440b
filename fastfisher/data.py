"""What data are: the one place that decides what of a batch are inputs and what are targets.

A batch is

- a tensor: the one argument of the model;
- a mapping (a dict, a UserDict, what a tokenizer gives): the model's arguments by name. ``labels`` in it are the
  targets, and the model gets them too where its ``forward`` takes them: models of Transformers make a decoder's inputs
  of them. A causal language model predicts the next token; whether the targets of its logits are the labels or those of
  the next position is asked of the loss that the model itself returns;
- a tuple or list, as a ``DataLoader`` makes them: the last item are the targets, a tensor or None, and what comes
  before are the inputs: ``(x, y)``, ``[x, w, y]`` of a model of two arguments, ``[[x, w], y]``,
  ``[{"x": x, "w": w}, y]``. One item alone, ``[x]``, is inputs.

Inputs are arguments by position (tuples, lists) or by name (mappings) where the model's ``forward`` has such
parameters, and else its one argument as they are; see :func:`fastfisher.inputs.as_call`. They may hold tuples, lists
and mappings at any depth, and anything that is no tensor. Each tensor has the examples along dimension 0, or is shared
by all: a scalar, or of size 1 there.

Data are one such batch, or an iterable of batches: a ``DataLoader``, a list, a generator. A tuple is always one batch.
A list is one where a tensor or None is among its items, as in ``next(iter(loader))``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset

from fastfisher.alignment import labels_in, targets_within
from fastfisher.checks import check_count
from fastfisher.inputs import (
    Call,
    as_call,
    count_examples,
    differentiable,
    known_of,
    map_inputs,
    signature_of,
    take_rows,
    takes,
    takes_any_name,
)
from fastfisher.likelihoods.base import Likelihood
from fastfisher.outputs import OUTPUT, Reading

Pair = tuple[Call, Any]
"""How the model is called with the inputs and, where there are any, the targets."""


class Batches:
    """The batches of ``data`` on a device, as often as they are iterated.

    Args:
        model: what they are called with; its ``forward`` decides what its arguments are.
        data: a batch or an iterable of batches, as this module says, taken batch by batch as it comes.
        device: where the batches go.
        reading: what is read of the model's output.
        samples: at most so many examples: a random choice of a batch's, the first of an iterable's.
        batch_size: how many examples at a time, where ``data`` is no iterable; all by default.
        generator: chooses the examples.
        keep: whether to keep the batches of an iterator, which can be read only once.

    Attributes:
        fraction: how much of all data is in the batches; known after they have been iterated.

    Raises:
        ValueError, TypeError: an argument is none of the above; it is named.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        device: torch.device,
        *,
        reading: Reading = OUTPUT,
        samples: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        keep: bool = False,
    ) -> None:
        check_count("samples", samples, optional=True)
        check_count("batch_size", batch_size, optional=True)
        self.model, self.reading = model, reading
        self.data, self.samples, self.batch_size, self.device = data, samples, batch_size, device
        self.fraction = 1.0
        self.whole = is_batch(data)
        self.exhausted = False
        if self.whole:
            self.inputs, self.targets = split(model, data, reading)
            examples = _check_lengths(self.inputs, self.targets)
            self.order: Tensor | None = None
            if samples is not None and samples < examples:
                source = generator.device if generator is not None else torch.device("cpu")
                self.order = torch.randperm(examples, generator=generator, device=source)[:samples]
                self.fraction = samples / examples
            self.examples = examples if self.order is None else samples or 0
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            raise TypeError(
                f"data: expected batches, got {type(data).__name__}, which gives single examples; give "
                "torch.utils.data.DataLoader(data, batch_size=...)"
            )
        elif not isinstance(data, Iterable):
            raise TypeError(f"data: expected tensors or an iterable of batches, got {type(data).__name__}")
        elif keep and isinstance(data, Iterator):
            self.data = list(data)

    def __iter__(self) -> Iterator[Pair]:
        if not self.whole:
            yield from self._stream()
            return
        start = 0
        while start < self.examples:
            size = self.batch_size or self.examples  # which may grow from batch to batch
            rows: Any = slice(start, start + size)
            if self.order is not None:
                rows = self.order[rows]
            elif size >= self.examples:
                rows = None
            yield self._take(self.inputs, self.targets, rows)
            start += size

    def _stream(self) -> Iterator[Pair]:
        if self.exhausted:
            raise ValueError("data: expected an iterable that can be iterated again with tolerance=, got an iterator")
        self.exhausted = iter(self.data) is self.data
        left = self.samples if self.samples is not None else math.inf
        for batch in self.data:
            inputs, targets = split(self.model, batch, self.reading)
            size = _check_lengths(inputs, targets)
            if size:
                yield self._take(inputs, targets, None if size <= left else slice(0, int(left)))
            left -= size
            if left <= 0:
                if self.samples is not None:
                    self.fraction = 0.0  # of a stream whose length is not known
                return

    def _take(self, inputs: Call, targets: Tensor | None, rows: Any) -> Pair:
        """Some rows of a batch, or all of them (None), on the device, as tensors that autograd may save."""
        if rows is not None:
            inputs = take_rows(inputs, rows, "data")
            if isinstance(targets, Tensor):
                targets = targets[rows.to(targets.device) if isinstance(rows, Tensor) else rows]
        inputs = map_inputs(inputs, lambda x: differentiable(x.to(self.device)))
        return inputs, differentiable(targets.to(self.device)) if isinstance(targets, Tensor) else targets


def is_batch(data: Any) -> bool:
    """Whether data are one batch, and no iterable of batches."""
    return isinstance(data, Tensor | Mapping | tuple) or (
        isinstance(data, list) and any(item is None or isinstance(item, Tensor) for item in data)
    )


def split(model: nn.Module, batch: Any, reading: Reading = OUTPUT, name: str = "data") -> Pair:
    """A batch as inputs and targets, by the rules of this module.

    Raises:
        TypeError: it is none; ``name`` is the argument that is named.
        ValueError: the model cannot be called with these inputs.
    """
    if isinstance(batch, Tensor | Mapping | PackedSequence):
        return paired(model, batch, None, reading, name)
    if isinstance(batch, list | tuple) and batch:
        *inputs, last = batch
        if not inputs:
            if isinstance(last, Tensor | Mapping | list | tuple):
                return paired(model, last, None, reading, name)
        elif last is None or isinstance(last, Tensor) or reading.takes_targets:
            return paired(model, inputs[0] if len(inputs) == 1 else tuple(inputs), last, reading, name)
        raise TypeError(
            f"{name}: expected tensors or pairs (inputs, targets), got a {type(batch).__name__} whose last item, the "
            f"targets, is of type {type(last).__name__}; expected a tensor or None there"
        )
    raise TypeError(f"{name}: expected tensors or pairs (inputs, targets), got {type(batch).__name__}")


def paired(
    model: nn.Module, inputs: Any, targets: Any, reading: Reading = OUTPUT, name: str = "inputs"
) -> tuple[Call, Any]:
    """The call of the model that the inputs mean, and the targets: those given, or else the ``labels`` in a mapping.

    Raises:
        TypeError: the inputs are none; ``name`` is the argument that is named.
        ValueError: the model cannot be called with them, or its own loss does not tell whose targets the labels are.
    """
    if not (isinstance(inputs, Mapping) and "labels" in inputs):
        return _beside(as_call(model, inputs, reading, name), targets)
    batch = inputs
    signature = signature_of(model)
    if signature is not None and not (takes(signature, "labels") or takes_any_name(signature)):
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        if any(takes(signature, str(key)) for key in rest):
            inputs = rest
    call = as_call(model, inputs, reading, name)
    labels = labels_in(batch) if targets is None else None
    if labels is not None:
        asked = "labels" in call.kwargs and not labels.is_floating_point() and reading.row_dims == 1
        targets = targets_within(model, call, labels) if asked else labels
    return _beside(call, targets)


def _beside(call: Call, targets: Any) -> tuple[Call, Any]:
    """The call with the targets in it, too, where they are needed to read what the model returns."""
    return (dataclasses.replace(call, targets=targets) if call.reading.takes_targets else call), targets


def check_own_loss(model: nn.Module, call: Call, targets: Tensor, likelihood: Likelihood) -> Call:
    """The call, whose forward raises where the model makes another loss of the labels in it than the mean loss of the
    likelihood: one with a term that balances experts, say, or smoothed labels.

    Looked for once for each model and kind of call, in that forward itself.
    """
    kind = "own loss", tuple(sorted(call.kwargs)), model.training
    known, before = known_of(model), call.see
    if "labels" not in call.kwargs or kind in known:
        return call

    def see(output: Any, logits: Tensor) -> None:
        if before is not None:
            before(output, logits)
        own = getattr(output, "loss", None)
        if kind in known or len(logits) != len(targets):  # a part of the batch
            return
        if isinstance(own, Tensor) and own.numel() == 1:
            wide = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
            ours = likelihood.loss(wide, likelihood.fit(logits, targets, class_dim=call.class_dim))
            own, tolerance = own.detach(), max(1e-5, 8 * torch.finfo(own.dtype).eps)
            if not math.isclose(float(own), float(ours), rel_tol=tolerance, abs_tol=tolerance):
                raise ValueError(
                    f"model: its own loss at the labels, {float(own):.6g}, is not the mean {likelihood.title} of "
                    f"its {likelihood.what}, {float(ours):.6g}, which would be trained in its place; make the loss "
                    "yourself, with FisherPenalty.watching() and term(), or give the targets beside the inputs to "
                    f"train the {likelihood.title}"
                )
        known[kind] = True

    return dataclasses.replace(call, see=see)


# ---- lengths ---------------------------------------------------------------------------------------------------------


def _check_lengths(inputs: Call, targets: Tensor | None) -> int:
    """How many examples there are.

    Raises:
        ValueError: there are not as many targets.
    """
    examples = count_examples(inputs, "data")
    if not isinstance(targets, Tensor):
        return examples
    if targets.dim() == 0:
        raise ValueError("data: expected one target per input, got a scalar tensor")
    if len(targets) != examples:
        raise ValueError(
            f"data: expected one target per input, got {len(targets)} for {examples}; the last of several tensors are "
            "the targets: of inputs alone make ((x, w), None)"
        )
    return examples
