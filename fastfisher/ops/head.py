"""The last linear layer and its cross-entropy in chunks of rows, for vocabularies whose logits do not fit.

Of a language model with 131,072 tokens, the logits of 2,048 positions are 1 GiB, and their softmax and gradient as much
again. Here the logits of a few rows are made, turned into their gradient in place, multiplied into the gradients of the
hidden states and of the weight, and forgotten. The compiled ``sample_cross_entropy`` keeps logits beside
gradients, so a chunk takes the same steps in PyTorch's own operations, in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.autocast import autocast_dtype
from fastfisher.checks import check_generator, is_count, is_number
from fastfisher.ops.reference import TILE, first_above, philox
from fastfisher.ops.sampled import new_key


def linear_sample_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    labels: Literal["sampled", "true"] = "sampled",
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    first: int = 0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_bytes: int = 1 << 26,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits hidden·weightᵀ + bias at drawn or true labels, without ever holding the logits.

    −log p(ŷ) with ŷ ~ p = softmax(logits), as in :func:`fastfisher.sample_cross_entropy` (eq. 2 of Jastrzebski et al.,
    2021), or −log p(y). With smoothing s it is (1 − s)·(−log p(ŷ)) + s·mean_c(−log p_c), as in ``F.cross_entropy``.
    Differentiable once: the gradients of a mean or sum are made in the forward, in the same pass over the chunks, and
    only scaled in the backward; ``reduction="none"`` takes a second pass there.

    The key decides the labels, not the size of the chunks: losses and labels have the same bits for every size, as long
    as a matrix product rounds a row alike whichever rows come with it, which libraries do not promise. The gradients of
    weight and bias are sums over chunks, whose rounding depends on the size.

    Args:
        hidden: (..., p), float32, float64, bfloat16 or float16.
        weight: (C, p), the rows of the classes; the embedding itself where it is tied.
        targets: int64, hidden.shape[:-1]. With drawn labels only ``ignore_index`` is looked for in them.
        bias: (C,), or None. −inf masks a class: it is never drawn.
        labels: "sampled" draws ŷ; "true" takes the targets.
        generator: where the key comes from; torch's default generator otherwise.
        key: int64[2] (seed, offset) instead.
        first: the number of the first row, as in :func:`fastfisher.sample_cross_entropy`.
        reduction: "mean" over the rows that are not ignored (NaN where all are), "sum", or "none".
        ignore_index: rows with this target (padding) have no loss and no gradient, and this label.
        label_smoothing: s, from 0 to 1.
        chunk_bytes: how much the logits of a chunk may take, in float32 (float64 for float64); at least a row is taken.

    Returns:
        The loss (float64 for float64, else float32; () or hidden.shape[:-1]) and the labels (int64, hidden.shape[:-1]).

    Raises:
        ValueError: a shape, a dtype, a target or an option is none of the above, or on the CPU a row has no softmax
            (NaN, +inf, or all −inf). On a GPU, where a check would stall the stream, its loss is NaN, its label −1.
    """
    _check_tensors(hidden=hidden, weight=weight, targets=targets, bias=bias, key=key)
    if (dtype := autocast_dtype(hidden.device.type)) is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(hidden, weight, targets, bias, labels, reduction, ignore_index, label_smoothing, chunk_bytes, first)
    key = _key(labels, key, generator, hidden.device)
    row_bytes = weight.shape[0] * (8 if hidden.dtype == torch.float64 else 4)
    chosen = None if targets is None else targets.reshape(-1)
    head = _Head(chosen, key, first, ignore_index, label_smoothing, max(1, chunk_bytes // max(1, row_bytes)))
    shape = hidden.shape[:-1]
    rows = hidden.reshape(math.prod(shape), hidden.shape[-1])
    loss, drawn = _Loss.apply(rows, weight, bias, head, reduction, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return (loss.view(shape) if reduction == "none" else loss), drawn.view(shape)


def _check_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        optional = name in ("targets", "bias", "key")
        if not (isinstance(tensor, Tensor) or (optional and tensor is None)):
            expected = "a tensor or None" if optional else "a tensor"
            raise ValueError(f"{name}: expected {expected}, got {type(tensor).__name__}")


def _key(labels: str, key: Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """The key by which labels are drawn; None for true labels, which are not."""
    check_generator(generator)
    if key is not None and (key.dtype != torch.int64 or key.shape != (2,)):
        raise ValueError(f"key: expected int64 of shape (2,), got {key.dtype} of shape {tuple(key.shape)}")
    if labels == "true":
        if key is not None or generator is not None:
            raise ValueError('key and generator: expected neither with labels="true", which are not drawn')
        return None
    if key is not None and generator is not None:
        raise ValueError("key and generator: expected one of them, got both")
    return new_key(generator, device) if key is None else key


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor | None, bias: Tensor | None, labels: str, reduction: str,
    ignore_index: int, label_smoothing: float, chunk_bytes: int, first: int,
) -> None:  # fmt: skip
    if hidden.dim() == 0 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected floats of shape (..., p), got {hidden.dtype} {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype or not len(weight):
        expected = f"{hidden.dtype} (C, {hidden.shape[-1]})"
        raise ValueError(f"weight: expected {expected}, as hidden has it, got {weight.dtype} {tuple(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias: expected {weight.dtype} ({len(weight)},), got {bias.dtype} {tuple(bias.shape)}")
    if not (isinstance(labels, str) and labels in ("sampled", "true")):
        raise ValueError(f'labels: expected "sampled" or "true", got {labels!r}')
    if not (isinstance(reduction, str) and reduction in ("mean", "sum", "none")):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not is_count(ignore_index, -(2**63)):
        raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if not (is_number(label_smoothing) and 0.0 <= label_smoothing <= 1.0):
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")
    if not is_count(chunk_bytes):
        raise ValueError(f"chunk_bytes: expected a number of bytes >= 1, got {chunk_bytes!r}")
    if not is_count(first, 0):
        raise ValueError(f"first: expected a row number >= 0, got {first!r}")
    if targets is None:
        if labels == "true":
            raise ValueError('targets: expected the true labels with labels="true", got None')
        return
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected int64 {tuple(hidden.shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}"
        )
    if labels == "true" and targets.device.type == "cpu":
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))]
        if len(wrong):
            allowed = f"0 to {len(weight) - 1} or ignore_index={ignore_index}"
            raise ValueError(f"targets: expected class indices {allowed}, got {int(wrong[0])}")


@dataclass
class _Head:
    """What a pass over the chunks needs beside the tensors that are differentiated; ``key`` where labels are drawn."""

    targets: Tensor | None
    key: Tensor | None
    first: int
    ignore_index: int
    smoothing: float
    rows: int

    @property
    def kept(self) -> Tensor | None:
        """Which rows count; None where all do."""
        return None if self.targets is None else self.targets != self.ignore_index

    def count(self, hidden: Tensor) -> Tensor:
        """How many rows count: a float64 scalar on the device."""
        kept = self.kept
        if kept is None:
            return torch.full((), float(len(hidden)), dtype=torch.float64, device=hidden.device)
        return kept.sum(dtype=torch.float64)

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, row_weights: Tensor | None, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The loss and label of each row, and Σ_i row_weights_i·∇loss_i in the wanted ones of hidden, weight, bias."""
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = hidden.new_empty(len(hidden), dtype=compute)
        labels = hidden.new_empty(len(hidden), dtype=torch.int64)
        gradients: list[Tensor | None] = [
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=compute) if wanted[1] else None,
            torch.zeros_like(bias, dtype=compute) if wanted[2] and bias is not None else None,
        ]
        kept = self.kept
        for start in range(0, len(hidden), self.rows):
            rows = slice(start, start + self.rows)
            inputs = hidden[rows]
            counts = None if kept is None else kept[rows]
            if counts is not None:  # a NaN in an ignored row must not reach the gradient of the weight
                inputs = inputs.masked_fill(~counts[:, None], 0)
            x = F.linear(inputs, weight, bias).to(compute)
            losses[rows], labels[rows], inverse = self._softmax(x, counts, start)
            if row_weights is None:
                continue
            by_row = row_weights[rows] if counts is None else row_weights[rows].masked_fill(~counts, 0)
            self._gradient(x, labels[rows], by_row.to(compute), inverse)
            if gradients[0] is not None:
                _times(x, weight, gradients[0][rows])
            if gradients[1] is not None:
                gradients[1].addmm_(x.t(), inputs.to(compute))
            if gradients[2] is not None:
                gradients[2].add_(x.sum(0))
        return losses, labels, gradients

    def _softmax(self, x: Tensor, counts: Tensor | None, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves in x the exponentials of the logits less their row's maximum; returns the losses, the labels, and the
        inverses of the exponentials' sums."""
        largest = x.amax(1, keepdim=True)
        good = largest.isfinite()
        if x.device.type == "cpu" and not bool(good.all()):
            row = start + int((~good).int().argmax())
            raise ValueError(f"hidden: row {row} has no softmax (its logits hold NaN or +inf, or nothing above -inf)")
        x.sub_(largest)
        labels = at_label = None
        if self.key is None:
            assert self.targets is not None
            labels = self.targets[start : start + len(x)]
            at_label = x.gather(1, self._index(labels)).double()
        mean = x.mean(1, keepdim=True).double() if self.smoothing else None
        x.exp_()
        whole = x.shape[1] // TILE * TILE
        sums = [x[:, :whole].reshape(len(x), -1, TILE).sum(-1)] if whole else []
        tiles = torch.cat([*sums, x[:, whole:].sum(1, keepdim=True)], 1).double()
        total = tiles.sum(1, keepdim=True)
        if labels is None:
            labels = self._draw(x, tiles, start)
            at_label = x.gather(1, labels[:, None]).double().log()
            labels = torch.where(good[:, 0], labels, -1)
            if counts is not None:
                labels = torch.where(counts, labels, self.ignore_index)
        assert at_label is not None
        loss = total.log() - at_label
        if mean is not None:
            loss = (1 - self.smoothing) * loss + self.smoothing * (total.log() - mean)
        loss = loss[:, 0] if counts is None else loss[:, 0].masked_fill(~counts, 0)
        return loss, labels, total.reciprocal()

    def _draw(self, exponentials: Tensor, tiles: Tensor, start: int) -> Tensor:
        """As :func:`fastfisher.ops.reference.sample_labels`, from sums that are there already."""
        assert self.key is not None
        rows, columns = exponentials.shape
        numbers = self.first + torch.arange(start, start + rows, device=self.key.device)
        u = philox(self.key, numbers).to(exponentials.device).double() * 2.0**-32
        tile = first_above(tiles, u[:, 0])
        places = tile[:, None] * TILE + torch.arange(TILE, device=tile.device)
        weights = exponentials.gather(1, places.clamp(max=columns - 1)).double()
        return tile * TILE + first_above(weights.masked_fill(places >= columns, 0), u[:, 1])

    def _gradient(self, exponentials: Tensor, labels: Tensor, by_row: Tensor, inverse: Tensor) -> None:
        """Turns the exponentials into (p − (1 − s)·onehot(label) − s/C)·by_row, in place."""
        exponentials.mul_((by_row[:, None] * inverse).to(exponentials.dtype))
        if self.smoothing:
            exponentials.sub_(by_row[:, None], alpha=self.smoothing / exponentials.shape[1])
        exponentials.scatter_add_(1, self._index(labels), by_row[:, None] * (self.smoothing - 1))

    @staticmethod
    def _index(labels: Tensor) -> Tensor:
        """The labels as columns to gather; that of an ignored row, whose weight is 0, does not matter."""
        return labels.clamp(min=0)[:, None]


FEW_COLUMNS = 128
"""How many columns are summed at once where a product's own sum would round too much."""


def _times(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x·weight, a sum over the classes.

    On the CPU a product of fewer than four rows a thread is one running sum, whose rounding shows at some hundred
    classes: there a few columns are summed at a time.
    """
    if x.device.type != "cpu" or len(x) >= 4 * torch.get_num_threads():
        torch.mm(x.to(weight.dtype), weight, out=out)
        return
    total = torch.zeros_like(out, dtype=x.dtype)
    for columns, rows in zip(torch.split(x, FEW_COLUMNS, 1), torch.split(weight, FEW_COLUMNS), strict=True):
        total += columns @ rows.to(x.dtype)
    out.copy_(total)


class _Loss(torch.autograd.Function):
    """The reduced loss and the labels. Of a mean or sum, the gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head, reduction: str, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.wanted, ctx.reduction = head, tuple(ctx.needs_input_grad[:3]), reduction
        divisor = head.count(hidden) if reduction == "mean" else 1.0
        row_weights = None
        if reduction != "none" and grad_enabled and any(ctx.wanted):
            row_weights = hidden.new_ones(len(hidden), dtype=torch.float64) / divisor
        # To those who follow the calls of a forward (frozen gates) it is one smooth function, not the maxima in it.
        with torch._C.DisableTorchFunction(), torch.autocast(hidden.device.type, enabled=False):
            losses, labels, gradients = head.run(hidden, weight, bias, row_weights, ctx.wanted)
        ctx.mark_non_differentiable(labels)
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, bias, labels)
            return losses, labels
        ctx.save_for_backward(*_in_dtypes(gradients, hidden, weight, bias))
        return (losses.sum(dtype=torch.float64) / divisor).to(losses.dtype), labels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        if ctx.reduction != "none":
            scaled = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
            return (*scaled, None, None, None)
        hidden, weight, bias, labels = ctx.saved_tensors
        head = _Head(labels, None, 0, ctx.head.ignore_index, ctx.head.smoothing, ctx.head.rows)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = head.run(hidden, weight, bias, grad, ctx.wanted)[2]
        return (*_in_dtypes(gradients, hidden, weight, bias), None, None, None)


def _in_dtypes(gradients: list[Tensor | None], *like: Tensor | None) -> list[Tensor | None]:
    return [g if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, like, strict=True)]
