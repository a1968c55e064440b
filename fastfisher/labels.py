"""Which labels a gradient is taken at, and the loss there: sampled, true, uniform, Rademacher, or given."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops, reference
from fastfisher.arguments import check_generator, is_count

LABELS = ("sampled", "true", "uniform", "rademacher")

IGNORED = -100
"""The target of a row that does not count, as in ``F.cross_entropy``."""


def new_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A fresh key (seed, offset) as int64[2] on ``device``, drawn from ``generator`` or from torch's default one."""
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.empty(2, dtype=torch.int64, device=source).random_(generator=generator).to(device)


def sample_cross_entropy(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws ŷ ~ p(y) = softmax(logits) and returns the cross-entropy −log p(ŷ) and ŷ, in one fused pass.

    The gradient of the loss in the logits is softmax(logits) − onehot(ŷ): exactly the per-example output gradient
    whose second moment is the Fisher matrix (eq. 2 of Jastrzebski et al., 2021). Twice differentiable.

    Args:
        logits: (..., C) with C from 1 to 262,144; float32, float64, bfloat16 or float16. −inf masks a class: it is
            never drawn.
        generator: where the key comes from; torch's default generator otherwise, so ``torch.manual_seed`` governs it.
        key: int64[2] (seed, offset) instead. The same key and logits give the same labels.
        reduction: "mean" over all rows, "sum", or "none".
        first: the number of the first row. Two halves of a batch, drawn with one key, the second one with ``first`` the
            rows of the other, get the labels of the whole.

    Returns:
        The loss (float64 for float64 logits, else float32; shape () or logits.shape[:-1]) and the labels (int64,
        logits.shape[:-1]). No rows: a mean of NaN, as in ``F.cross_entropy``.

    Raises:
        ValueError: no class dimension, an unknown reduction, a ``first`` that is no row number, a key or generator that
            is none, both of them, or a row without a softmax (NaN, +inf, or all −inf), which is named.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: expected a tensor of shape (..., C), got {type(logits).__name__}")
    check_generator(generator)
    if not (key is None or isinstance(key, Tensor)):
        raise ValueError(f"key: expected an int64 tensor of 2 elements or None, got {type(key).__name__}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., C), got a scalar")
    if not (isinstance(reduction, str) and reduction in ("mean", "sum", "none")):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not is_count(first, 0):
        raise ValueError(f"first: expected a row number >= 0, got {first!r}")
    if key is None:
        key = new_key(generator, logits.device)
    elif generator is not None:
        raise ValueError("key and generator: expected one of them, got both")
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    nll, labels, _ = ops.sample_cross_entropy(rows, key, 1.0, first)
    loss = nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else nll.view(logits.shape[:-1])
    return loss, labels.view(logits.shape[:-1])


def cross_entropy(
    logits: Tensor, targets: Tensor, *, reduction: Literal["mean", "sum"] = "mean", name: str = "targets"
) -> Tensor:
    """Mean (or summed) cross-entropy of logits (..., C) against class indices (...) or class probabilities (..., C).

    Against signs ε (int8, (..., C)) it is 2⟨√p, ε⟩ instead, whose gradient in the logits, √p⊙ε − p⟨√p, ε⟩, has over
    random signs the mean and covariance of that of −log p(ŷ) over ŷ ~ p. The mean is over the rows whose label is not
    ``IGNORED``, or whose signs are not 0.

    Raises:
        ValueError: the targets do not fit the logits; ``name`` is the argument that is named.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(targets).__name__}")
    per_class = targets.dtype == torch.int8 or targets.is_floating_point()
    fitting = targets.dtype in (torch.int64, torch.uint8) or per_class
    if not fitting or targets.numel() != (rows.numel() if per_class else len(rows)):
        raise ValueError(
            f"{name}: expected class indices (int64) of shape {tuple(logits.shape[:-1])} or class probabilities of "
            f"shape {tuple(logits.shape)}, got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if targets.dtype == torch.int8:
        signs = targets.reshape(rows.shape)
        total = 2 * ((rows.log_softmax(-1) / 2).exp() * signs).sum()
        return total / (signs[:, :1] != 0).sum() if reduction == "mean" else total
    if per_class:
        return F.cross_entropy(rows, targets.reshape(rows.shape), reduction=reduction)
    try:
        return F.cross_entropy(rows, targets.reshape(-1), reduction=reduction)
    except IndexError as error:  # on a GPU the device asserts
        raise ValueError(f"{name}: expected class indices 0 to {rows.shape[1] - 1}, or -100: {error}") from None


def ignored(logits: Tensor, targets: Any) -> Tensor | None:
    """Which rows of the logits (..., C) the targets (...) take out of every mean with ``IGNORED``: padding, prompts.

    None where there are none.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != logits.shape[:-1]:
        return None
    found = targets == IGNORED
    return found if _some(found) else None


def _some(found: Tensor) -> bool:
    """Whether any is true; on a GPU, where looking would stall the stream, yes."""
    return found.device.type != "cpu" or bool(found.any())


def counted_rows(logits: Tensor, targets: Any) -> int | Tensor:
    """How many rows of the logits a mean is over; a float64 tensor where some may be :func:`ignored`."""
    out = ignored(logits, targets)
    return logits[..., 0].numel() if out is None else (~out).sum(dtype=torch.float64)


def averaged_rows(targets: Any, rows: int) -> int:
    """How many of the rows ``F.cross_entropy`` averages over at these targets; on a GPU the host waits."""
    if isinstance(targets, Tensor) and targets.dtype == torch.int64:
        return int((targets != IGNORED).sum())
    return rows


def check_labels(labels: str | Tensor) -> None:
    """Raises ValueError where ``labels`` names nothing known."""
    if not isinstance(labels, Tensor) and not (isinstance(labels, str) and labels in LABELS):
        raise ValueError(f'labels: expected "sampled", "true", "uniform", "rademacher" or a tensor, got {labels!r}')


def check_targets(labels: str | Tensor, targets: Tensor | None) -> None:
    """Raises ValueError where the labels are the targets and there are none."""
    if isinstance(labels, str) and labels == "true" and targets is None:
        raise ValueError('targets: expected the true labels with labels="true", got None')


def are_drawn(labels: str | Tensor) -> bool:
    """Whether it takes a key to have such labels."""
    return isinstance(labels, str) and labels != "true"


def label_loss(
    logits: Tensor, labels: str | Tensor, targets: Tensor | None, key: Tensor | None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy at the chosen labels, and those labels, so that it can be taken again elsewhere.

    ``key`` is what they are drawn with, where they :func:`are_drawn`, and ``first`` the number of the first row. Rows
    whose target is ``IGNORED`` have that label (signs of 0), and no part in the mean.
    """
    out = ignored(logits, targets)
    if isinstance(labels, Tensor):
        chosen = labels
    elif labels == "sampled":
        if out is None:
            return sample_cross_entropy(logits, key=key, first=first)
        losses, drawn = sample_cross_entropy(logits, key=key, first=first, reduction="none")
        return losses.masked_fill(out, 0).sum() / (~out).sum(), drawn.masked_fill(out, IGNORED)
    elif labels == "uniform":
        _, chosen = sample_cross_entropy(torch.zeros_like(logits), key=key, first=first)
        chosen = chosen if out is None else chosen.masked_fill(out, IGNORED)
    elif labels == "rademacher":
        assert key is not None
        signs = reference.rademacher_signs(logits[..., 0].numel(), logits.shape[-1], key, first)
        chosen = signs.view(logits.shape).to(logits.device)
        chosen = chosen if out is None else chosen.masked_fill(out[..., None], 0)
    else:
        assert targets is not None
        chosen = targets
    return cross_entropy(logits, chosen, name="labels" if isinstance(labels, Tensor) else "targets"), chosen
