"""Which labels a gradient is taken at, and the loss there: sampled, true, uniform, Rademacher, or given."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops, reference

LABELS = ("sampled", "true", "uniform", "rademacher")


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
            rows of the other, get the labels of the whole. The fused pass counts from 0; otherwise it is several.

    Returns:
        The loss (float64 for float64 logits, else float32; shape () or logits.shape[:-1]) and the labels (int64,
        logits.shape[:-1]). No rows: a mean of NaN, as in ``F.cross_entropy``.

    Raises:
        ValueError: no class dimension, an unknown reduction, a negative ``first``, both key and generator, or a row
            without a softmax (NaN, +inf, or all −inf), which is named.
    """
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., C), got a scalar")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if first < 0:
        raise ValueError(f"first: expected a row number >= 0, got {first}")
    if key is None:
        key = new_key(generator, logits.device)
    elif generator is not None:
        raise ValueError("key and generator: expected one of them, got both")
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    nll, labels, _ = ops.sample_cross_entropy(rows, key, 1.0, first)
    loss = nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else nll.view(logits.shape[:-1])
    return loss, labels.view(logits.shape[:-1])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., C) against class indices (...) or class probabilities (..., C).

    Against signs ε (int8, (..., C)) it is 2⟨√p, ε⟩ instead, whose gradient in the logits, √p⊙ε − p⟨√p, ε⟩, has over
    random signs the mean and covariance of that of −log p(ŷ) over ŷ ~ p.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if targets.dtype == torch.int8:
        return 2 * ((rows.log_softmax(-1) / 2).exp() * targets.reshape(rows.shape)).sum(-1).mean()
    if targets.is_floating_point():
        return F.cross_entropy(rows, targets.reshape(rows.shape))
    return F.cross_entropy(rows, targets.reshape(-1))


def check_labels(labels: str | Tensor) -> None:
    """Raises ValueError where ``labels`` names nothing known."""
    if isinstance(labels, str) and labels not in LABELS:
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

    ``key`` is what they are drawn with, where they :func:`are_drawn`, and ``first`` the number of the first row.
    """
    if isinstance(labels, Tensor):
        chosen = labels
    elif labels == "sampled":
        return sample_cross_entropy(logits, key=key, first=first)
    elif labels == "uniform":
        _, chosen = sample_cross_entropy(torch.zeros_like(logits), key=key, first=first)
    elif labels == "rademacher":
        assert key is not None
        signs = reference.rademacher_signs(logits[..., 0].numel(), logits.shape[-1], key, first)
        chosen = signs.view(logits.shape).to(logits.device)
    else:
        assert targets is not None
        chosen = targets
    return cross_entropy(logits, chosen), chosen
